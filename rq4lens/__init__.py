"""rq4lens: which attention heads carry what a fine-tune changed."""
