"""Records, tables, plots, pages and progress bars, from plain data."""
