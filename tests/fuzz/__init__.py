"""What this project reads from disk, fed with files that are not what they should be.

One target a file; each says what it reads in :data:`TARGETS` of ``__main__``. ``python -m tests.fuzz --help``.
"""
