"""Docstrings of dataclasses that list the fields."""

import ast
import pydoc
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from adaptation.options import TrainConfig
from agents.ppo.config import TrainPPOConfig
from sam_gym import GeneratorOptions
from sam_gym.envs.click import ClickConfig, SamSegConfig
from sam_gym.utils.fields import documented, text_of

ROOT = Path(__file__).parents[2]


@documented
@dataclass
class Plain:
    """What it is.

    More of it.
    """

    first: int
    """The first one,
    on two lines."""
    unsaid: int = 2
    last: str = "a"
    """The last one."""


@documented
@dataclass
class Derived(Plain):
    """Another."""

    last: str = "b"
    """Another last one."""
    new: float = 0.5
    """Its own."""


def test_the_docstring_lists_described_fields() -> None:
    assert Plain.__doc__ == (
        "What it is.\n\nMore of it.\n\nAttributes:\n"
        "    first: The first one, on two lines.\n    last (default 'a'): The last one."
    )
    assert text_of(Plain) == "What it is.\n\nMore of it."


def test_a_subclass_lists_inherited_fields() -> None:
    lines = str(Derived.__doc__).splitlines()
    assert lines[0] == "Another." and lines[2:] == [
        "Attributes:",
        "    first: The first one, on two lines.",
        "    last (default 'b'): Another last one.",
        "    new (default 0.5): Its own.",
    ]


@pytest.mark.parametrize(
    ("config", "sentences"),
    [
        (ClickConfig, ["reward (default 'iou_gain'): Reward name", "grid (default 16): Prompts"]),
        (
            SamSegConfig,
            ["dataset (default 'scenes'): Dataset name: ", "SAM to prompt: "],
        ),
        (TrainPPOConfig, ["gamma (default 0.8): Discount factor", "env (default 'SamSeg-v0')"]),
        (TrainConfig, ["seed (default 0): Seed of weights"]),
        (GeneratorOptions, ["box_nms_thresh (default 0.7): Box IoU above"]),
    ],
)
def test_help_describes_the_fields(config: type, sentences: list[str]) -> None:
    shown = pydoc.render_doc(config, renderer=pydoc.plaintext)
    assert all(sentence in shown for sentence in sentences)


def test_all_dataclasses_with_described_fields_list_them() -> None:
    missing = []
    for path in (
        p
        for name in ("sam_gym", "agents", "adaptation", "benchmarks")
        for p in (ROOT / name).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            decorators = [ast.unparse(own).partition("(")[0] for own in node.decorator_list]
            described = any(
                isinstance(item, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                for item, below in pairwise(node.body)
            )
            # `Range` is made of numbers, not by users.
            if described and decorators[-1:] == ["dataclass"] and node.name != "Range":
                missing += [] if decorators[0] == "documented" else [f"{path}: {node.name}"]
    assert not missing
