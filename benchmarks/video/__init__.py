"""`video`: masks of tracked objects, against trackers without memory."""
