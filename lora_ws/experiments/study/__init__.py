"""Studies of how robust a trained reader is: adapters are changed, and read again."""
