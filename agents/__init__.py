"""Agents of sam-gym: policies, baselines, training, evaluation, export and sharing."""

from sam_gym.utils.packages import warn_of_other_agents

warn_of_other_agents()
