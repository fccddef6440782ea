"""`python -m server …`: a file for each group of commands."""
