"""Types, ranges and finiteness of settings: of every config in the packages, field by field."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import adaptation
import agents
import benchmarks
import sam_gym
from adaptation.options import TrainConfig
from adaptation.strategy import STRATEGIES
from agents.annotate import AnnotateConfig, annotate
from agents.annotation.everything import AnnotateEverythingConfig, annotate_everything
from agents.clip.train import TrainClipConfig
from agents.clip.train import train as train_clip
from agents.evaluate import evaluate, load_agent
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train
from benchmarks.run import BENCHMARKS, load
from sam_gym.backbones.embeddings.precompute import PrecomputeConfig, precompute
from sam_gym.backbones.micro.train import TrainMicroConfig
from sam_gym.backbones.micro.train import train as train_micro
from sam_gym.data import make_dataset
from sam_gym.data.streams import make_stream
from sam_gym.envs.click import SamSegConfig
from sam_gym.utils import cli
from sam_gym.utils.settings import Count, Fraction, NotNegative, check_settings, checked, real


def configs() -> list[type]:
    """All dataclasses of options in the packages, and those of the adaptation methods."""
    found = {method.Options for _, method in STRATEGIES.items()}
    for package in (sam_gym, agents, adaptation, benchmarks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name == "agents.zoo":  # needs RL Zoo
                continue
            for name, item in vars(importlib.import_module(module.name)).items():
                if name.endswith(("Config", "Options")) and is_dataclass(item):
                    found.add(item)
    return sorted(found, key=lambda own: (own.__module__, own.__qualname__))


def kinds(hint: Any) -> set[Any]:
    """The plain types in a hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kinds(args[0])
    if origin in (Union, UnionType):
        return set().union(*map(kinds, args))
    if origin is Literal:
        return {Literal}
    return {origin or hint}


def wrong_values(hint: Any) -> list[Any]:
    """Values that a field of this type must refuse, whatever its range."""
    own, (nan, inf) = kinds(hint), (float("nan"), float("inf"))
    if Any in own:
        return []
    wrong: list[Any] = [nan, inf, -inf, object]
    wrong += [] if own & {int, float} else [3]
    wrong += [-2] if own & {int, float} else []
    wrong += [] if float in own else [2.5]
    wrong += [] if str in own else ["nonsense"]
    wrong += [] if bool in own else [True]
    wrong += [] if NoneType in own else [None]
    wrong += [] if own & {list, tuple} else [[0]]
    return wrong


def example(config: type) -> Any:
    """An instance of a config, with something for fields without a default."""
    hints = get_type_hints(config, include_extras=True)
    values = {list: [], tuple: (), int: 64, str: "something"}

    def value(hint: Any) -> Any:
        if get_origin(hint) is Literal:
            return get_args(hint)[0]
        return next(values[kind] for kind in values if kind in kinds(hint))

    return config(
        **{
            own.name: value(hints[own.name])
            for own in fields(config)
            if own.default is MISSING and own.default_factory is MISSING
        }
    )


@pytest.mark.parametrize("config", configs(), ids=lambda own: f"{own.__module__}.{own.__name__}")
def test_every_field_refuses_wrong_values(config: type) -> None:
    right = example(config)
    check_settings(right)
    hints = get_type_hints(config, include_extras=True)
    for name in (own.name for own in fields(config)):
        for wrong in wrong_values(hints[name]):
            if (name, wrong) == ("min_score", -2):  # predicted IoUs may be negative
                continue
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                check_settings(replace(right, **{name: wrong}))
                pytest.fail(f"{name}={wrong!r} is accepted")


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (train, TrainPPOConfig()),
        (annotate, AnnotateConfig(images="", policy="", categories="star")),
        (annotate_everything, AnnotateEverythingConfig(images="")),
        (precompute, PrecomputeConfig()),
        (train_micro, TrainMicroConfig()),
        (train_clip, TrainClipConfig()),
        *((load(name)[0], example(load(name)[1])) for name in BENCHMARKS),
    ],
    ids=lambda own: getattr(own, "__module__", ""),
)
def test_commands_check_before_they_work(command: Callable[[Any], Any], config: Any) -> None:
    with pytest.raises(ValueError, match=r"out must be text.*, got 3|disk_gib must be positive"):
        command(replace(config, **({"out": 3} if hasattr(config, "out") else {"disk_gib": 0.0})))


