"""A table: representations by protocol, beside published numbers and controls."""
