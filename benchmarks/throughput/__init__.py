"""`python -m benchmarks.run throughput`."""
