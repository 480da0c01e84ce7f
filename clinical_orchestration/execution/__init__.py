"""How runs are started, executed and stored."""
