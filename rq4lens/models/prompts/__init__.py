"""From a file of prompts to tokens cut at the decision token."""
