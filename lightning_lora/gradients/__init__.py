"""The ways to compute the gradients of A and B, which are the same function at different cost."""
