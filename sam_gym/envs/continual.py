"""`SamContinual-v0`: the click task over a stream of domains that come one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
from gymnasium import spaces

from sam_gym.data.base import Dataset, Sample
from sam_gym.data.streams import Stream, make_stream
from sam_gym.envs.click import EPISODE_ARRAYS, ClickConfig, ClickCore, SamSegEnv, SamSegVectorEnv
from sam_gym.utils.registry import unknown_name

BOUNDARIES = ("announced", "hidden")

#: Streams that somebody holds, by their settings: opening one of files reads all its masks.
_OPEN: WeakValueDictionary[str, Stream] = WeakValueDictionary()


@dataclass(frozen=True)
class _StreamFields:
    """Which domains come, and when; a class apart, so that its fields come first."""

    stream: str = "scenes-domains"
    """Stream name: scenes-domains, folders."""
    data: str | list[str] | None = None
    """Folders of a stream that reads files: a list, or one text with commas."""
    order: str | list[str] | None = None
    """Names of all domains in the order in which they come (a list, or one text with commas), or
    random:SEED (default: the stream's own order)."""
    stream_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """More options of the stream, for example {"domains": "cells,night", "train_images": 256}."""
    episodes_per_domain: int | None = 20
    """Episodes of an environment before its next domain; None: only on request. A training shares
    its steps out evenly instead."""
    cycle: bool = False
    """After the last domain, begin again with the first instead of staying."""
    boundaries: Literal["announced", "hidden"] = "announced"
    """Report the domain and its first episode in `info`, or nothing that tells the domain."""
    observe_task: bool = False
    """Add the number of the domain to observations, as `task_id`."""


@dataclass(frozen=True)
class ContinualConfig(ClickConfig, _StreamFields):
    """Settings of `SamContinual-v0`, all JSON-plain."""

    target: Literal["category", "instance"] = "instance"
    """What to segment: all objects of an image, or one object shown by a cue click."""

    def validate(self) -> None:
        super().validate()
        if self.boundaries not in BOUNDARIES:
            raise unknown_name("boundaries", self.boundaries, BOUNDARIES)
        if self.episodes_per_domain is not None and self.episodes_per_domain < 1:
            raise ValueError(
                "episodes_per_domain must be at least 1, or None for domains that change on "
                f"request only, got {self.episodes_per_domain}."
            )
        for name, own in (("name", "stream"), ("data", "data"), ("order", "order")):
            if name in self.stream_kwargs:
                raise ValueError(f"stream_kwargs may not hold {name!r}: use {own}= instead.")

    def open_stream(self) -> Stream:
        """The stream, validated, and the same one while somebody holds it; raises as `make_stream`
        does."""
        key = repr((self.stream, self.data, self.order, sorted(self.stream_kwargs.items())))
        stream = _OPEN.get(key)
        if stream is None:
            stream = make_stream(self.stream, self.data, self.order, **self.stream_kwargs)
            _OPEN[key] = stream
        return stream

    def open_dataset(self) -> StreamDataset:
        """The split of all domains; raises as `make_stream` does."""
        return StreamDataset(self.open_stream(), self.split)


class StreamDataset:
    """One split of all domains of a stream as one dataset, domain after domain.

    Args:
        stream: the domains.
        split: "train", "val" or "test".

    Raises:
        ValueError: a domain lacks the split, or the domains do not share their categories.
    """

    def __init__(self, stream: Stream, split: str) -> None:
        self.stream, self.name = stream, stream.name
        self.parts: list[Dataset] = [domain.split(split) for domain in stream]
        self.categories = self.parts[0].categories
        for domain, part in zip(stream, self.parts, strict=True):
            if part.categories != self.categories:
                raise ValueError(
                    f"Domain {domain.name!r} has the categories {part.categories}, "
                    f"{stream[0].name!r} has {self.categories}: an observation would tell the "
                    'domain. Give all the same, for example ("object",).'
                )
        lengths = [len(part) for part in self.parts]
        #: Index of the first sample of each domain.
        self.firsts = np.cumsum([0, *lengths[:-1]])
        self._length = sum(lengths)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} is not in range({self._length}).")
        part = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.parts[part][index - int(self.firsts[part])]

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw a domain, and an image of it."""
        return self.draw_from(int(rng.integers(len(self.parts))), rng)

    def draw_from(self, task: int, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image of a domain, as its own dataset does."""
        index, category = self.parts[task].draw(rng)
        return int(self.firsts[task]) + index, category


