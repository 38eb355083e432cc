"""The model, its parts, and their files."""
