"""Training jobs: their states, leases and events, kept in SQLite or Redis."""
