"""`python -m server bench NAME`: a file for each benchmark; they report, and assert nothing."""
