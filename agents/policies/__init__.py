"""Policies by name: `POLICIES.get("implicit")`.

A policy of your own is a subclass of one of them: `register_policy("NAME", MyPolicy)`, or
"module:MyPolicy" as a name.
"""

# ruff: noqa: E402
from sam_gym.utils.packages import check_agents

# `agents/__init__.py` may have been overwritten by another distribution. Found out first: the other
# imports take seconds.
check_agents()

from agents.policies.base import POLICIES, SamPolicy, register_policy
from agents.policies.everything import EverythingPolicy
from agents.policies.explicit import ExplicitPolicy
from agents.policies.implicit import ImplicitPolicy
from agents.policies.video import VideoPolicy
from agents.policies.video_prompt import VideoPromptPolicy

# Pickles of stable-baselines3 name classes by module: this one, wherever a class is defined.
for _policy in (
    EverythingPolicy,
    ExplicitPolicy,
    ImplicitPolicy,
    VideoPolicy,
    VideoPromptPolicy,
):
    _policy.__module__ = __name__

__all__ = [
    "POLICIES",
    "EverythingPolicy",
    "ExplicitPolicy",
    "ImplicitPolicy",
    "SamPolicy",
    "VideoPolicy",
    "VideoPromptPolicy",
    "register_policy",
]
