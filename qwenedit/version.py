"""The version of this package, where files that it writes find it."""

__version__ = "0.1.0"
