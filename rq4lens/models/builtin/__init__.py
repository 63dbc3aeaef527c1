"""The pair in the box and the planting of known differences."""
