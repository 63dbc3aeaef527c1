"""The two models of a pair, their prompts, and how both are loaded."""
