"""Whether the tables hold what they should: pure functions over polars frames with typed results."""
