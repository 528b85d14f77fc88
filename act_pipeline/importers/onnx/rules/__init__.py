"""Conversion rules, one file for each kind of op."""
