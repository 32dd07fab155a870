"""Adapters: learned weights on top of a frozen SAM, as files and as models."""

# Importing them fills `ADAPTER_MODULES`.
from sam_gym.backbones.adapters import prompt_pools, routers

__all__ = ["prompt_pools", "routers"]
