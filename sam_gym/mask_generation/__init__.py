"""Everything mode: generate, store and merge masks."""
