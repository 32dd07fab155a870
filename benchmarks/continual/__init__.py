"""The `continual` benchmark."""
