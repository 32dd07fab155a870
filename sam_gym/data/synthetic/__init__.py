"""Procedural datasets."""
