"""`rooms` and `rooms-panoramas`: procedural rooms of objects made of parts."""
