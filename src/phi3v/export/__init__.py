"""A tuned model as others take it: merged, in the official layout, and proven to answer as it did here."""
