"""The search for widths, depth and tokens: one training run that shrinks the network."""
