"""PPO: algorithm, processes, checkpoints, callbacks, tracking, configuration."""
