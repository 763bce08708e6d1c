"""A page and an API that judge one adapter file at a time (extra `serve`)."""
