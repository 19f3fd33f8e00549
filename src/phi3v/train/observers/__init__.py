"""Observers of the training loop: progress, evaluation, faults, signals, trackers."""
