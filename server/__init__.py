"""The service: one frozen backbone, a rack of lenses, and the jobs that fit new ones."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lensrack")  # pyproject.toml says it, for the SDK and for the service
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
