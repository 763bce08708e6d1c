"""What people look at: records, tables, plots and progress, made from plain data."""
