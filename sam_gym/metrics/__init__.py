"""Metrics of masks, of everything mode and of continual learning."""
