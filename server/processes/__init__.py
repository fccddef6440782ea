"""What runs as which process: the process manager, the engines, the HTTP front ends."""
