"""Known before it runs: what fits which machine, how fast it will be, and what to ask quota for."""
