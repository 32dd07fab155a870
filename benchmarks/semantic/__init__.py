"""Benchmark `semantic`: semantic segmentation by prompts, scored on label maps."""
