"""Metrics, traces and logs, of one process and of several."""
