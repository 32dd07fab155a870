"""CLIP models, CLIP Surgery, and the training of `clip_micro`."""
