"""The commands, a file each with its flags and its ``main``; ``main.py`` finds the one that is asked for."""
