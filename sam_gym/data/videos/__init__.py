"""Readers of video datasets."""
