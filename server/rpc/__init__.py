"""The engine's process, as front ends call it: a unix socket for calls, shared memory for pixels."""
