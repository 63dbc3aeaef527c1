"""Study files: many cells in one table."""
