"""One file for each method: what a task's parameters are, and how they become a lens."""
