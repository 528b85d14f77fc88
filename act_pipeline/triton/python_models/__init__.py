"""Models of Triton's Python backend: copied into a repository as ``model.py``, next to the scripts of a bundle."""
