"""Which adapter of a stack did what to an image: measured by leaving adapters out."""
