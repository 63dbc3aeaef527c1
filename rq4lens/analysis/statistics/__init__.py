"""Intervals, tests and concentration of per-prompt numbers."""
