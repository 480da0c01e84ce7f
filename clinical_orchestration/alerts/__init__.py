"""Alerts: what they say, when they are sent again, how they read in Slack and e-mail. Pure: no I/O."""
