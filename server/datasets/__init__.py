"""Datasets, uploads and feedback: labelled pictures, identified by the digest of their content."""
