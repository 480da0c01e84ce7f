"""Feature definitions, their computation in Spark, and labelled training rows. No I/O."""
