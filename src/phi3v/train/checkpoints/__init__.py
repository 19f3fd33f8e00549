"""What is written while it trains, and going on from it."""
