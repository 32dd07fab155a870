"""The interface between commands and environments: a `Task` per environment id."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, ClassVar, TypeVar

import torch

from agents.annotation.clicks import AnnotateConfig
from agents.annotation.folder import Annotator
from agents.baselines.base import Agent, TrainedAgent
from agents.policies import POLICIES, SamPolicy
from agents.ppo.config import TrainPPOConfig
from agents.sharing.markdown import code, one_line
from agents.sharing.run import TrainingRun
from sam_gym.data import DATASETS
from sam_gym.data.streams import Stream
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import DatasetConfig, EnvConfig
from sam_gym.utils.registry import Registry, unknown_name

C = TypeVar("C", bound=EnvConfig)

#: Optional feature -> the command or option that needs it. Policy plots, recalibration and search
#: are made for click policies on a `ClickCore`.
FEATURES = {
    "annotate": "agents.annotate",
    "categories": "--categories",
    "export": "agents.export",
    "hub": "agents.hub push",
    "policy_plots": "--policy-plots",
    "recalibration": "--recalibrate",
    "search": "--search",
}
_WITH_TARGET_MAP = frozenset({"recalibration", "search"})


#: Fields of env configs that depend on the machine, or that `_card_evaluation` handles.
_NOT_OF_THE_AGENT = frozenset(
    {
        *("device", "dtype", "compile", "obs", "cache_mib", "store_gib"),
        *("disk", "disk_dtype", "disk_gib", "split", "data", "checkpoint", "adapter"),
    }
)


@dataclass(frozen=True)
class CardFacts:
    """The parts of a model card that depend on the environment.

    Attributes:
        summary: the first paragraph: what the agent does.
        dataset: name of the training data.
        facts: bullet points: policy, backbone, actions.
        command: a shell command that uses the agent.
        limits: bullet points.
        counts: names in `BaseCore.reported` that the results table shows beside the IoU.
        task_name: name of the task in the model index.
        metric: what the results are, as a sentence begins.
    """

    summary: str
    dataset: str
    facts: Sequence[str]
    command: str
    limits: Sequence[str]
    counts: Sequence[str] = ()
    task_name: str = "interactive segmentation"
    metric: str = "Mean IoU"


@dataclass(frozen=True)
class ExportInput:
    """An input tensor of an exported policy.

    Attributes:
        shape: shape of one row.
        dtype: data type of the tensor.
        meaning: description of the values.
        high: exclusive upper bound of integers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    meaning: str
    high: int = 0


