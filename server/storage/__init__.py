"""Access to SQLite and Redis for the stores of jobs and keys: `connect`, and `answering` for their errors."""