class ContinualCore(ClickCore):
    """The click task in slots that walk through the domains of a stream, each at its own pace.

    Args:
        config: the settings.
        num_envs: how many episodes run side by side.

    Raises:
        ValueError, FileNotFoundError: a setting, the stream or the checkpoint is wrong.
    """

    config: ContinualConfig
    dataset: StreamDataset
    episode_arrays = (*EPISODE_ARRAYS, "tasks", "played", "requested", "boundaries")

    def __init__(self, config: ContinualConfig, num_envs: int) -> None:
        super().__init__(config, num_envs)
        #: Domain of the episode of each slot.
        self.tasks = np.zeros(num_envs, np.int64)
        #: Episodes of each slot since it came to its domain, with the present one.
        self.played = np.zeros(num_envs, np.int64)
        #: Domain that was asked for, for the next episode of each slot; -1: none.
        self.requested = np.full(num_envs, -1, np.int64)
        #: Whether the episode of each slot is its first since the domain changed.
        self.boundaries = np.zeros(num_envs, bool)

    @property
    def stream(self) -> Stream:
        """The domains, in order."""
        return self.dataset.stream

    def request(self, tasks: Any, slots: Sequence[int] | None = None) -> None:
        """Let the next episodes of slots be of certain domains; their schedule goes on from there.

        Args:
            tasks: a number of a domain, or int (num_envs,).
            slots: which of them are meant; None: all.

        Raises:
            ValueError: not such numbers, or there is no such domain.
        """
        wanted, count = np.asarray(tasks), len(self.stream)
        if wanted.shape not in ((), (self.num_envs,)) or wanted.dtype.kind not in "iu":
            raise ValueError(
                f"Expected a task as a whole number, or {self.num_envs} of them for as many "
                f"environments, got {tasks!r}."
            )
        if wanted.min() < 0 or wanted.max() >= count:
            raise ValueError(
                f"Task {tasks} is out of range: expected 0 to {count - 1} "
                f"({', '.join(self.stream.names)})."
            )
        index = np.arange(self.num_envs) if slots is None else np.asarray(slots)
        self.requested[index] = np.broadcast_to(wanted, (self.num_envs,))[index]

    def advance(self) -> None:
        """Let the next episode of each slot be of the domain after the one it is in, or asked for;
        after the last one, see `cycle`."""
        here = np.where(self.requested >= 0, self.requested, self.tasks)
        self.request(self._after(here))

    def _after(self, tasks: np.ndarray) -> np.ndarray:
        last = len(self.stream) - 1
        return np.where(tasks < last, tasks + 1, 0 if self.config.cycle else last)

    def plan(self, slots: Sequence[int], seeded: Sequence[int], options: Mapping[str, Any]) -> None:
        if options.get("task") is not None:
            self.request(options["task"], slots)
        self.tasks[list(seeded)] = self.played[list(seeded)] = 0

    def _upcoming(self, slots: Sequence[int]) -> list[int]:
        index, limit = np.asarray(slots), self.config.episodes_per_domain
        tasks, requested = self.tasks[index], self.requested[index]
        is_over = np.zeros(len(index), bool) if limit is None else self.played[index] >= limit
        scheduled = np.where(is_over, self._after(tasks), tasks)
        return np.where(requested >= 0, requested, scheduled).tolist()

    def _enter(self, slots: Sequence[int]) -> None:
        index, upcoming = np.asarray(slots), np.array(self._upcoming(slots))
        moved = (self.played[index] == 0) | (upcoming != self.tasks[index])
        begins = moved | (self.requested[index] >= 0)
        self.played[index] = np.where(begins, 1, self.played[index] + 1)
        self.tasks[index], self.boundaries[index] = upcoming, moved
        self.requested[index] = -1

    def _choose(self, rng: np.random.Generator, part: int) -> tuple[int, int | None]:
        return self.dataset.draw_from(part, rng)

    def _name_of(self, part: int) -> str:
        return f"{self.stream.name}, domain {self.stream.names[part]!r}"

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        # The targets are drawn once more, from the domains of then.
        self.request([int(row["tasks"]) for row in state])
        super().set_state(state, rngs)

    def _make_observation_space(self) -> spaces.Dict:
        entries = dict(super()._make_observation_space())
        if self.config.observe_task:
            entries["task_id"] = spaces.Discrete(len(self.stream))
        return spaces.Dict(entries)

    def _entries(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        return super()._entries(slots) | {"task_id": self.tasks[slots]}

    def info(self, slots: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        slots = np.asarray(slots)
        tasks, names = self.tasks[slots], self.stream.names
        info = super().info(slots)
        if self.config.boundaries == "hidden":
            del info["source"]  # begins with the name of the domain
            return info
        return info | {
            "task_id": tasks,
            "domain": np.array([names[task] for task in tasks], object),
            "boundary": self.boundaries[slots],
        }

    def _caption(self, slot: int) -> str:
        return f"{self.stream.names[self.tasks[slot]]}: {super()._caption(slot)}"


class _OverStream:
    """What the scalar and the vector environment have in common."""

    env_id = "SamContinual-v0"
    config_class: type[ClickConfig] = ContinualConfig
    core_class: type[ClickCore] = ContinualCore
    core: Any

    @property
    def stream(self) -> Stream:
        """The domains, in the order in which they come."""
        return self.core.stream

    def advance(self) -> None:
        """Go to the next domain with the next reset; of many environments, each with its own."""
        self.core.advance()

    def set_task(self, task: Any) -> None:
        """Go to a domain with the next reset; of many environments, each with its own.

        Args:
            task: number of the domain in `stream`; of a vector environment also int (num_envs,).

        Raises:
            ValueError: there is no such domain.
        """
        self.core.request(task)


class SamContinualEnv(_OverStream, SamSegEnv):
    """Segment objects by clicking a Segment Anything Model, in one domain after the other.

    ## Description

    The click task of `SamSeg-v0` over a stream of domains, for continual learning: after
    `episodes_per_domain` episodes, the images are those of the next domain. An image and a cue
    click on one of its objects are given; the aim is a mask of that object (`target="instance"`),
    or of all objects (`target="category"`). The domains share one category, "object", so an
    observation does not tell which domain it is from.

    ## Action Space

    That of `SamSeg-v0`: `Discrete(2 * grid * grid [+ 1] [+ 1])`, positive clicks, negative clicks,
    stop (with `stop=True`) and undo (with `undo=True`).

    ## Observation Space

    The `Dict` of `SamSeg-v0`, of which `target_category` is always 0, and with `observe_task=True`:

    | key       | space                       | meaning                              |
    |-----------|-----------------------------|--------------------------------------|
    | `task_id` | Discrete(number of domains) | the domain, as a number in `stream`  |

    ## Rewards

    Those of `SamSeg-v0`.

    ## Starting State

    No clicks and an empty mask. Image and object are drawn from the current domain with the
    environment's own random generator.

    A reset without a seed is the next episode of the schedule. A reset with a seed is the start of
    the stream: the first domain, with no episodes played, whatever came before, so that a seed
    alone decides all that follows. After the last domain, the environment stays there, or begins
    again with the first (`cycle=True`).

    `env.unwrapped.advance()`, `env.unwrapped.set_task(k)` and `reset(options={"task": k})` ask for
    another domain. It comes with the next reset, seeded or not, and counts as the start of that
    domain: the schedule goes on from there. With `episodes_per_domain=None`, nothing else changes
    the domain.

    ## Episode End

    That of `SamSeg-v0`: *terminated* by `stop` or at the `iou_target`, *truncated* after
    `max_steps` actions. The end of a domain ends no episode.

    ## Information

    That of `SamSeg-v0`. With `boundaries="announced"` also `domain` (its name), `task_id` (its
    index in `stream`) and `boundary`: whether the episode is the first of the environment, or the
    first since the domain changed. With `boundaries="hidden"`, `info` holds nothing that tells the
    domain: these keys and `source` are missing. Evaluation always announces boundaries.

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamContinual-v0", episodes_per_domain=20, render_mode="rgb_array")
    print(env.unwrapped.stream.names)
    ```

    All arguments are the fields of `ContinualConfig`: those of `SamSeg-v0` but for its dataset, and
    `stream`, `data`, `order`, `stream_kwargs`, `episodes_per_domain`, `cycle`, `boundaries` and
    `observe_task`. In the vector environment,
    `gym.make_vec("SamContinual-v0", num_envs=64, vectorization_mode="vector_entry_point")`, every
    environment counts its own episodes.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **settings: fields of `ContinualConfig`.

    Raises:
        ValueError: unknown name or impossible value, or data that does not validate.
        FileNotFoundError: a file is missing.
    """

    @property
    def task(self) -> int:
        """Number of the domain of the episode."""
        return int(self.core.tasks[0])


class SamContinualVectorEnv(_OverStream, SamSegVectorEnv):
    """`SamContinual-v0` with many environments that share one SAM decode per step.

    Sub-environment `i` seeded with `seed` plays as the scalar environment seeded with `seed + i`,
    and counts its own episodes. `options={"task": k}` of `reset`, with a number or with int
    (num_envs,), holds for the environments that are reset.

    Args:
        num_envs: how many environments.
        render_mode: None, "rgb_array" (one frame per environment) or "human" (all in one window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **settings: fields of `ContinualConfig`; see `SamContinualEnv`.
    """

    @property
    def task(self) -> np.ndarray:
        """Number of the domain of each environment's episode: int64 (num_envs,)."""
        return self.core.tasks.copy()
