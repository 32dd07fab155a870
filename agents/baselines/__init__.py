"""Agents that learn nothing, scored under the same rules as trained policies."""

from agents.baselines.base import Agent

__all__ = ["Agent"]
