"""The first-use self-check: what a run computes fast, beside the plain way, on the device that it meets."""
