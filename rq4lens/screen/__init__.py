"""What a terminal asks and shows."""
