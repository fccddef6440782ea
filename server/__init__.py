"""The service: one frozen backbone, a rack of lenses, and the jobs that fit new ones."""

__version__ = "0.1.0"
