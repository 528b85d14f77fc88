"""Paddle's static graphs: reading and writing the files, analysis and rewriting of the programs."""
