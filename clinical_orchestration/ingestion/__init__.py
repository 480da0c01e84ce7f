"""Records into bronze from topics and files, and on to silver, duplicates and quarantine; each exactly once."""
