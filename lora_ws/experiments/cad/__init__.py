"""A digit erased from a base model: what is left of it, and of the others."""
