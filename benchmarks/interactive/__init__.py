"""`python -m benchmarks.run interactive`."""
