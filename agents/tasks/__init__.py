"""Tasks: the interface between commands and environments.

`TASKS` maps environment ids to tasks. To make the commands work with another environment,
register it with gymnasium, then a subclass of `Task` with `register`.
"""

from agents.tasks import click, continual, everything, video
from agents.tasks.base import (
    FEATURES,
    TASKS,
    CardFacts,
    ExportInput,
    Task,
    check_plays,
    names_by_environment,
    register,
    task_of,
    task_of_policy,
)

__all__ = [
    "FEATURES",
    "TASKS",
    "CardFacts",
    "ExportInput",
    "Task",
    "check_plays",
    "click",
    "continual",
    "everything",
    "names_by_environment",
    "register",
    "task_of",
    "task_of_policy",
    "video",
]
