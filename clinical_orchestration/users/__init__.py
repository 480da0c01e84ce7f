"""Who may do what: users, roles, passwords, sessions and tokens, as in Airflow."""
