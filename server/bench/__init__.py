"""`python -m server bench NAME`: one file per benchmark; benchmarks report and assert nothing."""
