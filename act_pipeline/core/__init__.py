"""Shared foundations: errors, records, model folders, YAML files, processes and locks."""
