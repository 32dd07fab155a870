"""`domain`: ten procedural domains for continual learning."""
