"""Protocols and adapters of the outside systems: tables, objects, online features, queues, registry. No Dagster."""
