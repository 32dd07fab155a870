"""`python -m benchmarks.run everything`."""
