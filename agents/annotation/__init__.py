"""Annotate folders of images."""
