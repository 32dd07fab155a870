"""Annotate images by hand, with a click agent at one's side: `python -m agents.app`."""
