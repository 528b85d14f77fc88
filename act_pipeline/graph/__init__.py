"""Paddle's static graphs: files, programs, and what is found in them and rewritten."""
