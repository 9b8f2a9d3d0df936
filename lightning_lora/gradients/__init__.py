"""The ways to compute the gradients of A and B."""
