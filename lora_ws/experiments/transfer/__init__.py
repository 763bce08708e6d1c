"""Readers trained on adapters of one recipe, and tested on those of another."""
