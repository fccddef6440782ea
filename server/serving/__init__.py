"""Story 1, from an image to its answer: resolve the version, decode, queue, score."""
