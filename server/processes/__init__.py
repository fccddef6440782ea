"""What runs as which process: the process manager, the engines, the HTTP front ends."""

from typing import Final

INTERRUPTED: Final = 130  # the exit status after a second Ctrl-C: 128 + SIGINT, as of a program that SIGINT has killed
