"""Reading, mapping and patching attention heads; every number comes from here."""
