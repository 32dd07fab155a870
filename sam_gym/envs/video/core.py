"""What all tasks of `SamVideo-v0` share: videos, their prompts, and J."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.video.bank import MemoryBank
from sam_gym.backbones.video.prompting import first_prompts
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data import VideoDataset
from sam_gym.data.cache import CachedFrame, FrameCache
from sam_gym.envs.base_core import MAX_DRAWS, BaseCore, Draw
from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.metrics import masks as metrics
from sam_gym.utils.lowres import frame_mask
from sam_gym.utils.transfer import to_device, to_host

#: Maximum number of objects that are tracked together for `VideoCore.reference_js`. The number is
#: the same for all episodes, so that the last bits do not depend on which others are missing.
_TRACKED_TOGETHER = 8
#: Backbone -> digest of a target -> J in each frame under SAM 2's own rule. Small arrays, which
#: cost as much to compute as an episode.
_REFERENCES: weakref.WeakKeyDictionary[Any, dict[bytes, np.ndarray]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class VideoTarget:
    """The target of an episode: an object in T frames, in the first of which it is prompted.

    Attributes:
        frames: the frames.
        number: index of the object in the annotations of its video.
        category: index of its category.
        source: name of the video.
        now: index of the present frame.
    """

    frames: tuple[CachedFrame, ...]
    number: int
    category: int
    source: str
    now: int = 0

    @property
    def image(self) -> np.ndarray:
        """The present frame as the backbone encodes it, uint8 (H', W', 3)."""
        return self.frames[self.now].prepared

    @property
    def digest(self) -> bytes:
        """`image_digest` of `image`."""
        return self.frames[self.now].digest

    @property
    def picture(self) -> np.ndarray:
        """The present frame, uint8 (H, W, 3)."""
        return self.frames[self.now].image

    @property
    def mask(self) -> np.ndarray:
        """The true mask in the present frame, bool (H, W)."""
        return self.frames[self.now].mask(self.number)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video."""
        height, width, _ = self.frames[0].image.shape
        return height, width

    @property
    def annotated(self) -> np.ndarray:
        """Whether the true mask of each frame is known, bool (T,)."""
        return np.array([frame.annotated[self.number] for frame in self.frames])

    def at(self, frame: int) -> VideoTarget:
        """Return the target with another present frame."""
        return replace(self, now=frame)

    def key(self, *words: object) -> bytes:
        """Return a digest of the frames, the true masks and some words."""
        digest = hashlib.sha256(repr(words).encode())
        for frame in self.frames:
            digest.update(frame.digest + frame.masks[self.number].tobytes())
            digest.update(bytes([int(frame.annotated[self.number])]))
        return digest.digest()


