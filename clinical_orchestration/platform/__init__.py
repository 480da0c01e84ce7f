"""What the deployment keeps of itself in PostgreSQL: variables, connections and what is known of pools.

Below settings, so that these can be read from it. It knows no defaults and no trial, imports its drivers where they
are used, and asks the database only when it is called.
"""
