"""Admission, fair queueing, and the loop that hands the engine one batch after the other; no tensors."""
