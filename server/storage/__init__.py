"""SQLite and Redis, opened alike and failing alike."""
