"""Benchmarks, each of which writes JSON, CSV, pictures and one HTML page."""

from sam_gym.utils.packages import check_agents

check_agents()
