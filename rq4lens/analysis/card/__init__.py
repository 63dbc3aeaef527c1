"""Head cards: what a head reads, writes and decides in both models."""
