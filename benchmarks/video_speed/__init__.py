"""`video_speed`: VideoTracker against the authors' SAM2VideoPredictor."""
