"""Models of other formats as this project's float models."""
