"""What looks on while it trains: progress, evaluation, faults, signals, trackers."""
