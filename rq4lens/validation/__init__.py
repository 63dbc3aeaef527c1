"""Ranking methods tested on models whose changed heads are known."""
