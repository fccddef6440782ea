"""Story 2, a job's way to its version: claim, read, fit, evaluate, publish."""
