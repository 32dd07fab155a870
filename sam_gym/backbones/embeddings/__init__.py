"""Image embeddings in memory and on disk."""
