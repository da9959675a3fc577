"""From messages and rows to grids and batches. Imports no model."""