class Task:
    """What training, evaluation, export and sharing need to know about an environment.

    Subclass it, set the class attributes and register an instance in `TASKS` under its
    environment id. The defaults suit an environment over one dataset.
    """

    #: Id of the environment, registered with gymnasium.
    env_id: ClassVar[str]
    #: Dataclass of the environment's arguments.
    config_class: ClassVar[type[EnvConfig]]
    #: Names of the policies for this environment, the default first.
    policies: ClassVar[tuple[str, ...]]
    #: Baseline name -> class, which takes a seed; "random" and "oracle" must be among them.
    baselines: ClassVar[Registry[Callable[[int], Agent]]]
    #: The optional features that it supports, of `FEATURES`.
    supports: ClassVar[frozenset[str]] = frozenset()

    # Checks ------------------------------------------------------------------------------------

    def require(self, feature: str) -> None:
        """Raise `ValueError` unless the task supports a feature of `FEATURES`."""
        if feature not in FEATURES:
            raise unknown_name("feature of a task", feature, FEATURES)
        if feature not in self.supports:
            having = [name for name, task in TASKS.items() if feature in task.supports]
            what = FEATURES[feature]
            remedy = (
                "Leave it out, or pass another --env" if what.startswith("--") else "It does with"
            )
            raise ValueError(
                f"{what} does not work with {self.env_id}. {remedy}: {', '.join(having)}."
            )

    def check_run(self, run: TrainPPOConfig) -> None:
        """Raise `ValueError` for options of a training run that do not fit the environment."""
        if type(run.env_config) is not self.config_class:
            name = self.config_class.__name__
            raise ValueError(
                f"{self.env_id} needs an env_config of class {name}, got "
                f"{type(run.env_config).__name__}. Pass env_config={name}()."
            )
        elsewhere = {name for task in TASKS.values() for name in task.policies}
        if run.policy in elsewhere.difference(self.policies):
            raise ValueError(
                f"The policy {run.policy!r} does not play {self.env_id}. Policies that do: "
                f"{', '.join(self.policies)}. Leave --policy out, or pass another --env."
            )
        if run.recalibrate:
            self.require("recalibration")
        if run.search:
            self.require("search")
        if run.recalibration_updates is not None and not self.supports & _WITH_TARGET_MAP:
            raise ValueError(
                "--recalibration-updates trains a target map, and policies of "
                f"{self.env_id} have none. Leave it out."
            )
        if run.policy_plots:
            self.require("policy_plots")

    # Env configs -------------------------------------------------------------------------------

    def with_categories(self, env_config: C, categories: str | None) -> C:
        """Return the config with the dataset limited to comma-separated categories.

        Raises:
            ValueError: the data has no categories to choose from.
        """
        if categories is None:
            return env_config
        self.require("categories")
        own: Any = env_config
        return replace(own, dataset_kwargs=own.dataset_kwargs | {"categories": categories})

    def training_config(self, run: TrainPPOConfig) -> EnvConfig:
        """Return the env config of the training episodes of a run."""
        env_config = self._handles(run)
        if isinstance(env_config, DatasetConfig) and DATASETS.get(env_config.dataset).procedural:
            kwargs = {"length": run.train_images} | env_config.dataset_kwargs
            return replace(env_config, dataset_kwargs=kwargs)
        return env_config

    def held_out_config(self, run: TrainPPOConfig, split: str | None = None) -> EnvConfig:
        """Return the env config of evaluations on data that training never sees.

        Args:
            run: the training run.
            split: of the data (default: that of `run.held_out`, or of the dataset).
        """
        split = split or run.held_out or run.env_config.held_out_split
        return replace(self._handles(run), split=split)

    def _handles(self, run: TrainPPOConfig) -> EnvConfig:
        return self.with_categories(replace(run.env_config, obs="handle"), run.categories)

    def scored_at(self, env_config: C, score: str) -> C:
        """Return the config with the IoU scored at "low" or "full" size, if there is a choice."""
        return env_config

    def env_config_for(self, agent: Agent, env_config: C) -> C:
        """Return the config under which an agent plays: the given one, or the one it needs."""
        own = getattr(agent, "env_config_for", None)
        return env_config if own is None else own(env_config)

    # Episodes ----------------------------------------------------------------------------------

    def stream(self, env_config: EnvConfig) -> Stream | None:
        """Return the stream of domains that the config names, validated; None without one.

        Hold the stream to keep environments from opening it again.
        """
        return None

    def share_episodes(self, env_config: C, episodes: int, num_envs: int) -> tuple[C, int, int]:
        """Divide the episodes of an evaluation evenly among sub-environments.

        Args:
            env_config: of the evaluation.
            episodes: minimum number of episodes.
            num_envs: maximum number of sub-environments.

        Returns:
            The config to play with, the sub-environments, and the episodes of each of them.
        """
        num_envs = min(num_envs, episodes)
        return env_config, num_envs, -(-episodes // num_envs)

    def reset_options(self, core: BaseCore[Any, Any]) -> dict[str, Any]:
        """Return reset options with which a few episodes cover as much of the data as possible."""
        return {}

    # Policies and results ----------------------------------------------------------------------

    def policy_arguments(
        self, run: TrainPPOConfig, env_config: EnvConfig, core: BaseCore[Any, Any]
    ) -> dict[str, Any]:
        """Return the keyword arguments of the run's policy, JSON-plain.

        Args:
            run: the training run.
            env_config: of the training episodes.
            core: made from it.
        """
        raise NotImplementedError

    def compare(self, results: dict[str, Any], names: Sequence[str]) -> list[str]:
        """Add comparisons between agents to their results.

        Args:
            results: summaries by name of agent or baseline, changed in place.
            names: the agents and baselines among them.

        Returns:
            Lines to print.
        """
        return []

    def players(self, env_config: EnvConfig) -> dict[str, Callable[[int], Agent]]:
        """Return the baselines that play under an env config, by name."""
        return dict(self.baselines.items())

    def make_annotator(
        self, agent: TrainedAgent, categories: Sequence[str], config: AnnotateConfig
    ) -> Annotator:
        """Return an annotator that runs a trained agent; needed for "annotate".

        Args:
            agent: the agent.
            categories: categories to annotate.
            config: options of the command.

        Raises:
            ValueError: the agent cannot annotate these categories.
        """
        raise NotImplementedError

    def export_inputs(self, policy: SamPolicy) -> dict[str, ExportInput]:
        """Return the observations that an exported policy takes, by name; needed for "export"."""
        raise NotImplementedError

    def export_facts(self, policy: SamPolicy) -> dict[str, Any]:
        """Return what users of an exported policy need to know about its actions; JSON-plain."""
        raise NotImplementedError

    def card_facts(self, run: TrainingRun, policy: str) -> CardFacts:
        """Return the parts of a model card that depend on the environment.

        Args:
            run: the training run.
            policy: name of the published policy: hf://USER/NAME.
        """
        own = run.config["env_config"]
        default = json.loads(json.dumps(asdict(self.config_class())))
        changed = [
            name
            for name in default
            if name not in _NOT_OF_THE_AGENT
            if name in ("dataset", "backbone") or own.get(name, default[name]) != default[name]
        ]
        return CardFacts(
            summary=f"An agent that plays `{self.env_id}` with a Segment Anything Model (SAM).",
            dataset=own.get("dataset", self.env_id),
            facts=self._card_basics(run.config),
            command=self._card_evaluation(run, policy, *changed),
            limits=self._card_limits(own),
            task_name="segmentation",
        )

    def _card_evaluation(self, run: TrainingRun, policy: str, *options: str) -> str:
        """Return the shell command that evaluates a published agent in its own environment.

        Args:
            run: the training run.
            policy: name of the published policy.
            *options: fields of the env config that the agent depends on.
        """
        own, given = run.config["env_config"], []
        for name in options:
            flag, value = name.replace("_", "-"), own[name]
            if isinstance(value, bool):
                given.append(f"--{'' if value else 'no-'}{flag}")
            else:
                parts: Any = [value] if isinstance(value, list) else [(value,)]
                parts = value.items() if isinstance(value, Mapping) else parts
                given.append(shell_option(flag, *(x for part in parts for x in part)))
        if "dataset" in own and DATASETS.get_from_file(own["dataset"]).reads_files:
            given.append("--data PATH")
        given += [f"--{name} PATH" for name in ("checkpoint", "adapter") if own[name] is not None]
        command = f"python -m agents.evaluate --policy {policy} {' '.join(given)}"
        split = shell_option("split", run.results["held_out_split"])
        return f"{command} {split} --env {self.env_id}"

    def _card_basics(self, config: Mapping[str, Any]) -> list[str]:
        return [
            f"**Policy**: {code(config['policy'])}{self._card_policy(config)}.",
            f"**Backbone**: {code(config['env_config']['backbone'])}, frozen; its weights are not "
            "in this repo.",
        ]

    def _card_policy(self, config: Mapping[str, Any]) -> str:
        """Return a clause on the policy, with a leading comma, or nothing."""
        return ""

    def _card_limits(self, own: Mapping[str, Any]) -> list[str]:
        limits = ["It depends on SAM: it cannot segment what SAM does not segment for any prompt."]
        if "dataset" in own and DATASETS.get_from_file(own["dataset"]).procedural:
            limits.append("It was trained on procedural drawings, never on photographs.")
        if own["backbone"].removesuffix("-v0").endswith("micro"):
            limits.append(
                f"{code(own['backbone'])} is a demonstration model, far from SAM on photographs."
            )
        if own["checkpoint"] is not None:
            limits.append(
                f"Its SAM had the weights of a file, {code(PurePath(own['checkpoint']).name)}: the "
                "agent loads only where that file lies at the same path."
            )
        return limits


def shell_option(flag: str, *values: object) -> str:
    """Return an option of a shell command; a value cannot become another option or command."""
    words = [one_line(value) for value in values]
    if len(words) == 1 and words[0].startswith("-"):
        return shlex.quote(f"--{flag}={words[0]}")
    return shlex.join([f"--{flag}", *words])


#: Environment id -> task.
TASKS: Registry[Task] = Registry("environment")


def task_of(env_id: str) -> Task:
    """Return the task of an environment.

    Raises:
        ValueError: no task is registered under this id; lists the valid ids.
    """
    return TASKS.get(env_id)


def names_by_environment(names_of: Callable[[Task], Iterable[str]]) -> str:
    """Return names that tasks have, for help texts, each list with its environments.

    Args:
        names_of: a task -> its names.
    """
    ids: dict[str, list[str]] = {}
    for env_id, task in TASKS.items():
        ids.setdefault(", ".join(names_of(task)), []).append(env_id)
    return "; ".join(f"{names} ({', '.join(own)})" for names, own in ids.items())


def tasks_of_policy(policy: SamPolicy) -> list[Task]:
    """Return the tasks that list a policy, or else the nearest class that it is derived from."""
    for kind in type(policy).__mro__:
        name = POLICIES.name_of(kind)
        if tasks := [task for task in TASKS.values() if name in task.policies]:
            return tasks
    return []


def task_of_policy(policy: SamPolicy) -> Task:
    """Return the first task that lists a policy.

    Raises:
        ValueError: no task lists this policy.
    """
    if tasks := tasks_of_policy(policy):
        return tasks[0]
    name = type(policy).__name__
    raise ValueError(f"{name} is a policy of none of: {', '.join(TASKS.names())}.")


def check_plays(policy: SamPolicy, config: EnvConfig) -> None:
    """Raise `ValueError` if a policy belongs to other environments than the one of a config.

    A policy that no task lists, or an environment without a task, is not checked.
    """
    playing = [task.env_id for task in tasks_of_policy(policy)]
    here = [task.env_id for task in TASKS.values() if type(config) is task.config_class]
    if playing and here and not set(playing) & set(here):
        raise ValueError(
            f"{type(policy).__name__} does not play {here[0]}. "
            f"Pass --env {' or --env '.join(playing)}."
        )


def register(task: type[Task]) -> type[Task]:
    """Register a task under its environment id (class decorator)."""
    TASKS.add(task.env_id, task())
    return task


def backbone_arguments(env_config: EnvConfig) -> dict[str, Any]:
    """Return the arguments of `load_backbone` that make the backbone of an environment."""
    same = ("checkpoint", "device", "dtype", "compile", "adapter")
    return {"name": env_config.backbone} | {name: getattr(env_config, name) for name in same}
