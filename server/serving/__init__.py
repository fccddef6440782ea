"""Story 1, a picture's way to its answer: resolve the version, decode, queue, score."""
