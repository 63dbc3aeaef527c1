"""Linear maps from base to tuned activations."""
