"""How a served model does: outcomes, performance over time, drift of data and of the concept. Pure: no I/O."""
