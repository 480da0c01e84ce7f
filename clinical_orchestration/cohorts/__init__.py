"""Which patients fit: inclusion and exclusion criteria as data, and cohorts with their attrition. Pure: no I/O."""
