"""The four parts of the memory of training, measured and derived."""
