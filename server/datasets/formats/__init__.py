"""Readers of archives, tables, parquet and npz files, all of them untrusted input."""
