"""Simulated clicks and point grids."""
