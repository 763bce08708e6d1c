"""Which weights of a model make a concept, and edits that take it away or strengthen it (CAD)."""
