"""Supervised adaptation of a backbone: one trainer, one file per strategy."""
