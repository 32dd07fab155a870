"""The part of an environment that all tasks share: images, embeddings and episodes, batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones import BackboneService, load_backbone
from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.embeddings.store import shared_store
from sam_gym.data.cache import SampleCache
from sam_gym.envs.config import EnvConfig
from sam_gym.envs.handles import HandleSpace
from sam_gym.envs.prefetch import Prefetcher
from sam_gym.simulation.clicks import cell_centres
from sam_gym.utils.lowres import frame_mask, low_res
from sam_gym.utils.settings import Count, checked
from sam_gym.utils.transfer import to_device, to_host

#: Height of the picture in a frame, without its caption, in pixels.
FRAME_HEIGHT = 384

#: Maximum number of draws in search of a target that is large enough.
MAX_DRAWS = 200


class Target(Protocol):
    """The target of an episode: an image, and what the task adds."""

    @property
    def image(self) -> np.ndarray: ...

    @property
    def source(self) -> str: ...

    @property
    def digest(self) -> bytes | None: ...


C = TypeVar("C", bound=EnvConfig)
T = TypeVar("T", bound=Target)


class Draw(NamedTuple, Generic[T]):
    """A drawn episode.

    Attributes:
        target: target of the episode.
        masks: bool (hm, wm) or (N, hm, wm), low-res masks of the target.
        valid: bool (hm, wm), the area that is scored.
    """

    target: T
    masks: np.ndarray
    valid: np.ndarray


class BaseCore(Generic[C, T]):
    """The rules of an environment, batched over sub-environments.

    Each sub-environment has an image, drawn from the dataset, and its embedding in the store. The
    scalar environment is a core with one sub-environment, so nothing is written twice.

    A task implements

    - `action_space` and `observation_space`, of one sub-environment, set in `__init__`;
    - `_draw`, which draws a target from the dataset with a random generator;
    - `_begin`, if an episode has more state than `steps`; `episode_arrays` names its arrays;
    - `check_actions` and `step`;
    - `_entries`, if observations hold more than the image, and `info`;
    - `render`.

    `sam_gym.envs.base_env` wraps a core as a scalar and a vector environment.

    Args:
        config: arguments of the environment.
        num_envs: number of sub-environments.
        dataset: replaces the dataset of the config.

    Raises:
        ValueError, FileNotFoundError: an argument, the dataset or the checkpoint is wrong.
    """

    #: Names of the arrays with a row per sub-environment that `get_state` saves.
    episode_arrays: tuple[str, ...] = ("steps",)
    #: Names of `reset(options=...)`, besides `reset_mask` of vector environments.
    reset_options: tuple[str, ...] = ("index",)
    #: What an index of the dataset is, in messages.
    noun = "image"
    #: Keys of `info`, besides `iou`, that evaluations report at the end of an episode.
    reported: tuple[str, ...] = ()
    action_space: spaces.Space
    observation_space: spaces.Dict

    @checked
    def __init__(self, config: C, num_envs: Count, dataset: Any = None) -> None:
        config.validate()
        self.config, self.num_envs = config, num_envs
        self.dataset: Any = config.open_dataset() if dataset is None else dataset
        self._open_services()
        self.device = self.backbone.device
        grid, side = config.grid, self.backbone.image_size / config.grid
        self._centres = cell_centres(np.arange(grid**2), grid, (side, side))
        self.handles = np.full(num_envs, -1, np.int64)
        self.targets: list[T | None] = [None] * num_envs
        #: Image that a reset chose for the episode, within its domain; -1: the image was drawn.
        self._chosen = [-1] * num_envs
        #: Images chosen for the next episodes of sub-environments.
        self._chosen_next: dict[int, int] = {}
        #: State of each random generator before the target was drawn.
        self._starts: list[dict[str, Any] | None] = [None] * num_envs
        self.steps = np.zeros(num_envs, np.int64)

    def _open_services(self) -> None:
        """Look up the backbone and the store of this process; start with an empty sample cache."""
        config = self.config
        self.prefetcher = Prefetcher(self._draw_episode)
        #: Image in which the current draw is to find its target; -1: any.
        self._draws_of = -1
        self._misses = 0
        self.backbone = load_backbone(
            config.backbone,
            config.checkpoint,
            config.device,
            config.dtype,
            config.compile,
            config.adapter,
        )
        check = self.backbone.check_image
        self.samples = SampleCache(self.dataset, config.cache_mib * 2**20, check)
        disk = None
        if config.disk is not None:
            folder = None if config.disk == "home" else Path(config.disk).expanduser()
            disk = DiskStore(self.backbone, folder, config.disk_dtype, int(config.disk_gib * 2**30))
        self.store = shared_store(self.backbone, int(config.store_gib * 2**30), disk)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model and the embeddings out of copies and pickles: the process shares them."""
        left_out = ("samples", "prefetcher", "backbone", "store")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.config.validate()
        self._open_services()
        held = np.flatnonzero(self.handles >= 0)
        self.handles[held] = self.store.acquire([self._target(i).image for i in held.tolist()])

    def _image_spaces(self) -> dict[str, spaces.Space]:
        """Return the spaces of the image's observation entries, which all tasks share."""
        size, shape = self.backbone.image_size, self.backbone.embedding_shape
        if self.config.obs == "handle":
            return {"handle": HandleSpace()}
        return {
            "image": spaces.Box(0, 255, (size, size, 3), np.uint8),
            "sam_image_embeddings": spaces.Box(-np.inf, np.inf, shape, np.float32),
        }

    # Episodes ----------------------------------------------------------------------------------

    def take_options(
        self, indices: Sequence[int], seeded: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        """Handle the options of an explicit reset; arguments as for `prepare_reset`.

        Raises:
            ValueError: an option is impossible.
        """
        self.prepare_reset(indices, seeded, options)
        if options.get("index") is not None:
            self._choose(options["index"], indices)

    def _choose(self, images: Any, indices: Sequence[int]) -> None:
        """Choose images for the next episodes: an index within the domain, or int (num_envs,)."""
        wanted = self.per_environment("an index", images)[indices]
        for index, domain in zip(wanted.tolist(), self._next_domains(indices), strict=True):
            count = len(self._image_range(domain))
            if not 0 <= index < count:
                raise ValueError(
                    f"Index {index} is out of range: {self._domain_name(domain)} has {self.noun}s "
                    f"0 to {count - 1}."
                )
        self._chosen_next |= zip(indices, wanted.tolist(), strict=True)

    def per_environment(self, name: str, value: Any) -> np.ndarray:
        """Return an integer, or one for each sub-environment, as int64 (num_envs,).

        Raises:
            ValueError: it is neither; the message calls it `name`.
        """
        array = np.asarray(value)
        if array.shape not in ((), (self.num_envs,)) or array.dtype.kind not in "iu":
            raise ValueError(
                f"Expected {name} as an integer, or {self.num_envs} integers, one for each "
                f"sub-environment, got {value!r}."
            )
        return np.broadcast_to(array, (self.num_envs,)).astype(np.int64)

    def prepare_reset(
        self, indices: Sequence[int], seeded: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        """Handle the task's own options of an explicit reset; autoresets do not call this.

        Args:
            indices: sub-environments that will be reset.
            seeded: those among them that get a seed.
            options: of the reset.
        """

    def reset(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> None:
        """Start new episodes in some sub-environments.

        Args:
            indices: sub-environments.
            rngs: the generator of each, which draws its target.
        """
        starts: list[Any] = [rng.bit_generator.state for rng in rngs]
        for i in indices:
            self._chosen[i] = self._chosen_next.pop(i, -1)
        self._begin(indices, self._draw_all(indices, rngs))
        for i, start in zip(indices, starts, strict=True):
            self._starts[i] = start

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[T]]) -> None:
        """Start new episodes with drawn targets."""
        handles = self.store.acquire(
            [draw.target.image for draw in draws], [draw.target.digest for draw in draws]
        )
        for i, handle, draw in zip(indices, handles, draws, strict=True):
            self.release([i])
            self.handles[i] = handle
            self.targets[i] = draw.target
            self._starts[i] = None
        self.steps[indices] = 0

    def compute_features(self) -> None:
        """Compute features that were registered with the store since the last reset."""
        held = np.flatnonzero(self.handles >= 0).tolist()
        images = {int(self.handles[i]): self._target(i).image for i in held}
        self.store.compute_features(images)

    def get_state(self) -> list[dict[str, Any]]:
        """Return a copy of each episode's state: small numpy arrays and plain values.

        Images, targets and embeddings are left out: `set_state` draws them again.
        """
        return [
            {name: getattr(self, name)[i].copy() for name in self.episode_arrays}
            | {"start": self._starts[i], "chosen": self._chosen[i]}
            for i in range(self.num_envs)
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        """Continue the episodes of `get_state` of a core with the same config.

        Args:
            state: of each sub-environment.
            rngs: the generator of each; set to its state right after the draw.
        """
        for i, (row, rng) in enumerate(zip(state, rngs, strict=True)):
            if row["start"] is None:
                raise ValueError(
                    f"Sub-environment {i} had not been reset when its state was taken. "
                    "Call reset() before get_state()."
                )
            rng.bit_generator.state = row["start"]
            self._chosen_next[i] = row.get("chosen", -1)
        self.reset(range(self.num_envs), rngs)
        for name in self.episode_arrays:
            getattr(self, name)[:] = np.stack([row[name] for row in state])

    def close(self) -> None:
        """Release all targets, embeddings and cached samples; reset before use."""
        self.release(range(self.num_envs))
        self.prefetcher.close()
        self.samples.clear()

    def release(self, indices: Sequence[int]) -> None:
        """Release the targets and embeddings of some sub-environments; reset them before use."""
        for i in indices:
            if self.handles[i] >= 0:
                self.store.unpin(int(self.handles[i]))
                self.handles[i] = -1
            self.targets[i] = None

    # Draws -------------------------------------------------------------------------------------

    def _draw(self, rng: np.random.Generator, domain: int) -> Draw[T]:
        """Draw a target from a domain of the dataset; raise `_no_target_error` if there is none.

        Prefetching calls this in a thread: it may read `samples`, but no mutable state.
        """
        raise NotImplementedError

    def _draw_all(
        self, indices: Sequence[int], rngs: Sequence[np.random.Generator]
    ) -> list[Draw[T]]:
        """Draw a target for each sub-environment, and prefetch the next ones if that saves time."""
        chosen = [self._chosen[i] for i in indices]
        draws = self.prefetcher.take(indices, rngs, self._next_domains(indices), chosen)
        self._enter_domains(indices)
        # A cached sample takes less time than handing the draw to a thread.
        missed, self._misses = self.samples.misses > self._misses, self.samples.misses
        if missed and self.num_envs > 1:
            self.prefetcher.begin(indices, rngs, self._next_domains(indices), [-1] * len(indices))
        return draws

    def _draw_episode(self, rng: np.random.Generator, domain: int, chosen: int) -> Draw[T]:
        """Draw a target as `_draw` does, in the image `chosen` of the domain unless it is -1."""
        self._draws_of = chosen  # draws never run concurrently
        try:
            return self._draw(rng, domain)
        finally:
            self._draws_of = -1

    def _next_domains(self, indices: Sequence[int]) -> list[int]:
        """Return the domain of each sub-environment's next episode; 0 without a stream."""
        return [0] * len(indices)

    def _enter_domains(self, indices: Sequence[int]) -> None:
        """Advance some sub-environments to the domains of their next episodes."""

    def _draw_image(self, rng: np.random.Generator, domain: int) -> tuple[int, int | None]:
        """Draw an image of a domain, as `Dataset.draw` does, or return the chosen one."""
        if self._draws_of >= 0:
            return self._image_range(domain)[self._draws_of], None
        return self._draw_from(domain, rng)

    def _draw_from(self, domain: int, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image of a domain, as `Dataset.draw` does."""
        del domain
        return self.dataset.draw(rng)

    def _image_range(self, domain: int) -> range:
        """Return the indices of a domain's images in the dataset."""
        del domain
        return range(len(self.dataset))

    def _domain_name(self, domain: int) -> str:
        """Return the name of a domain for messages."""
        del domain
        return self.dataset.name

    def _no_target_error(self, domain: int) -> ValueError:
        """Return the error for data in which `MAX_DRAWS` draws found no target."""
        name = self._domain_name(domain)
        if self._draws_of >= 0:
            name += f", {self.noun} {self._draws_of}"
        return ValueError(
            f"{name}: {MAX_DRAWS} draws found no target that covers at least "
            f"{self.config.min_target:.2%} of the frame. Lower min_target or take other categories."
        )

    def _is_large_enough(self, low_res: np.ndarray) -> bool:
        """Return whether a low-res mask has the minimum area of a target."""
        return bool(np.count_nonzero(low_res) >= max(1.0, self.config.min_target * low_res.size))

    def _low_res(self, mask: np.ndarray) -> np.ndarray:
        """Resample a mask bool (H, W) of an image to SAM's low-res mask: bool (hm, wm)."""
        content = self.backbone.input_size(mask.shape)
        frame = frame_mask(mask, content, self.backbone.image_size)
        return low_res(frame, self.backbone.mask_shape) >= 0.5

    def _low_res_valid(self, shape: tuple[int, int], ignore: np.ndarray | None) -> np.ndarray:
        """Return the scored area of a (height, width) image as a low-res mask: bool (hm, wm)."""
        height, width = self.backbone.input_size(shape)
        if ignore is None and height == width:
            return np.ones(self.backbone.mask_shape, bool)
        return self._low_res(np.ones(shape, bool) if ignore is None else ~ignore)

    # Coordinates -------------------------------------------------------------------------------

    def centre_of(self, cell: int) -> tuple[float, float]:
        """Return the centre (x, y) of a cell of the grid, in pixels of the input frame."""
        x, y = self._centres[cell].tolist()
        return x, y

    def cell_at(self, x: float, y: float) -> int:
        """Return the cell that contains (x, y), in pixels of the input frame."""
        grid = self.config.grid
        side = self.backbone.image_size / grid
        row, column = (int(np.clip((v + 0.5) // side, 0, grid - 1)) for v in (y, x))
        return row * grid + column

    def _clip_to_image(self, env_index: int, x: float, y: float) -> tuple[float, float]:
        """Move a point of the input frame out of the padding, to the nearest image pixel."""
        height, width = self.backbone.input_size(self._target(env_index).image.shape[:2])
        return min(x, width - 1.0), min(y, height - 1.0)

    def to_image(self, env_index: int, x: float, y: float) -> tuple[int, int]:
        """Return the image pixel (x, y) that lies at (x, y) of the input frame."""
        image_height, image_width = self._target(env_index).image.shape[:2]
        height, width = self.backbone.input_size((image_height, image_width))
        column = int((x + 0.5) * image_width / width)
        row = int((y + 0.5) * image_height / height)
        return min(max(column, 0), image_width - 1), min(max(row, 0), image_height - 1)

    # Players -----------------------------------------------------------------------------------

    def keys(self) -> dict[str, int]:
        """Return the actions that a person chooses by a key."""
        return {}

    def action_at(self, x: float, y: float, positive: bool) -> int:
        """Return the action of a click at (x, y), in pixels of the input frame.

        Raises:
            NotImplementedError: no action is a click.
        """
        raise NotImplementedError

    def from_frame(self, env_index: int, x: float, y: float) -> tuple[float, float] | None:
        """Return where a pixel of `frame` is in the input frame.

        Args:
            env_index: sub-environment.
            x: column of its frame, in pixels.
            y: row of its frame, in pixels.

        Returns:
            (x, y) in pixels of the input frame; None outside of the image.
        """
        image = self._picture(env_index)
        rows, columns = self._drawn_size(env_index)
        left = (self.frame_width - columns) // 2
        u, v = (x - left + 0.5) / columns, (y - (FRAME_HEIGHT - rows) // 2 + 0.5) / rows
        if not (0 <= u < 1 and 0 <= v < 1):
            return None
        height, width = self.backbone.input_size(image.shape[:2])
        return u * width - 0.5, v * height - 0.5

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return the actions of all sub-environments as an array, validated.

        Raises:
            ValueError: an action is impossible.
        """
        raise NotImplementedError

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step some sub-environments.

        Args:
            indices: int (S,), without repetition.
            actions: (S, ...), checked.

        Returns:
            reward float64 (S,), terminated bool (S,), truncated bool (S,).
        """
        raise NotImplementedError

    def _is_over(self, indices: np.ndarray) -> np.ndarray:
        """Return whether episodes have reached their maximum number of steps: bool (S,)."""
        return self.steps[indices] >= self.config.max_episode_steps

    def playing(self) -> np.ndarray:
        """Return the sub-environments whose episode has steps left: int64 (S,)."""
        return np.flatnonzero(~self._is_over(np.arange(self.num_envs)))

    def end_episodes(self, indices: Sequence[int] | np.ndarray) -> None:
        """End the episodes of some sub-environments: sets `steps` to their maximum."""
        self.steps[indices] = self.config.max_episode_steps

    def _check_not_over(self, indices: np.ndarray) -> None:
        """Raise `RuntimeError` if an episode has reached its maximum number of steps."""
        if self._is_over(indices).any():
            raise RuntimeError(
                f"An episode of {self.config.max_episode_steps} steps is over: call reset() before "
                "step()."
            )

    # Observations ------------------------------------------------------------------------------

    def _target(self, env_index: int) -> T:
        target = self.targets[env_index]
        if target is None:
            raise RuntimeError("Call reset() before anything else.")
        return target

    def observe(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the observations of some sub-environments, stacked, in fresh arrays."""
        entries = self._entries(np.asarray(indices))
        return {key: entries[key] for key in self.observation_space.spaces}

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the entries of observations, in any order; `observe` selects from them."""
        if self.config.obs == "handle":
            return {"handle": self.handles[indices].astype(np.int32)[:, None]}
        handles = to_device(self.handles[indices], self.device)
        images = [self._target(i).image for i in indices]
        embeddings = self.store.gather(handles, "embedding", check=False)
        return {
            "image": np.stack([self.backbone.framed(image) for image in images]),
            "sam_image_embeddings": to_host(embeddings.contiguous())[0],
        }

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the infos of some sub-environments, stacked: float64, int64, bool or object (S,).

        The keys `iou` and `source` are needed for evaluation.
        """
        raise NotImplementedError

    def render(self, env_index: int, height: int = FRAME_HEIGHT) -> np.ndarray:
        """Draw a sub-environment, `height` pixels high, with a caption: uint8 (H, W, 3), RGB."""
        raise NotImplementedError

    def _picture(self, env_index: int) -> np.ndarray:
        """Return the image that `render` draws: uint8 (H, W, 3)."""
        return self._target(env_index).image

    def _first_picture(self) -> np.ndarray:
        """Return the first image of the dataset: uint8 (H, W, 3)."""
        image: np.ndarray = self.dataset[0].image
        return image

    @cached_property
    def frame_width(self) -> int:
        """Width of all frames: that of the dataset's first image, `FRAME_HEIGHT` pixels high.

        At most three times as wide or high as the other side, and even, as video encoders want it.
        """
        width = _drawn_width(self._first_picture())
        width += width % 2
        return min(max(width, FRAME_HEIGHT // 3), 3 * FRAME_HEIGHT)

    def frame(self, env_index: int) -> np.ndarray:
        """Draw a sub-environment in a frame of fixed size, with black bars if the image needs them.

        Returns:
            uint8 (FRAME_HEIGHT and what `render` adds for a caption, `frame_width`, 3), RGB.
        """
        from sam_gym.utils.render import letterbox

        height, _ = self._drawn_size(env_index)
        drawn = self.render(env_index, height)
        caption = drawn.shape[0] - height
        return letterbox(drawn, FRAME_HEIGHT + caption, self.frame_width)

    def _drawn_size(self, env_index: int) -> tuple[int, int]:
        """Return the rows and columns of the image in `frame`."""
        image, height = self._picture(env_index), FRAME_HEIGHT
        if _drawn_width(image) > self.frame_width:
            height = max(1, self.frame_width * image.shape[0] // image.shape[1])
        return height, max(1, round(image.shape[1] * height / image.shape[0]))

    def ground_truth(self, env_index: int) -> T:
        """Return the target. Only for rewards, metrics and oracles."""
        return self._target(env_index)


def in_cells(backbone: BackboneService, maps: Tensor) -> Tensor:
    """Average maps (B, C, hm, wm), 0 to 1, over cells of the embedding: uint8 (B, C, h, w)."""
    pixels = backbone.mask_shape[0] // backbone.embedding_shape[1]
    return (255 * F.avg_pool2d(maps, pixels)).round().to(torch.uint8)


def _drawn_width(image: np.ndarray) -> int:
    """Return the width of an image that is drawn `FRAME_HEIGHT` pixels high."""
    return round(image.shape[1] * (FRAME_HEIGHT / image.shape[0]))
