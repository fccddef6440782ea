"""Checkpoints of other tools as bundles, read without running anything of theirs."""
