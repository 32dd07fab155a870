"""`training`: the time of a training run by phase, against another checkout."""
