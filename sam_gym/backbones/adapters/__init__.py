"""Adapters: learned weights on top of a frozen SAM, as files and as models."""
