"""`micro`, the bundled SAM: architecture, training, weights."""
