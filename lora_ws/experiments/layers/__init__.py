"""A figure of layers: one classifier per layer, per matrix, or with the best layers left out."""
