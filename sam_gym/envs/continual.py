"""`SamContinual-v0`: the click task over a stream of domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
from gymnasium import spaces

from sam_gym.data.base import Dataset, Sample
from sam_gym.data.io import OnError
from sam_gym.data.streams import Stream, make_stream
from sam_gym.envs.click import EPISODE_ARRAYS, ClickConfig, ClickCore, SamSegEnv, SamSegVectorEnv
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count

#: Streams in use, by their arguments: opening a stream of files reads all its masks.
_OPEN: WeakValueDictionary[str, Stream] = WeakValueDictionary()


@documented
@dataclass(frozen=True, kw_only=True)
class ContinualConfig(ClickConfig):
    """Arguments of `SamContinual-v0`."""

    target: Literal["category", "instance"] = "instance"
    """Target: all objects of an image, or one object shown by a cue click."""
    stream: str = "scenes-domains"
    """Stream name: scenes-domains, folders."""
    data: str | list[str] | None = None
    """Folders of a stream that reads files, as a list or comma-separated."""
    on_error: OnError = "raise"
    """Stop at the first invalid image of such a stream, or skip and count them."""
    order: str | list[str] | None = None
    """Order of the domains: all names, as a list or comma-separated, or random:SEED (None: the
    stream's own order)."""
    stream_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """More options of the stream, in Python a dict: --stream-kwargs domains cells,night
    train_images 256."""
    episodes_per_domain: Count | None = 20
    """Episodes before the next domain; None: change on request only. Training divides its steps
    evenly instead."""
    cycle: bool = False
    """After the last domain, continue with the first instead of staying."""
    boundaries: Literal["announced", "hidden"] = "announced"
    """Report the domain and its first episode in `info`, or nothing that tells the domain."""
    observe_task: bool = False
    """Add the index of the domain to observations, as `task_id`, whatever `boundaries` says."""

    def validate(self) -> None:
        super().validate()
        own_names = {"name": "stream", "data": "data", "order": "order", "on_error": "on_error"}
        for name, own in own_names.items():
            if name in self.stream_kwargs:
                raise ValueError(f"stream_kwargs may not hold {name!r}: use {own}= instead.")

    def open_stream(self) -> Stream:
        """Open the stream, or return the open one while it is referenced; raises as `make_stream`
        does."""
        options: dict[str, Any] = {"on_error": self.on_error} | self.stream_kwargs
        given = (self.stream, self.data, self.order)
        key = repr((*given, sorted(options.items())))
        stream = _OPEN.get(key)
        if stream is None:
            stream = make_stream(*given, **options)
            _OPEN[key] = stream
        return stream

    def open_dataset(self) -> StreamDataset:
        """Open the split of all domains; raises as `make_stream` does."""
        return StreamDataset(self.open_stream(), self.split)


class StreamDataset:
    """One split of all domains of a stream, concatenated to one dataset.

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
                    f"{stream[0].name!r} has {self.categories}: observations would reveal the "
                    'domain. Give all domains the same, for example ("object",).'
                )
        lengths = [len(part) for part in self.parts]
        #: Index of the first sample of each domain.
        self.firsts = np.cumsum([0, *lengths[:-1]])
        self._length = sum(lengths)

    @property
    def files(self) -> list[str]:
        """Paths of the image files."""
        return [path for part in self.parts for path in getattr(part, "files", ())]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} is not in range({self._length}).")
        part = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.parts[part][index - int(self.firsts[part])]

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw a domain, then an image of it."""
        return self.draw_from(int(rng.integers(len(self.parts))), rng)

    def draw_from(self, task: int, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image of a domain, as the domain's dataset does."""
        index, category = self.parts[task].draw(rng)
        return int(self.firsts[task]) + index, category


class ContinualCore(ClickCore):
    """The click task over the domains of a stream; each sub-environment has its own schedule.

    Arguments as for `BaseCore`, without a dataset.
    """

    config: ContinualConfig
    dataset: StreamDataset
    reset_options = ("index", "task")
    episode_arrays = (*EPISODE_ARRAYS, "tasks", "played", "requested", "boundaries")

    def __init__(self, config: ContinualConfig, num_envs: int) -> None:
        super().__init__(config, num_envs)
        #: Domain of each episode.
        self.tasks = np.zeros(num_envs, np.int64)
        #: Episodes since the domain began, including the current one.
        self.played = np.zeros(num_envs, np.int64)
        #: Domain requested for the next episode; -1: none.
        self.requested = np.full(num_envs, -1, np.int64)
        #: Whether the episode is the first since the domain changed.
        self.boundaries = np.zeros(num_envs, bool)

    @property
    def stream(self) -> Stream:
        """The domains, in order."""
        return self.dataset.stream

    def request(self, tasks: Any, indices: Sequence[int] | None = None) -> None:
        """Request the domain of the next episodes; the schedule continues from there.

        Args:
            tasks: index of a domain, or int (num_envs,).
            indices: sub-environments concerned (None: all).

        Raises:
            ValueError: not an index, or out of range.
        """
        wanted, count = self.per_environment("a task", tasks), len(self.stream)
        if wanted.min() < 0 or wanted.max() >= count:
            raise ValueError(
                f"Task {tasks} is out of range: expected 0 to {count - 1} "
                f"({', '.join(self.stream.names)})."
            )
        index = np.arange(self.num_envs) if indices is None else np.asarray(indices)
        self.requested[index] = wanted[index]

    def advance(self) -> None:
        """Request the domain after the current or requested one; after the last, see `cycle`."""
        here = np.where(self.requested >= 0, self.requested, self.tasks)
        self.request(self._after(here))

    def _after(self, tasks: np.ndarray) -> np.ndarray:
        last = len(self.stream) - 1
        return np.where(tasks < last, tasks + 1, 0 if self.config.cycle else last)

    def prepare_reset(
        self, indices: Sequence[int], seeded: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        if options.get("task") is not None:
            self.request(options["task"], indices)
        self.tasks[list(seeded)] = self.played[list(seeded)] = 0

    def _next_domains(self, indices: Sequence[int]) -> list[int]:
        index, limit = np.asarray(indices), self.config.episodes_per_domain
        tasks, requested = self.tasks[index], self.requested[index]
        is_over = np.zeros(len(index), bool) if limit is None else self.played[index] >= limit
        scheduled = np.where(is_over, self._after(tasks), tasks)
        return np.where(requested >= 0, requested, scheduled).tolist()

    def _enter_domains(self, indices: Sequence[int]) -> None:
        index, upcoming = np.asarray(indices), np.array(self._next_domains(indices))
        moved = (self.played[index] == 0) | (upcoming != self.tasks[index])
        begins = moved | (self.requested[index] >= 0)
        self.played[index] = np.where(begins, 1, self.played[index] + 1)
        self.tasks[index], self.boundaries[index] = upcoming, moved
        self.requested[index] = -1

    def _draw_from(self, domain: int, rng: np.random.Generator) -> tuple[int, int | None]:
        return self.dataset.draw_from(domain, rng)

    def _image_range(self, domain: int) -> range:
        first = int(self.dataset.firsts[domain])
        return range(first, first + len(self.dataset.parts[domain]))

    def _domain_name(self, domain: int) -> str:
        return f"{self.stream.name}, domain {self.stream.names[domain]!r}"

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        # `reset` draws the targets again, from the domains of the saved episodes.
        self.request([int(row["tasks"]) for row in state])
        super().set_state(state, rngs)

    def _make_observation_space(self) -> spaces.Dict:
        entries = dict(super()._make_observation_space())
        if self.config.observe_task:
            entries["task_id"] = spaces.Discrete(len(self.stream))
        return spaces.Dict(entries)

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return super()._entries(indices) | {"task_id": self.tasks[indices]}

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices)
        tasks, names = self.tasks[indices], self.stream.names
        info = super().info(indices)
        if self.config.boundaries == "hidden":
            del info["source"]  # begins with the name of the domain
            return info
        return info | {
            "task_id": tasks,
            "domain": np.array([names[task] for task in tasks], object),
            "boundary": self.boundaries[indices],
        }

    def _caption(self, env_index: int) -> str:
        caption = super()._caption(env_index)
        if self.config.boundaries == "hidden":
            return caption
        return f"{self.stream.names[self.tasks[env_index]]}: {caption}"


class _StreamControls:
    """Attributes and methods that the scalar and the vector environment share."""

    env_id = "SamContinual-v0"
    config_class: type[ClickConfig] = ContinualConfig
    core_class: type[ClickCore] = ContinualCore
    core: Any

    @property
    def stream(self) -> Stream:
        """The domains, in order."""
        return self.core.stream

    def advance(self) -> None:
        """Change to the next domain at the next reset (of each sub-environment)."""
        self.core.advance()

    def set_task(self, task: Any) -> None:
        """Change to a domain at the next reset (of each sub-environment).

        Args:
            task: index of the domain in `stream`; for a vector environment also int (num_envs,).

        Raises:
            ValueError: there is no such domain.
        """
        self.core.request(task)


class SamContinualEnv(_StreamControls, SamSegEnv):
    """Segment objects by clicking a Segment Anything Model, in one domain after another.

    ## Description

    The click task of `SamSeg-v0` over a stream of domains, for continual learning: after
    `episodes_per_domain` episodes, images come from the next domain. The agent gets an image and a
    cue click on one of its objects; the goal is a mask of that object (`target="instance"`), or of
    all objects (`target="category"`). The domains share one category, "object", so observations do
    not reveal the domain.

    ## Action Space

    As in `SamSeg-v0`: `Discrete(2 * grid * grid [+ 1] [+ 1])`, positive clicks, negative clicks,
    stop (with `stop=True`) and undo (with `undo=True`).

    ## Observation Space

    The `Dict` of `SamSeg-v0`, where `target_category` is always 0, and with `observe_task=True`:

    | key       | space                       | meaning                              |
    |-----------|-----------------------------|--------------------------------------|
    | `task_id` | Discrete(number of domains) | index of the domain in `stream`      |

    ## Rewards

    As in `SamSeg-v0`.

    ## Starting State

    No clicks and an empty mask. The environment's random generator draws the image and the object
    from the current domain.

    A reset without a seed begins the next episode of the schedule. A reset with a seed begins the
    stream again with the first domain, so the seed alone determines all episodes after it. After
    the last domain, the environment stays there, or continues with the first (`cycle=True`).

    `env.unwrapped.advance()`, `env.unwrapped.set_task(k)` and `reset(options={"task": k})` request
    a domain. It begins at the next reset, seeded or not, and the schedule continues from there.
    With `episodes_per_domain=None`, nothing else changes the domain.
    `reset(options={"index": i})` takes image `i` of the domain.

    ## Episode End

    As in `SamSeg-v0`: *terminated* by `stop` or at the `iou_target`, *truncated* after `max_steps`
    actions. The end of a domain does not end an episode.

    ## Information

    As in `SamSeg-v0`. With `boundaries="announced"` also `domain` (its name), `task_id` (its
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

    All arguments are the fields of `ContinualConfig`: those of `SamSeg-v0` except the dataset, and
    `stream`, `data`, `order`, `stream_kwargs`, `episodes_per_domain`, `cycle`, `boundaries` and
    `observe_task`. In the vector environment,
    `gym.make_vec("SamContinual-v0", num_envs=64, vectorization_mode="vector_entry_point")`, every
    sub-environment counts its own episodes.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **kwargs: fields of `ContinualConfig`.

    Raises:
        ValueError: an argument is unknown or impossible, or the data does not validate.
        FileNotFoundError: a file is missing.
    """

    @property
    def task(self) -> int:
        """Index of the domain of the episode."""
        return int(self.core.tasks[0])


class SamContinualVectorEnv(_StreamControls, SamSegVectorEnv):
    """`SamContinual-v0` in a batch: all sub-environments share one SAM decode per step.

    With `reset(seed=seed)`, sub-environment `i` behaves as the scalar environment with
    `seed + i`, and counts its own episodes. `reset(options={"task": k})` takes an index or int
    (num_envs,) and applies to the sub-environments that are reset. Arguments as for
    `BaseVectorEnv`, with the fields of `ContinualConfig`.
    """

    @property
    def task(self) -> np.ndarray:
        """Index of the domain of each episode: int64 (num_envs,)."""
        return self.core.tasks.copy()
