"""Benchmarks, each of which writes JSON, CSV, pictures and one HTML page."""
