"""Making collections: photos to a base model, image sets to thousands of adapters at once."""
