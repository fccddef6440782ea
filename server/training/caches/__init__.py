"""Pixels and frozen features that epochs and jobs share, on disk and in memory."""
