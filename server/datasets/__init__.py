"""Data sets, uploads and feedback: immutable pictures with labels, known by their content."""
