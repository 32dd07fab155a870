"""Training of trackers on videos."""
