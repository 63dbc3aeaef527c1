"""Controls, kinds of heads, layers and blend strengths."""
