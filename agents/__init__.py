"""Agents that click: policies, baselines, training, evaluation."""
