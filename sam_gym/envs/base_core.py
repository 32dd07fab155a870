"""What every task on SAM has in common, as a batch of slots that share one decode per step."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from gymnasium import spaces

from sam_gym.backbones import load_backbone
from sam_gym.backbones.embeddings.disk import DEFAULT_BYTES, DiskStore
from sam_gym.backbones.embeddings.store import MAX_HANDLES, shared_store
from sam_gym.backbones.service import DTYPES
from sam_gym.data import DATASETS, Dataset, make_dataset
from sam_gym.data.cache import SampleCache
from sam_gym.envs.prefetch import Prefetcher
from sam_gym.simulation.clicks import cell_centres
from sam_gym.utils.lowres import frame_mask, low_res
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.transfer import to_device, to_host


@dataclass(frozen=True)
class EnvConfig:
    """Settings of any task; a subclass says what the task is."""

    split: str = "train"
    """Split of the data: train, val, test."""
    backbone: str = "micro"
    """SAM that is prompted: [hq_]micro, [hq_]vit_b/l/h, mobile_sam, repvit_sam, hf:OWNER/NAME."""
    checkpoint: str | None = None
    """Weights of the backbone (micro brings its own)."""
    device: str = "auto"
    """Device of the backbone: auto, cpu, cuda, mps."""
    dtype: str = "auto"
    """Precision of the backbone: auto, float32, bfloat16, float16."""
    adapter: str | None = None
    """Adapter file that the SAM is adapted by (adaptation.train writes them)."""
    compile: bool = False
    """Compile the backbone: faster steps, after a first minute or two."""
    obs: Literal["full", "handle"] = "full"
    """Observations with image and embedding, or with a small handle of the embedding."""
    grid: int = 16
    """Prompts fall on the centres of grid x grid cells of SAM's square input frame."""
    min_target: float = 0.002
    """Things that cover less than this share of the frame are not asked for."""
    cache_mib: int = 1024
    """Memory for samples that are kept instead of read again, in MiB."""
    store_gib: float = 1.0
    """Memory for embeddings that are kept instead of encoded again, in GiB."""
    disk: str | None = None
    """Folder that keeps embeddings between runs too, or "home" for SAM_GYM_HOME/embeddings."""
    disk_dtype: str = "float32"
    """Precision of embeddings on disk: float32, float16, bfloat16."""
    disk_gib: float = DEFAULT_BYTES / 2**30
    """Bound on the files of this backbone and precision, in GiB; the least recently used go."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        check_choice("obs", self.obs, ("full", "handle"))
        check_choice("disk_dtype", self.disk_dtype, DTYPES)
        if not 2 <= self.grid <= 64:
            raise ValueError(f"grid must be from 2 to 64, got {self.grid}.")
        if self.obs == "handle" and multiprocessing.current_process().daemon:
            raise ValueError(
                "obs='handle' refers to embeddings in this process, so it does not work in the "
                "workers of AsyncVectorEnv or SubprocVecEnv. Use gymnasium.make_vec(..., "
                "vectorization_mode='vector_entry_point'), which is faster, or obs='full'."
            )

    def open_dataset(self) -> Dataset:
        """The images, validated."""
        raise NotImplementedError

    @property
    def held_out_split(self) -> str:
        """Split that results are reported on by default."""
        return "test"

    @property
    def longest(self) -> int:
        """Steps after which an episode is over, whatever was done in it."""
        raise NotImplementedError


@dataclass(frozen=True)
class DatasetConfig(EnvConfig):
    """Settings of a task over the images of one dataset."""

    dataset: str = "scenes"
    """Dataset name: scenes, rooms, rooms-panoramas, coco, folder, entities, domain."""
    data: str | None = None
    """Root folder of a dataset that reads files."""
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    """More options of the dataset, for example {"categories": "person"} or {"length": 2048}."""

    def validate(self) -> None:
        super().validate()
        for name, own in (("split", "split"), ("root", "data")):
            if name in self.dataset_kwargs:
                raise ValueError(f"dataset_kwargs may not hold {name!r}: use {own}= instead.")

    def open_dataset(self) -> Dataset:
        """The dataset, validated; raises as `make_dataset` does."""
        root = {} if self.data is None else {"root": self.data}
        return make_dataset(self.dataset, self.split, **root, **self.dataset_kwargs)

    @property
    def held_out_split(self) -> str:
        return DATASETS.get(self.dataset).held_out_split


def check_choice(name: str, value: Any, valid: Any) -> None:
    """Raise `ValueError` for a value that is none of the valid ones."""
    if value not in valid:
        raise unknown_name(name, value, [str(v) for v in valid])


class Pictured(Protocol):
    """What an episode is about, whatever the task."""

    @property
    def image(self) -> np.ndarray: ...

    @property
    def source(self) -> str: ...

    @property
    def digest(self) -> bytes | None: ...


C = TypeVar("C", bound=EnvConfig)
T = TypeVar("T", bound=Pictured)


class BaseCore(Generic[C, T]):
    """Slots with an image each, drawn from a dataset, and its embedding in the store.

    A task adds what is drawn (`_draw`), what an episode begins with (`_begin`), what a step does,
    what is seen of it, and its two spaces.

    Args:
        config: the settings.
        num_envs: how many episodes run side by side.
        dataset: instead of the one that the settings name.

    Raises:
        ValueError, FileNotFoundError: a setting, the dataset or the checkpoint is wrong.
    """

    #: Arrays with a row per slot that say how far its episode is (see `get_state`).
    episode_arrays: tuple[str, ...] = ("steps",)
    #: Numbers in `info` that tell, at the end of an episode, what it took; beside `iou`.
    reported: tuple[str, ...] = ()
    action_space: spaces.Space
    observation_space: spaces.Dict

    def __init__(self, config: C, num_envs: int, dataset: Dataset | None = None) -> None:
        config.validate()
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        self.config, self.num_envs = config, num_envs
        self.dataset = config.open_dataset() if dataset is None else dataset
        self._share()
        self.device = self.backbone.device
        self.handles = np.full(num_envs, -1, np.int64)
        self.targets: list[T | None] = [None] * num_envs
        #: The state of each slot's generator before its target was drawn.
        self._starts: list[dict[str, Any] | None] = [None] * num_envs
        self.steps = np.zeros(num_envs, np.int64)

    def _share(self) -> None:
        """Take what all cores of this process have in common, and an empty cache."""
        config = self.config
        self.samples = SampleCache(self.dataset, config.cache_mib * 2**20)
        self.ahead = Prefetcher(self._draw)
        self._misses = 0
        self.backbone = load_backbone(
            config.backbone,
            config.checkpoint,
            config.device,
            config.dtype,
            config.compile,
            config.adapter,
        )
        disk = None
        if config.disk is not None:
            folder = None if config.disk == "home" else Path(config.disk).expanduser()
            disk = DiskStore(self.backbone, folder, config.disk_dtype, int(config.disk_gib * 2**30))
        self.store = shared_store(self.backbone, int(config.store_gib * 2**30), disk)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle holds the episodes; the model and the embeddings stay in the process."""
        left_out = ("samples", "ahead", "backbone", "store")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.config.validate()
        self._share()
        held = np.flatnonzero(self.handles >= 0)
        self.handles[held] = self.store.acquire([self._target(int(slot)).image for slot in held])

    def _image_spaces(self) -> dict[str, spaces.Space]:
        """Spaces of what observations say of the image, whatever the task."""
        size, shape = self.backbone.image_size, self.backbone.embedding_shape
        if self.config.obs == "handle":
            return {"handle": spaces.Box(0, MAX_HANDLES - 1, (1,), np.int32)}
        return {
            "image": spaces.Box(0, 255, (size, size, 3), np.uint8),
            "sam_image_embeddings": spaces.Box(-np.inf, np.inf, shape, np.float32),
        }

    # Episodes ----------------------------------------------------------------------------------

    def plan(self, slots: Sequence[int], seeded: Sequence[int], options: Mapping[str, Any]) -> None:
        """Take note of a reset that somebody asks for, before it comes; not of an autoreset.

        Args:
            slots: that will be reset.
            seeded: those of them that get a seed.
            options: of the reset.
        """

    def reset(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> None:
        """Begin new episodes in some slots, each with a target drawn from its own generator."""
        starts: list[Any] = [rng.bit_generator.state for rng in rngs]
        self._begin(slots, self._draw_all(slots, rngs))
        for slot, start in zip(slots, starts, strict=True):
            self._starts[slot] = start

    def _begin(
        self, slots: Sequence[int], drawn: Sequence[tuple[T, np.ndarray, np.ndarray]]
    ) -> None:
        """Begin new episodes about targets, each with its low-res masks and scored area."""
        handles = self.store.acquire(
            [target.image for target, _, _ in drawn], [target.digest for target, _, _ in drawn]
        )
        for slot, handle, (target, _, _) in zip(slots, handles, drawn, strict=True):
            self.release([slot])
            self.handles[slot] = handle
            self.targets[slot] = target
            self._starts[slot] = None
        self.steps[slots] = 0

    def describe(self) -> None:
        """Let the store say what was attached to it since the slots were reset."""
        held = np.flatnonzero(self.handles >= 0).tolist()
        self.store.describe({int(self.handles[slot]): self._target(slot).image for slot in held})

    def get_state(self) -> list[dict[str, Any]]:
        """The episode of each slot, copied: numpy arrays and plain values, small enough to keep.

        Images, targets and embeddings are not in it: `set_state` draws them again.
        """
        return [
            {name: getattr(self, name)[slot].copy() for name in self.episode_arrays}
            | {"start": self._starts[slot]}
            for slot in range(self.num_envs)
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        """Go on with the episodes of `get_state`, of a core with the same settings.

        Args:
            state: of each slot.
            rngs: the generators of the slots; they end as they were right after the draw.
        """
        for slot, (row, rng) in enumerate(zip(state, rngs, strict=True)):
            if row["start"] is None:
                raise ValueError(f"Slot {slot} of this state had not been reset: nothing to go on.")
            rng.bit_generator.state = row["start"]
        self.reset(range(self.num_envs), rngs)
        for name in self.episode_arrays:
            getattr(self, name)[:] = np.stack([row[name] for row in state])

    def close(self) -> None:
        """Let go of all targets and embeddings; slots must be reset before use."""
        self.release(range(self.num_envs))
        self.ahead.close()

    def release(self, slots: Sequence[int]) -> None:
        """Let go of the targets and embeddings of some slots, which must be reset before use."""
        for slot in slots:
            if self.handles[slot] >= 0:
                self.store.unpin(int(self.handles[slot]))
                self.handles[slot] = -1
            self.targets[slot] = None

    def _draw_all(
        self, slots: Sequence[int], rngs: Sequence[np.random.Generator]
    ) -> list[tuple[T, np.ndarray, np.ndarray]]:
        """The next target of each slot; the ones after are begun in a thread if that pays."""
        drawn = self.ahead.take(slots, rngs, self._upcoming(slots))
        self._enter(slots)
        # A sample from the cache is there sooner than two threads have agreed on whose turn it is.
        missed, self._misses = self.samples.misses > self._misses, self.samples.misses
        if missed and self.num_envs > 1:
            self.ahead.begin(slots, rngs, self._upcoming(slots))
        return drawn

    def _upcoming(self, slots: Sequence[int]) -> list[int]:
        """Which part of the dataset the next episode of each slot is drawn from."""
        return [0] * len(slots)

    def _enter(self, slots: Sequence[int]) -> None:
        """Note that the next episode of some slots has been drawn from where it was upcoming."""

    def _choose(self, rng: np.random.Generator, part: int) -> tuple[int, int | None]:
        """Draw an image from a part of the dataset, as `Dataset.draw` does from all of it."""
        del part
        return self.dataset.draw(rng)

    def _name_of(self, part: int) -> str:
        del part
        return self.dataset.name

    def _draw(self, rng: np.random.Generator, part: int) -> tuple[T, np.ndarray, np.ndarray]:
        """What an episode is about, with its low-res masks and the scored area, bool (hm, wm)."""
        raise NotImplementedError

    def _nothing_drawn(self, part: int) -> ValueError:
        """The error for data in which 200 draws found nothing to ask for."""
        return ValueError(
            f"{self._name_of(part)}: 200 draws found no target that covers at least "
            f"{self.config.min_target:.2%} of the frame. Lower min_target or take other categories."
        )

    def _covers_enough(self, low: np.ndarray) -> bool:
        """Whether a low-res mask is large enough to be asked for."""
        return bool(np.count_nonzero(low) >= max(1.0, self.config.min_target * low.size))

    def _low_res(self, mask: np.ndarray) -> np.ndarray:
        """A mask bool (H, W) of an image on SAM's low-res mask: bool (hm, wm)."""
        content = self.backbone.input_size(mask.shape)
        frame = frame_mask(mask, content, self.backbone.image_size)
        return low_res(frame, self.backbone.mask_shape) >= 0.5

    def _scored(self, shape: tuple[int, int], ignore: np.ndarray | None) -> np.ndarray:
        """What is scored of an image of (height, width) on the low-res mask: bool (hm, wm)."""
        height, width = self.backbone.input_size(shape)
        if ignore is None and height == width:
            return np.ones(self.backbone.mask_shape, bool)
        return self._low_res(np.ones(shape, bool) if ignore is None else ~ignore)

    # Places ------------------------------------------------------------------------------------

    def centre_of(self, cell: int) -> tuple[float, float]:
        """The centre (x, y) of a cell of the grid, in pixels of the input frame."""
        side = self.backbone.image_size / self.config.grid
        x, y = cell_centres(np.array(cell), self.config.grid, (side, side)).tolist()
        return x, y

    def cell_at(self, x: float, y: float) -> int:
        """The cell that holds (x, y), in pixels of the input frame."""
        grid = self.config.grid
        side = self.backbone.image_size / grid
        row, column = (int(np.clip((v + 0.5) // side, 0, grid - 1)) for v in (y, x))
        return row * grid + column

    def _inside(self, slot: int, x: float, y: float) -> tuple[float, float]:
        """The point of the input frame nearest to (x, y) that is no padding."""
        height, width = self.backbone.input_size(self._target(slot).image.shape[:2])
        return min(x, width - 1.0), min(y, height - 1.0)

    def to_image(self, slot: int, x: float, y: float) -> tuple[int, int]:
        """The pixel (x, y) of a slot's image that lies at (x, y) of the input frame."""
        image_height, image_width = self._target(slot).image.shape[:2]
        height, width = self.backbone.input_size((image_height, image_width))
        column = int((x + 0.5) * image_width / width)
        row = int((y + 0.5) * image_height / height)
        return min(max(column, 0), image_width - 1), min(max(row, 0), image_height - 1)

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions of all slots, in an array; raises `ValueError` if one is impossible."""
        raise NotImplementedError

    def step(
        self, slots: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Play one action in each of some slots.

        Args:
            slots: int (S,), without repetition.
            actions: (S, ...), checked.

        Returns:
            reward float64 (S,), terminated bool (S,), truncated bool (S,).
        """
        raise NotImplementedError

    def _is_over(self, slots: np.ndarray) -> np.ndarray:
        """Whether the episodes of some slots have had all of their steps: bool (S,)."""
        return self.steps[slots] >= self.config.longest

    def _check_going_on(self, slots: np.ndarray) -> None:
        """Raise `RuntimeError` if the episode of a slot has had all of its steps."""
        if self._is_over(slots).any():
            raise RuntimeError(
                f"An episode of {self.config.longest} steps is over: call reset() before going on."
            )

    # What is seen ------------------------------------------------------------------------------

    def _target(self, slot: int) -> T:
        target = self.targets[slot]
        if target is None:
            raise RuntimeError("Call reset() before anything else.")
        return target

    def observe(self, slots: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Observations of some slots, stacked, in fresh arrays."""
        entries = self._entries(np.asarray(slots))
        return {key: entries[key] for key in self.observation_space.spaces}

    def _entries(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of observations of some slots, in any order."""
        if self.config.obs == "handle":
            return {"handle": self.handles[slots].astype(np.int32)[:, None]}
        handles = to_device(self.handles[slots], self.device)
        images = [self._target(slot).image for slot in slots]
        return {
            "image": np.stack([self.backbone.framed(image) for image in images]),
            "sam_image_embeddings": to_host(self.store.gather(handles))[0],
        }

    def info(self, slots: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Numbers and names of some slots, stacked: float64, int64 or object (S,)."""
        raise NotImplementedError

    def render(self, slot: int, height: int = 384) -> np.ndarray:
        """A picture of a slot, `height` pixels high and a caption: uint8 (H, W, 3), RGB."""
        raise NotImplementedError

    # Oracle view -------------------------------------------------------------------------------

    def ground_truth(self, slot: int) -> T:
        """The target of a slot, for rewards, metrics and agents that cheat on purpose."""
        return self._target(slot)
