"""Policies by name: `POLICIES.get("implicit")`.

A policy of your own is a subclass of `SamPolicy` with the decorator `POLICIES.register("NAME")`.
"""

from agents.policies.base import POLICIES, SamPolicy
from agents.policies.everything import EverythingPolicy
from agents.policies.explicit import ExplicitPolicy
from agents.policies.implicit import ImplicitPolicy

__all__ = ["POLICIES", "EverythingPolicy", "ExplicitPolicy", "ImplicitPolicy", "SamPolicy"]
