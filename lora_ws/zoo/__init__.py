"""Making collections: a base model from photos, and thousands of adapters trained at once."""