class VideoCore(BaseCore[SamVideoConfig, VideoTarget]):
    """The part that the tasks share; arguments as for `BaseCore`, with a `VideoDataset`.

    A task sets `sam2_action`, the action of SAM 2's own rule, `action_space` and
    `observation_space`, and fills `js`.
    """

    noun = "video"
    #: The action after which SAM 2 goes on by its own rule.
    sam2_action: Any

    def __init__(
        self, config: SamVideoConfig, num_envs: int, dataset: VideoDataset | None = None
    ) -> None:
        super().__init__(config, num_envs, dataset)
        #: Number of frames of each episode.
        self.lengths = np.full(num_envs, config.frames, np.int64)
        #: J of each frame; NaN where it was not tracked yet, or is not annotated.
        self.js = np.full((num_envs, config.frames), np.nan)
        #: J of each frame under SAM 2's own rule.
        self.reference_js = np.full((num_envs, config.frames), np.nan)
        mask_shape, device = self.backbone.mask_shape, self.device
        self._truth = torch.zeros(
            (num_envs, config.frames, *mask_shape), dtype=torch.bool, device=device
        )
        self._valid = torch.ones((num_envs, *mask_shape), dtype=torch.bool, device=device)

    def _open_services(self) -> None:
        super()._open_services()
        self.tracker = VideoTracker(self.backbone)
        self.samples: Any = FrameCache(
            self.dataset,
            self.config.cache_mib * 2**20,
            self.tracker.framed,
            self.backbone.check_image,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: own for key, own in super().__getstate__().items() if key != "tracker"}

    # Episodes ----------------------------------------------------------------------------------

    def _draw_from(self, domain: int, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(len(self.dataset))), None

    def _draw(self, rng: np.random.Generator, domain: int) -> Draw[VideoTarget]:
        count = self.config.frames
        for _ in range(MAX_DRAWS):
            index, _ = self._draw_image(rng, domain)
            video = self.samples.video(index)
            start = int(rng.integers(max(0, len(video) - count) + 1))
            first = self.samples.frame(index, start)
            numbers = [
                number
                for number in np.flatnonzero(first.annotated).tolist()
                if self._is_large_enough(self._low_res(first.mask(number)))
            ]
            if not numbers or len(video) < 3:
                continue
            number = int(rng.choice(numbers))
            numbered = range(start, min(start + count, len(video)))
            frames = tuple(self.samples.frame(index, frame) for frame in numbered)
            target = VideoTarget(frames, number, video.categories[number], video.name)
            truth = np.stack([self._low_res(frame.mask(number)) for frame in frames])
            return Draw(target, truth, self._low_res_valid(target.size, None))
        raise self._no_target_error(domain)

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[VideoTarget]]) -> None:
        super()._begin(indices, draws)
        rows, index = np.asarray(indices), to_device(np.asarray(indices), self.device)
        self._truth[index] = self._padded_truth(draws)
        self._valid[index] = to_device(np.stack([draw.valid for draw in draws]), self.device)
        self.lengths[rows] = [len(draw.target.frames) for draw in draws]
        self.js[rows] = np.nan

    def _padded_truth(self, draws: Sequence[Draw[VideoTarget]]) -> Tensor:
        """Return the true low-res masks of episodes: bool (S, frames, hm, wm)."""
        shape = (len(draws), self.config.frames, *self.backbone.mask_shape)
        truth = np.zeros(shape, bool)
        for own, draw in zip(truth, draws, strict=True):
            own[: len(draw.masks)] = draw.masks
        return to_device(truth, self.device)

    def _features(self, targets: Sequence[VideoTarget]) -> ImageFeatures:
        """Encode the present frames of targets, or look them up."""
        handles = self.store.acquire(
            [target.image for target in targets], [target.digest for target in targets]
        )
        features = self.store.gather(np.array(handles), check=False)
        for handle in handles:
            self.store.unpin(handle)
        return features

    def _prompt(self, bank: MemoryBank, rows: np.ndarray, targets: Sequence[VideoTarget]) -> None:
        """Prompt objects in the first frames of their videos."""
        targets = [target.at(0) for target in targets]
        side, framed = self.backbone.image_size, self.backbone.input_size
        masks = [frame_mask(own.mask, framed(own.size), side) >= 0.5 for own in targets]
        count = len(targets)
        kinds = [self.config.prompt] * count
        prompts = first_prompts([None] * count, np.stack(masks), kinds, self.device)
        bank.begin(rows, self._features(targets), prompts)

    def _references(self, draws: Sequence[Draw[VideoTarget]]) -> np.ndarray:
        """Return J of each frame under SAM 2's own rule: float64 (S, frames)."""
        known = _REFERENCES.setdefault(self.backbone, {})
        words = (self.config.prompt, self.config.score, self.config.frames)
        keys = [draw.target.key(*words) for draw in draws]
        missing = {key: draw for key, draw in zip(keys, draws, strict=True) if key not in known}
        size = min(self.num_envs, _TRACKED_TOGETHER)
        for first in range(0, len(missing), size):
            chunk = list(missing)[first : first + size]
            own = [missing[key] for key in chunk]
            found = self._play_reference(own + own[-1:] * (size - len(own)))
            known |= zip(chunk, found, strict=False)
        return np.stack([known[key] for key in keys])

    def _play_reference(self, draws: Sequence[Draw[VideoTarget]]) -> np.ndarray:
        """Track targets under SAM 2's own rule; returns J of each frame, float64 (S, frames)."""
        bank, rows = MemoryBank(self.tracker, len(draws)), np.arange(len(draws))
        oldest = np.full(len(draws), bank.num_slots - 1)
        truth, js = self._padded_truth(draws), np.full((len(draws), self.config.frames), np.nan)
        valid = to_device(np.stack([draw.valid for draw in draws]), self.device)
        lengths = np.array([len(draw.target.frames) for draw in draws])
        self._prompt(bank, rows, [draw.target for draw in draws])
        for frame in range(1, int(lengths.max())):
            # Those that are over wait at their last frame.
            now = np.minimum(frame, lengths - 1)
            targets = [draw.target.at(at) for draw, at in zip(draws, now.tolist(), strict=True)]
            decoded = bank.track(rows, self._features(targets), now, lengths)
            index = to_device(rows, self.device)
            true = truth[index, to_device(now, self.device)]
            scores = self._score(decoded.entry.logits, true, valid, targets)
            js[frame < lengths, frame] = scores[frame < lengths]
            bank.keep(rows, oldest)
        return js

    def _score(
        self, logits: Tensor, truth: Tensor, valid: Tensor, targets: Sequence[VideoTarget]
    ) -> np.ndarray:
        """Return J of masks, 1 where both are empty: float64 (S,), NaN where there is no truth.

        Args:
            logits: float32 (S, hm, wm).
            truth: bool (S, hm, wm).
            valid: bool (S, hm, wm), the part of the frame that is no padding.
            targets: S, at their present frames.
        """
        threshold = self.backbone.mask_threshold
        if self.config.score == "full":
            at_size = self.backbone.masks_at
            found = [at_size(own, t.size) for own, t in zip(logits, targets, strict=True)]
            at_host = [to_host(own > threshold)[0] for own in found]
            pairs = zip(at_host, targets, strict=True)
            js = np.array([metrics.iou(mask, target.mask) for mask, target in pairs])
        else:
            masks = logits > threshold
            empty = ~((masks | truth) & valid).any(dim=(1, 2))
            (js,) = to_host(metrics.batch_iou(masks, truth, valid) + empty.float())
        known = [target.frames[target.now].annotated[target.number] for target in targets]
        return np.where(known, js.astype(np.float64), np.nan)

    def scale_of(self, size: tuple[int, int]) -> np.ndarray:
        """Return pixels of the input frame per pixel of a (height, width) video: (x, y)."""
        return np.array(self.backbone.input_size(size))[::-1] / np.array(size)[::-1]

    # Information, pictures -----------------------------------------------------------------------

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(indices)
        tracked = ~np.isnan(self.js[rows])
        count = np.maximum(tracked.sum(axis=1), 1)
        own, reference = (
            np.where(tracked, js[rows], 0.0).sum(axis=1) / count
            for js in (self.js, self.reference_js)
        )
        targets = [self._target(i) for i in rows.tolist()]
        names = [self.dataset.categories[target.category] for target in targets]
        return {
            "iou": own,
            "sam2_iou": reference,
            "gain": own - reference,
            "target_name": np.array(names, object),
            "source": np.array([target.source for target in targets], object),
        }

    def _picture(self, env_index: int) -> np.ndarray:
        return self._target(env_index).picture

    def _first_picture(self) -> np.ndarray:
        image: np.ndarray = self.dataset[0].image(0)
        return image
