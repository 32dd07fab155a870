"""Videos that are tracked frame by frame, with an observation of what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.video.bank import MemoryBank
from sam_gym.backbones.video.unroll import Decoded
from sam_gym.data import VideoDataset
from sam_gym.envs.base_core import FRAME_HEIGHT, Draw, in_cells
from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.envs.video.core import VideoCore, VideoTarget
from sam_gym.metrics import masks as metrics
from sam_gym.utils.transfer import to_device, to_host

#: Columns of the observation `places`.
PLACE_COLUMNS = ("exists", "age", "predicted_iou", "presence", "area", "overlap", "similarity")
#: Number of masks that SAM 2 predicts beside the one that is chosen.
NUM_RIVALS = 2


class FrameByFrameCore(VideoCore):
    """Tracks the objects of all sub-environments in one batch, a frame in a step.

    State of an episode: its target, and what the tracker remembers of it. A task implements
    `step`, and `_describe`, its part of a picture's caption.

    Args:
        config: arguments of the environment.
        num_envs: number of sub-environments.
        dataset: replaces the dataset of the config.
        num_prompted: number of frames that can be prompted.
    """

    #: Arrays of an episode, beside what is remembered.
    episode_arrays: tuple[str, ...] = (
        "steps",
        "lengths",
        "js",
        "reference_js",
        "rivals",
        "relations",
    )
    action_space: spaces.Discrete

    def __init__(
        self,
        config: SamVideoConfig,
        num_envs: int,
        dataset: VideoDataset | None = None,
        num_prompted: int = 1,
    ) -> None:
        super().__init__(config, num_envs, dataset)
        #: What is remembered of each object.
        self.bank = MemoryBank(self.tracker, num_envs, num_prompted)
        places = self.bank.present + 1
        self.observation_space = self._make_observation_space()
        #: Predicted IoU of the masks that were not chosen, the highest first, and their IoU with
        #: the one that was.
        self.rivals = np.zeros((num_envs, NUM_RIVALS, 2), np.float32)
        #: Area of the mask of each place, its IoU with the present mask, and the similarity of
        #: their object pointers.
        self.relations = np.zeros((num_envs, places, 3), np.float32)
        #: The masks that were not chosen, the one of the highest predicted IoU first.
        self.rival_masks = torch.zeros(
            (num_envs, NUM_RIVALS, *self.backbone.mask_shape),
            dtype=torch.bool,
            device=self.device,
        )

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

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[VideoTarget]]) -> None:
        draws = [draw._replace(target=draw.target.at(1)) for draw in draws]
        super()._begin(indices, draws)
        rows = np.asarray(indices)
        self.reference_js[rows] = self._references(draws)
        self._prompt(self.bank, rows, [draw.target for draw in draws])
        self._track(rows)

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

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return actions as int64 (num_envs,); raise `ValueError` if one is out of range."""
        array, last = np.asarray(actions), int(self.action_space.n) - 1
        if array.shape != (self.num_envs,) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"Expected {self.num_envs} integer actions, got {array.dtype} {array.shape}."
            )
        if array.min() < 0 or array.max() > last:
            bad = array[(array < 0) | (array > last)][0]
            raise ValueError(f"Action {bad} is out of range: expected {self._named_actions}.")
        return array.astype(np.int64)

    @property
    def _named_actions(self) -> str:
        """The valid actions and what they do, for messages."""
        raise NotImplementedError

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
        rivals, self.rival_masks[index] = _rivals(decoded, self.backbone.mask_threshold)
        (self.rivals[indices],) = to_host(rivals)
        self._judge(indices, decoded.entry.logits)

    def _judge(self, indices: np.ndarray, logits: Tensor) -> None:
        """Score present masks (S, hm, wm), and relate them to those of all places."""
        index = to_device(indices, self.device)
        self.js[indices, self.now[indices]] = self._present_js(indices, logits)
        (self.relations[indices],) = to_host(self._relate(index))

    def _present_js(self, indices: np.ndarray, logits: Tensor) -> np.ndarray:
        """Return J of masks (S, hm, wm) of the present frames, see `_score`."""
        index = to_device(indices, self.device)
        truth = self._truth[index, to_device(self.now[indices], self.device)]
        targets = [self._target(i) for i in indices.tolist()]
        return self._score(logits, truth, self._valid[index], targets)

    def _relate(self, index: Tensor) -> Tensor:
        """Compare the present mask and pointer with those of all places: see `relations`."""
        bank = self.bank
        masks, pointers = bank.masks[index], bank.pointers[index]
        area = masks.float().mean(dim=(2, 3))
        overlap = metrics.batch_iou(masks, masks[:, -1:])
        alike = F.cosine_similarity(pointers, pointers[:, -1:], dim=2).clamp(-1, 1)
        return torch.stack([area, overlap, alike], dim=2)

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
        return super().info(rows) | {
            "predicted_iou": self.bank.ious[rows, self.bank.present].astype(np.float64),
            "frame": self.now[rows],
        }

    def mask(self, env_index: int) -> np.ndarray:
        """Return the present mask at the size of the video: bool (H, W)."""
        size = self._target(env_index).size
        full = self.backbone.masks_at(self.bank.logits[env_index], size)
        return to_host(full > self.backbone.mask_threshold)[0]

    def render(self, env_index: int, height: int = FRAME_HEIGHT) -> np.ndarray:
        """Draw the present mask, `height` pixels high, with a caption.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_episode

        target = self._target(env_index)
        own = self.info([env_index])
        return draw_episode(
            target.picture,
            self.mask(env_index),
            target=target.mask,
            caption=f"frame {target.now}  J {own['iou'][0]:.2f} ({own['gain'][0]:+.2f})  "
            f"{self._describe(env_index)}",
            height=height,
        )

    def _describe(self, env_index: int) -> str:
        """Return the task's part of a caption."""
        raise NotImplementedError


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
