"""Orders of heads by many methods, and how they agree."""
