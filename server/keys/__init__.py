"""API keys: what each may do, on which tasks, and how much of it."""
