"""Benchmarks; each writes results.json, a CSV table, pictures and report.html."""

from sam_gym.utils.packages import check_agents

check_agents()
