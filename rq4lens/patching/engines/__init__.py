"""Engines that measure patches: hooks are the reference, the others must equal them."""
