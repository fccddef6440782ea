"""Between the front ends, which speak HTTP, and the engine's process: see docs/architecture/06-fronts.md."""
