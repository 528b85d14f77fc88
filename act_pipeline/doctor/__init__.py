"""What is installed, what this machine has, and which engines can run here.

It needs nothing but Python: with no package installed at all, it says what to install. Whatever could end the process
(an import of a package that does not fit, a driver) is tried in a process of its own, so that a crash becomes a line of
the table.
"""
