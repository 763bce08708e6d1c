"""How well adapters act together: sets of them, judges of what they draw."""
