"""`SamVideo-v0`: decide what a video tracker remembers."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.spec import backbone_help
from sam_gym.backbones.video.bank import MemoryBank
from sam_gym.backbones.video.prompting import PromptKind, first_prompts
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.video.unroll import Decoded
from sam_gym.data import VideoDataset
from sam_gym.data.cache import CachedFrame, FrameCache
from sam_gym.data.options import VideoDatasetOptions
from sam_gym.envs.base_core import FRAME_HEIGHT, MAX_DRAWS, BaseCore, Draw, EnvConfig, in_cells
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv
from sam_gym.metrics import masks as metrics
from sam_gym.utils.fields import documented
from sam_gym.utils.lowres import frame_mask
from sam_gym.utils.settings import whole
from sam_gym.utils.transfer import to_device, to_host

#: Arrays of a `VideoCore` that `get_state` saves, beside what is remembered.
EPISODE_ARRAYS = ("steps", "lengths", "js", "reference_js", "num_kept", "rivals", "relations")
#: Columns of the observation `places`.
PLACE_COLUMNS = ("exists", "age", "predicted_iou", "presence", "area", "overlap", "similarity")
#: Number of masks that SAM 2 predicts beside the one that is chosen.
NUM_RIVALS = 2
#: Maximum number of objects that are tracked together for `VideoCore.reference_js`. The number is
#: the same for all episodes, so that the last bits do not depend on which others are missing.
_TRACKED_TOGETHER = 8
#: Backbone -> digest of a target -> J in each frame under SAM 2's own rule. Small arrays, which
#: cost as much to compute as an episode.
_REFERENCES: weakref.WeakKeyDictionary[Any, dict[bytes, np.ndarray]] = weakref.WeakKeyDictionary()


@documented
@dataclass(frozen=True, kw_only=True)
class SamVideoConfig(VideoDatasetOptions, EnvConfig):
    """Arguments of `SamVideo-v0`."""

    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("SAM 2 to track with"))] = (
        "micro_video"
    )
    prompt: PromptKind = "mask"
    """Prompt of the object in the first frame: its mask, its box, or a click on its innermost
    pixel."""
    frames: Annotated[int, whole(3, 1000)] = 24
    """Maximum number of frames of an episode. A longer video is cut at random."""
    score: Literal["low", "full"] = "low"
    """Compute J on SAM's low-res masks, or at the size of the video (slower)."""

    def validate(self) -> None:
        super().validate()
        self.options_of(self.dataset)

    def open_dataset(self) -> VideoDataset:
        """Open the dataset; raises as `make_video_dataset` does."""
        takes = self.registry.get(self.dataset).parameters
        return self.make_dataset(
            self.split, **({"frames": self.frames} if "frames" in takes else {})
        )

    @property
    def held_out_split(self) -> str:
        split: str = self.registry.get(self.dataset).held_out_split
        return split

    @property
    def max_episode_steps(self) -> int:
        # The first frame is prompted, the second is tracked without a choice.
        return self.frames - 2


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
    """The task of choosing memories: all sub-environments share one call of the model per step.

    State of an episode: its target, and what the tracker remembers of it. Arguments as for
    `BaseCore`, with a `VideoDataset`.
    """

    episode_arrays: tuple[str, ...] = EPISODE_ARRAYS
    reported = ("sam2_iou", "gain", "kept")
    noun = "video"
    action_space: spaces.Discrete

    def __init__(
        self, config: SamVideoConfig, num_envs: int, dataset: VideoDataset | None = None
    ) -> None:
        super().__init__(config, num_envs, dataset)
        #: What is remembered of each object.
        self.bank = MemoryBank(self.tracker, num_envs)
        places, mask_shape = self.bank.present + 1, self.backbone.mask_shape
        self.action_space = spaces.Discrete(self.bank.num_slots + 1)
        self.observation_space = self._make_observation_space()
        #: Number of frames of each episode.
        self.lengths = np.full(num_envs, config.frames, np.int64)
        #: J of each frame; NaN where it was not tracked yet, or is not annotated.
        self.js = np.full((num_envs, config.frames), np.nan)
        #: J of each frame under SAM 2's own rule.
        self.reference_js = np.full((num_envs, config.frames), np.nan)
        #: Number of frames that were kept.
        self.num_kept = np.zeros(num_envs, np.int64)
        #: Predicted IoU of the masks that were not chosen, the highest first, and their IoU with
        #: the one that was.
        self.rivals = np.zeros((num_envs, NUM_RIVALS, 2), np.float32)
        #: Area of the mask of each place, its IoU with the present mask, and the similarity of
        #: their object pointers.
        self.relations = np.zeros((num_envs, places, 3), np.float32)
        device = self.device
        #: The masks that were not chosen, the one of the highest predicted IoU first.
        self.rival_masks = torch.zeros(
            (num_envs, NUM_RIVALS, *mask_shape), dtype=torch.bool, device=device
        )
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.bank.tracker = self.tracker

    def _make_observation_space(self) -> spaces.Dict:
        backbone, full = self.backbone, self.config.obs == "full"
        places, depth = self.bank.present + 1, self.bank.pooled.shape[-1]
        cells = backbone.embedding_shape[1:]
        return spaces.Dict(
            {
                **self._image_spaces(),
                "sam_pred_mask_prob": spaces.Box(0, 1, backbone.mask_shape, np.float32)
                if full
                else spaces.Box(0, 255, cells, np.uint8),
                "rivals": spaces.Box(0, 1, (NUM_RIVALS, 2), np.float32),
                "places": spaces.Box(-1, 1, (places, len(PLACE_COLUMNS)), np.float32),
                "memories": spaces.Box(-np.inf, np.inf, (places, depth), np.float32),
                "progress": spaces.Box(0, 1, (1,), np.float32),
            }
        )

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
        draws = [draw._replace(target=draw.target.at(1)) for draw in draws]
        super()._begin(indices, draws)
        rows, index = np.asarray(indices), to_device(np.asarray(indices), self.device)
        self._truth[index] = self._padded_truth(draws)
        self._valid[index] = to_device(np.stack([draw.valid for draw in draws]), self.device)
        self.lengths[rows] = [len(draw.target.frames) for draw in draws]
        self.js[rows], self.num_kept[rows] = np.nan, 0
        self.reference_js[rows] = self._references(draws)
        self._prompt(self.bank, rows, [draw.target for draw in draws])
        self._track(rows)

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

    def get_state(self) -> list[dict[str, Any]]:
        rivals = to_host(self.rival_masks)[0]
        return [
            row | {"rival_masks": rivals[i].copy(), "bank": self.bank.get_state(i)}
            for i, row in enumerate(super().get_state())
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        super().set_state(state, rngs)
        self.bank.set_state(range(self.num_envs), [row["bank"] for row in state])
        rivals = np.stack([row["rival_masks"] for row in state])
        self.rival_masks[:] = to_device(rivals, self.device)
        self._go_on(np.arange(self.num_envs))

    # Steps -------------------------------------------------------------------------------------

    @property
    def now(self) -> np.ndarray:
        """Present frame of each sub-environment, int64 (num_envs,)."""
        return self.steps + 1

    @property
    def sam2_action(self) -> int:
        """The action of SAM 2's own rule: overwrite the oldest memory."""
        return self.bank.num_slots

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return actions as int64 (num_envs,); raise `ValueError` if one is out of range."""
        array, last = np.asarray(actions), self.bank.num_slots
        if array.shape != (self.num_envs,) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"Expected {self.num_envs} integer actions, got {array.dtype} {array.shape}."
            )
        if array.min() < 0 or array.max() > last:
            bad = array[(array < 0) | (array > last)][0]
            raise ValueError(
                f"Action {bad} is out of range: expected 0 (keep nothing) to {last} (overwrite "
                f"the memory in slot {last})."
            )
        return array.astype(np.int64)

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_not_over(indices)
        keeping = actions > 0
        if keeping.any():
            self.bank.keep(indices[keeping], actions[keeping] - 1)
            self.num_kept[indices[keeping]] += 1
        self.steps[indices] += 1
        self._go_on(indices)
        self._track(indices)
        frames = self.now[indices]
        gain = self.js[indices, frames] - self.reference_js[indices, frames]
        # The video is over, and nothing follows: this is no time limit.
        return np.nan_to_num(gain), self._is_over(indices), np.zeros(len(indices), bool)

    def _is_over(self, indices: np.ndarray) -> np.ndarray:
        return self.now[indices] >= self.lengths[indices] - 1

    def _go_on(self, indices: np.ndarray) -> None:
        """Make the frames of the present step those of the targets and handles."""
        rows = indices.tolist()
        targets = [self._target(i).at(int(self.now[i])) for i in rows]
        images, digests = zip(*((own.image, own.digest) for own in targets), strict=True)
        handles = self.store.acquire(images, digests)
        self.release(rows)
        for i, handle, target in zip(rows, handles, targets, strict=True):
            self.handles[i], self.targets[i] = handle, target

    def _track(self, indices: np.ndarray) -> None:
        """Track the objects in their present frames, score their masks, and relate them."""
        now, index = self.now[indices], to_device(indices, self.device)
        features = self.store.gather(to_device(self.handles[indices], self.device), check=False)
        decoded = self.bank.track(indices, features, now, self.lengths[indices])
        truth = self._truth[index, to_device(now, self.device)]
        targets = [self._target(i) for i in indices.tolist()]
        logits = decoded.entry.logits
        self.js[indices, now] = self._score(logits, truth, self._valid[index], targets)
        rivals, self.rival_masks[index] = _rivals(decoded, self.backbone.mask_threshold)
        self.rivals[indices], self.relations[indices] = to_host(rivals, self._relate(index))

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

    def _relate(self, index: Tensor) -> Tensor:
        """Compare the present mask and pointer with those of all places: see `relations`."""
        bank = self.bank
        masks, pointers = bank.masks[index], bank.pointers[index]
        area = masks.float().mean(dim=(2, 3))
        overlap = metrics.batch_iou(masks, masks[:, -1:])
        alike = F.cosine_similarity(pointers, pointers[:, -1:], dim=2).clamp(-1, 1)
        return torch.stack([area, overlap, alike], dim=2)

    @torch.no_grad()
    def next_js(self, indices: np.ndarray) -> np.ndarray:
        """Return J of the next frame after each action, float64 (S, A). Only for oracles."""
        choices = self.bank.num_slots + 1
        rows = np.arange(len(indices) * choices)
        actions = rows % choices
        bank = self.bank.copy(indices, choices)
        bank.keep(rows[actions > 0], actions[actions > 0] - 1)
        each = np.repeat(indices, choices)
        # An episode that is over, and waits for its reset, has no next frame.
        following = np.minimum(self.now + 1, self.lengths - 1)
        now = following[each]
        next_frames = [self._target(i).at(int(following[i])) for i in indices.tolist()]
        repeated = to_device(np.repeat(np.arange(len(indices)), choices), self.device)
        features = self._features(next_frames)[repeated]
        logits = bank.track(rows, features, now, self.lengths[each]).entry.logits
        index = to_device(each, self.device)
        truth = self._truth[index, to_device(now, self.device)]
        targets = [target for target in next_frames for _ in range(choices)]
        js = self._score(logits, truth, self._valid[index], targets)
        return np.nan_to_num(js).reshape(len(indices), choices)

    # Observations ------------------------------------------------------------------------------

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Return what is known of each place: float32 (S, places, 7), see `PLACE_COLUMNS`."""
        bank = self.bank
        exists = bank.frames[indices] >= 0
        ages = self.now[indices][:, None] - bank.frames[indices]
        columns = [
            np.ones(exists.shape),
            ages / (self.config.frames - 1),
            bank.ious[indices].clip(0, 1),
            1 / (1 + np.exp(-bank.scores[indices].clip(-30, 30))),
            *np.moveaxis(self.relations[indices], 2, 0),
        ]
        return (np.stack(columns, axis=2) * exists[..., None]).astype(np.float32)

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        index = to_device(indices, self.device)
        shown = self.bank.logits[index].sigmoid()
        if self.config.obs == "handle":
            shown = in_cells(self.backbone, shown[:, None])[:, 0]
        mask, memories = to_host(shown, self.bank.pooled[index])
        exists = self.bank.frames[indices] >= 0
        progress = self.now[indices] / (self.lengths[indices] - 1)
        return super()._entries(indices) | {
            "sam_pred_mask_prob": mask.copy(),
            "rivals": self.rivals[indices],
            "places": self.places(indices),
            "memories": memories * exists[..., None],
            "progress": progress.astype(np.float32)[:, None],
        }

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
            "predicted_iou": self.bank.ious[rows, self.bank.present].astype(np.float64),
            "kept": self.num_kept[rows].copy(),
            "frame": self.now[rows],
            "target_name": np.array(names, object),
            "source": np.array([target.source for target in targets], object),
        }

    def mask(self, env_index: int) -> np.ndarray:
        """Return the present mask at the size of the video: bool (H, W)."""
        size = self._target(env_index).size
        full = self.backbone.masks_at(self.bank.logits[env_index], size)
        return to_host(full > self.backbone.mask_threshold)[0]

    def _picture(self, env_index: int) -> np.ndarray:
        return self._target(env_index).picture

    def _first_picture(self) -> np.ndarray:
        image: np.ndarray = self.dataset[0].image(0)
        return image

    def render(self, env_index: int, height: int = FRAME_HEIGHT) -> np.ndarray:
        """Draw the present mask, `height` pixels high, and the frames that are remembered.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_episode

        target, bank = self._target(env_index), self.bank
        kept = [frame for frame in bank.frames[env_index, bank.slots].tolist() if frame >= 0]
        own = self.info([env_index])
        return draw_episode(
            target.picture,
            self.mask(env_index),
            target=target.mask,
            caption=f"frame {target.now}  J {own['iou'][0]:.2f} ({own['gain'][0]:+.2f})  "
            f"memory {' '.join(map(str, kept))}",
            height=height,
        )


def _rivals(decoded: Decoded, threshold: float) -> tuple[Tensor, Tensor]:
    """Return predicted IoU of the masks that were not chosen, and IoU with the one that was.

    Returns:
        float32 (S, `NUM_RIVALS`, 2), the highest predicted IoU first; the masks, bool
        (S, `NUM_RIVALS`, hm, wm).
    """
    several = decoded.tokens.iou[:, 1:].float()
    order = several.argsort(dim=1, descending=True)
    masks = decoded.tokens.decode_masks(decoded.tokens.mask_embeddings[:, 1:]) > threshold
    masks = masks.gather(1, order[..., None, None].expand_as(masks))
    predicted = several.gather(1, order)[:, 1:].clamp(0, 1)
    overlap = metrics.batch_iou(masks[:, 1:], masks[:, :1])
    return torch.stack([predicted, overlap], dim=2), masks[:, 1:]


class SamVideoEnv(BaseEnv):
    """Decide which frames a SAM 2 remembers while it tracks an object through a video.

    ## Description

    The object is prompted in the first frame. SAM 2 then finds it in one frame after the other, by
    memories of the prompted frame and of up to K others (6 in SAM 2, 4 in `micro_video`). SAM 2
    itself remembers the latest frames, good or bad. Here the agent sees each mask, with SAM 2's
    own estimates of its quality, and decides whether to remember it, and which memory to give up
    for it. The goal are better masks than under SAM 2's own rule.

    ## Action Space

    `Discrete(K + 1)`, about the present frame:

    | action   | meaning                                                                  |
    |----------|--------------------------------------------------------------------------|
    | 0        | keep nothing                                                             |
    | k = 1..K | remember this frame, and forget the k-th latest memory, if there is one  |

    Action K, always, is SAM 2's own rule: the oldest memory goes. The latest memory has the
    temporal position of the frame before, and so on, also if it is older. Object pointers are those
    of the kept frames among the last 15. The prompted frame always stays.

    ## Observation Space

    A `Dict`. A *place* is the prompted frame, a slot (the latest memory first), or, last, the
    present frame: P = K + 2. Empty places are zero. With `obs="full"`:

    | key                    | space                       | meaning                               |
    |------------------------|-----------------------------|---------------------------------------|
    | `image`                | uint8 (S, S, 3)             | present frame, RGB, in SAM's frame    |
    | `sam_image_embeddings` | float32 (C, h, w)           | its embedding                         |
    | `sam_pred_mask_prob`   | float32 (hm, wm) in [0, 1]  | the present mask                      |
    | `rivals`               | float32 (2, 2) in [0, 1]    | of SAM's two other masks: predicted   |
    |                        |                             | IoU, and IoU with the present mask    |
    | `places`               | float32 (P, 7) in [-1, 1]   | exists; age (fraction of `frames`);   |
    |                        |                             | predicted IoU; probability that the   |
    |                        |                             | object is in the frame; area of the   |
    |                        |                             | mask (fraction of the frame); IoU with|
    |                        |                             | the present mask; cosine similarity   |
    |                        |                             | with the present object pointer       |
    | `memories`             | float32 (P, D)              | memory, averaged over the mask        |
    | `progress`             | float32 (1,)                | present frame, as a fraction          |

    With `obs="handle"` (for training) the first two are replaced by `handle`, int32 (1,), the
    number of the embedding in the store of this process, and the mask is uint8 (h, w).

    ## Rewards

    J (IoU with the truth; 1 if both are empty) of the frame that is tracked next, minus its J under
    SAM 2's own rule. 0 if the frame is not annotated. J is computed on low-res masks
    (`score="low"`) or at the size of the video (`"full"`).

    ## Starting State

    A video and an object that is visible in its first frame, drawn by the environment's random
    generator; `reset(options={"index": i})` takes video `i` instead. Of a video of more than
    `frames` frames, a part is drawn. The second frame has been tracked, from the prompted frame
    only.

    ## Episode End

    *Terminated* when the last frame has been tracked.

    ## Information

    `iou` (mean J of the frames tracked so far), `sam2_iou` (the same under SAM 2's own rule),
    `gain` (their difference), `predicted_iou` (of the present frame), `kept` (number of frames that
    were kept), `frame`, `target_name`, `source` (name of the video).

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamVideo-v0", frames=24, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.video.SamVideoConfig`. The vector environment,
    `gym.make_vec("SamVideo-v0", num_envs=32, vectorization_mode="vector_entry_point")`, tracks the
    objects of all sub-environments in one batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **kwargs: fields of `SamVideoConfig`.

    Raises:
        ValueError: an argument is unknown or impossible, or the data does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamVideo-v0"
    config_class = SamVideoConfig
    core_class = VideoCore
    core: VideoCore


class SamVideoVectorEnv(BaseVectorEnv):
    """`SamVideo-v0` in a batch: all sub-environments share one call of the model per step.

    With `reset(seed=seed)`, sub-environment `i` behaves as the scalar environment with
    `seed + i`. Arguments as for `BaseVectorEnv`, with the fields of `SamVideoConfig`.
    """

    env_id = SamVideoEnv.env_id
    config_class = SamVideoEnv.config_class
    core_class = SamVideoEnv.core_class
    core: VideoCore
