"""Which adapter of a stack did what to a picture: measured by leaving adapters out."""