@dataclass
class Inner:
    share: Fraction = 0.5


@dataclass
class Example:
    count: Count = 1
    cost: NotNegative = 0.0
    limit: Annotated[float, real(above=0, high=1)] | None = None
    sizes: tuple[Count, ...] = (1,)
    pair: tuple[int, int] | None = None
    mode: Literal["low", "full"] = "low"
    flag: bool = False
    names: str | list[str] | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count must be at least 1, got 0."),
        ("count", 2.5, "count must be a whole number, got 2.5."),
        ("count", "2", "count must be a whole number, got '2'."),
        ("cost", float("inf"), "cost must be a finite number, got inf."),
        ("limit", 1.5, "limit must be positive and at most 1, got 1.5."),
        ("limit", "high", "limit must be a finite number or None, got 'high'."),
        ("sizes", (1, 0), "sizes must be at least 1, got 0."),
        ("sizes", 3, "sizes must be a list, got 3."),
        ("pair", (1,), "pair must be 2 values or None, got (1,)."),
        ("mode", "ful", "Unknown mode 'ful'. Did you mean 'full'? Valid names: full, low."),
        ("flag", "no", "flag must be True or False, got 'no'."),
        ("flag", 1, "flag must be True or False, got 1."),
        ("names", ["a", 3], "names must be text, got 3."),
        ("inner", Inner(1.5), "share must be from 0 to 1, got 1.5."),
    ],
)
def test_messages(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_settings(Example(**{name: value}))
    assert str(error.value) == message


def test_numpy_numbers_and_lists_are_values() -> None:
    check_settings(
        Example(count=np.int64(3), cost=np.float32(1), sizes=[2, 3], pair=[1, 2], flag=np.True_)  # type: ignore[arg-type]
    )


def test_options_of_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^--count must be at least 1, got 0\.$"):
        cli.parse(Example, "example", ["--count", "0"])
    with pytest.raises(ValueError, match=r"^--cost must be a finite number, got nan\.$"):
        cli.parse(Example, "example", ["--cost", "nan"])
    assert cli.parse(Example, "example", ["--limit", "0.5", "--sizes", "2", "3"]).sizes == (2, 3)
    with pytest.raises(SystemExit):
        cli.parse(Example, "example", ["--help"])
    shown = capsys.readouterr().out
    assert "--count INT>=1" in shown and "FLOAT>0,<=1" in shown


def test_arguments_of_functions() -> None:
    @checked
    def function(first: Count, *rest: int, second: float = 1.0, **more: Any) -> float:
        return first + second

    assert function(1, 2, second=2, other="x") == 3
    with pytest.raises(ValueError, match="first must be at least 1, got 0"):
        function(0)
    with pytest.raises(ValueError, match="second must be a finite number, got nan"):
        function(1, second=float("nan"))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_dataset, {"name": "scenes", "length": 2.5}, "length must be a whole number"),
        (make_dataset, {"name": "rooms", "seed": "1"}, "seed must be a whole number, got '1'"),
        (make_stream, {"train_images": float("inf")}, "train_images must be a whole number"),
        (make_stream, {"seed": True}, "seed must be a whole number, got True"),
    ],
)
def test_options_of_data(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_evaluation() -> None:
    for wrong in ({"episodes": 0}, {"num_envs": 0}, {"num_envs": 2.5}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            evaluate(load_agent("random"), SamSegConfig(device="cpu"), **wrong)  # type: ignore[arg-type]


def test_training_without_a_final_evaluation() -> None:
    for name, value in (("final_episodes", 0), ("gamma", 5.0), ("total_timesteps", -5)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            replace(TrainPPOConfig(), **{name: value}).validate()
    with pytest.raises(ValueError, match="disk is empty"):
        TrainConfig(disk="").validate()
    with pytest.raises(ValueError, match="prompts is empty"):
        TrainConfig(prompts=()).validate()
