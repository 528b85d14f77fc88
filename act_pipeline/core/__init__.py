"""What every part stands on: errors, records, model folders, YAML files, processes and locks."""
