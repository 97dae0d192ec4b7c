"""Compression of a classifier whose weights stay frozen: no labels, no training steps."""
