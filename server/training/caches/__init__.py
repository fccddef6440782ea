"""Caches of pixels and frozen features, shared by epochs and jobs, on disk and in memory."""
