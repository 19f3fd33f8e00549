"""Benchmarks: what training, preprocessing and generating cost here, each beside the plain way in the same call."""
