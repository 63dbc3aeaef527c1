"""How much of the full effect head sets cover."""
