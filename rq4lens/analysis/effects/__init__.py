"""What head sets did, and the table of it."""
