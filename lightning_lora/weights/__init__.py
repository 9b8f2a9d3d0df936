"""Weights, however they are stored: plain, sharded, quantised; and rounding into them."""
