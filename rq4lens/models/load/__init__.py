"""From a checkpoint to a HookedTransformer."""
