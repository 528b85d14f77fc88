"""The version of this package, which `setup.py` reads without importing it."""

__version__ = "0.1.0"
