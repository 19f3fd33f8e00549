"""Benchmarks: what training, preprocessing and generating cost here, each beside the plain method in the same call."""
