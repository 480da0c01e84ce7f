"""A code location that does not load."""

raise ImportError("made to be broken")
