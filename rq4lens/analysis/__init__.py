"""What the patched numbers mean: rankings, coverage, uncertainty, layers."""
