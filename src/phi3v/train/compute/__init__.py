"""What a device computes and keeps: activations, kernels, float8, features of frozen towers."""
