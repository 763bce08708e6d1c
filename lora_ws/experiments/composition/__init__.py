"""Sets of adapters composed by every method, judged by what the images show."""
