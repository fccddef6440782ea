"""One file per method: a task's parameters, and how they become a lens."""
