"""What runs on the target machine: copied into every bundle, and imports nothing of this package."""
