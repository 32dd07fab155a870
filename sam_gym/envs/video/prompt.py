"""The task `prompt` of `SamVideo-v0`: decide in which frame, and where, a clip is clicked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from sam_gym.backbones.video.memory import ABSENT
from sam_gym.data import VideoDataset
from sam_gym.envs.base_core import FRAME_HEIGHT, Draw, in_cells
from sam_gym.envs.handles import HandleSpace
from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.envs.video.core import VideoCore, VideoTarget
from sam_gym.envs.video.session import StoredSession, StoredVideo
from sam_gym.simulation.clicks import Click, error_click, interior_distance
from sam_gym.utils.transfer import to_device, to_host

#: Columns of the observation `frames`.
FRAME_COLUMNS = ("exists", "prompted", "predicted_iou", "presence", "area")
#: Values of the last part of an action.
NEGATIVE, POSITIVE, STOP = range(3)


class PromptCore(VideoCore):
    """Click any frame of a clip, all of which is tracked again; arguments as for `BaseCore`.

    Clicks and masks are those of `VideoTracker`. State of an episode: its target, the clicks, and
    what the tracker knows of each frame.
    """

    episode_arrays: tuple[str, ...] = (
        *("steps", "lengths", "js", "reference_js"),
        *("stopped", "shown", "ious", "scores", "clicks"),
    )
    reported = ("sam2_iou", "gain", "clicks")
    action_space: spaces.MultiDiscrete
    sam2_action = np.array([0, 0, STOP])

    def __init__(
        self, config: SamVideoConfig, num_envs: int, dataset: VideoDataset | None = None
    ) -> None:
        super().__init__(config, num_envs, dataset)
        count, grid, shape = config.frames, config.grid, self.backbone.mask_shape
        self.session = StoredSession(self.tracker, self.store, num_envs)
        self.action_space = spaces.MultiDiscrete([count, grid**2, 3])
        self.observation_space = self._make_observation_space()
        #: Whether an episode was ended by its agent.
        self.stopped = np.zeros(num_envs, bool)
        #: Frame that is drawn: the one that was clicked last.
        self.shown = np.zeros(num_envs, np.int64)
        #: Predicted IoU of each frame, and the logit that the object is in it.
        self.ious = np.zeros((num_envs, count), np.float32)
        self.scores = np.full((num_envs, count), ABSENT, np.float32)
        #: Cells that were clicked in each frame, negatively and positively: 0 or 1.
        self.clicks = np.zeros((num_envs, count, 2, grid, grid), np.uint8)
        #: Low-res masks.
        self.logits = torch.full((num_envs, count, *shape), ABSENT, device=self.device)
        #: Handles of all frames; those beyond the end are the last one's.
        self.frame_handles = np.full((num_envs, count), -1, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        tracked = [self.session.get_state(i) for i in self._held]
        return super().__getstate__() | {"session": tracked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tracked = state["session"]
        super().__setstate__(state)
        self.session = StoredSession(self.tracker, self.store, self.num_envs)
        for i, own in zip(self._held, tracked, strict=True):
            self._pin_frames([i])
            self.session.videos[i] = self._stored(i)  # type: ignore[index]
            self.session.set_state(i, own)

    @property
    def _held(self) -> list[int]:
        """Sub-environments that have an episode."""
        return np.flatnonzero(self.handles >= 0).tolist()

    def _make_observation_space(self) -> spaces.Dict:
        backbone, count, grid = self.backbone, self.config.frames, self.config.grid
        size, cells = backbone.image_size, backbone.embedding_shape[1:]
        images: dict[str, spaces.Space] = {"handle": HandleSpace((count,))}
        # With an axis for channels, nobody takes the frames of a clip for the channels of an image.
        mask: spaces.Space = spaces.Box(0, 255, (count, 1, *cells), np.uint8)
        if self.config.obs == "full":
            shape = (count, *backbone.embedding_shape)
            images = {
                "image": spaces.Box(0, 255, (count, size, size, 3), np.uint8),
                "sam_image_embeddings": spaces.Box(-np.inf, np.inf, shape, np.float32),
            }
            mask = spaces.Box(0, 1, (count, 1, *backbone.mask_shape), np.float32)
        return spaces.Dict(
            {
                **images,
                "sam_pred_mask_prob": mask,
                "frames": spaces.Box(0, 1, (count, len(FRAME_COLUMNS)), np.float32),
                "clicks": spaces.Box(0, 1, (count, 2, grid, grid), np.uint8),
                "budget": spaces.Box(0, 1, (1,), np.float32),
            }
        )

    # Episodes ----------------------------------------------------------------------------------

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[VideoTarget]]) -> None:
        super()._begin(indices, draws)
        rows = np.asarray(indices)
        self.stopped[rows], self.shown[rows], self.clicks[rows] = False, 0, 0
        self._pin_frames(indices)
        for i in indices:
            self.session.start(i, self._stored(i), **self._first_prompt(i))
        self._play(rows)
        self.reference_js[rows] = self.js[rows]

    def _pin_frames(self, indices: Sequence[int]) -> None:
        """Encode all frames of some targets."""
        frames = [frame for i in indices for frame in self._target(i).frames]
        handles = self.store.acquire(
            [frame.prepared for frame in frames], [frame.digest for frame in frames]
        )
        for i in indices:
            count = len(self._target(i).frames)
            own, handles = handles[:count], handles[count:]
            self.frame_handles[i] = own + own[-1:] * (self.config.frames - count)

    def release(self, indices: Sequence[int]) -> None:
        for i in indices:
            if self.frame_handles[i, 0] >= 0:
                for handle in self.frame_handles[i, : self.lengths[i]].tolist():
                    self.store.unpin(handle)
                self.frame_handles[i] = -1
        super().release(indices)

    def _stored(self, i: int) -> StoredVideo:
        return StoredVideo(self.frame_handles[i, : self.lengths[i]], self._target(i).size)

    def _first_prompt(self, i: int) -> dict[str, Any]:
        """Return the prompt of the first frame, as `TrackingSession.prompt` takes it."""
        mask = self._target(i).at(0).mask
        if self.config.prompt == "mask":
            return {"mask": mask}
        if self.config.prompt == "box":
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            return {"box": (x, y, x + w - 1, y + h - 1)}
        y, x = divmod(int(interior_distance(mask).argmax()), mask.shape[1])
        return {"points": [(x, y)], "labels": [1]}

    def _play(self, rows: np.ndarray) -> None:
        """Track the clips of some sub-environments, and score their masks."""
        logits, self.ious[rows], self.scores[rows] = self.session.play(
            rows.tolist(), self.config.frames
        )
        self.logits[to_device(rows, self.device)] = logits
        self.js[rows] = self._js_of(rows, logits)

    def _js_of(self, rows: np.ndarray, logits: Tensor) -> np.ndarray:
        """Return J of masks (S, T, hm, wm): float64 (S, T), NaN in the first frame, too."""
        places = [(row, t) for row, i in enumerate(rows) for t in range(1, self.lengths[i])]
        row, frame = (np.array(own) for own in zip(*places, strict=True))
        one, time = (to_device(own, self.device) for own in (row, frame))
        every = to_device(rows, self.device)[one]
        targets = [self._target(int(rows[r])).at(t) for r, t in places]
        truth, valid = self._truth[every, time], self._valid[every]
        js = np.full(logits.shape[:2], np.nan)
        js[row, frame] = self._score(logits[one, time], truth, valid, targets)
        return js

    def get_state(self) -> list[dict[str, Any]]:
        logits, held = to_host(self.logits)[0], self._held
        tracked = {i: self.session.get_state(i) for i in held}
        return [
            row | {"logits": logits[i].copy(), "session": tracked.get(i)}
            for i, row in enumerate(super().get_state())
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        super().set_state(state, rngs)
        logits = np.stack([row["logits"] for row in state])
        self.logits[:] = to_device(logits, self.device)
        for i, row in enumerate(state):
            self.session.set_state(i, row["session"])
            self.targets[i] = self._target(i).at(int(self.shown[i]))

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return actions as int64 (num_envs, 3); raise `ValueError` if one is out of range."""
        array, shape = np.asarray(actions), (self.num_envs, 3)
        if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"Expected integer actions (frame, cell, kind) of shape {shape}, got "
                f"{array.dtype} {array.shape}."
            )
        wrong = (array < 0) | (array >= self.action_space.nvec)
        if wrong.any():
            frames, cells, _ = (self.action_space.nvec - 1).tolist()
            raise ValueError(
                f"Action {array[wrong.any(axis=1)][0].tolist()} is out of range: expected a frame "
                f"from 0 to {frames}, a cell from 0 to {cells}, and {NEGATIVE} (negative click), "
                f"{POSITIVE} (positive click) or {STOP} (stop)."
            )
        return array.astype(np.int64)

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_not_over(indices)
        stops = actions[:, 2] == STOP
        self.stopped[indices[stops]] = True
        rows, clicks = indices[~stops], actions[~stops]
        rewards = np.zeros(len(indices))
        if len(rows):
            before = self.mean_js(self.js[rows])
            for i, (frame, cell, kind) in zip(rows.tolist(), clicks.tolist(), strict=True):
                # Frames beyond the end stand for the last one.
                frame = min(frame, int(self.lengths[i]) - 1)
                self._prompt_cell(self.session, i, frame, cell, kind)
                self.clicks[i, frame, kind].flat[cell] = 1
                self.shown[i], self.targets[i] = frame, self._target(i).at(frame)
            self.steps[rows] += 1
            self._play(rows)
            rewards[~stops] = self.mean_js(self.js[rows]) - before - self.config.click_cost
        # The budget is observed: its end is no time limit.
        return rewards, self._is_over(indices), np.zeros(len(indices), bool)

    def _is_over(self, indices: np.ndarray) -> np.ndarray:
        return self.stopped[indices] | super()._is_over(indices)

    def _prompt_cell(
        self, session: StoredSession, i: int, frame: int, cell: int, kind: int
    ) -> None:
        """Click the centre of a cell in a frame, beside earlier clicks there."""
        place = np.array(self._clip_to_image(i, *self.centre_of(cell)))
        pixel = place / self.scale_of(self._target(i).size)
        session.prompt(i, frame, 0, points=[pixel], labels=[int(kind == POSITIVE)], clear=False)

    @staticmethod
    def mean_js(js: np.ndarray) -> np.ndarray:
        """Return mean J over the frames that count, 0 without any: float64 (S,)."""
        known = ~np.isnan(js)
        return np.nan_to_num(js).sum(axis=1) / np.maximum(known.sum(axis=1), 1)

    # Oracles -----------------------------------------------------------------------------------

    def error_in(self, env_index: int, frame: int) -> np.ndarray | None:
        """Return the action of the standard click on the error of a frame. Only for oracles.

        Returns:
            int64 (3,); None where nothing is wrong or known.
        """
        target = self._target(env_index).at(frame)
        if not target.annotated[frame]:
            return None
        click: Click | None = error_click(target.mask, self._mask(env_index, frame))
        if click is None:
            return None
        x, y = np.array(click[:2]) * self.scale_of(target.size)
        return np.array([frame, self.cell_at(x, y), POSITIVE if click.positive else NEGATIVE])

    @torch.no_grad()
    def try_clicks(self, indices: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Return what mean J would be after a click in each of some clips. Only for oracles.

        Args:
            indices: int64 (S,), without repetition.
            actions: int64 (S, 3), clicks.
        """
        session = self.session.copy()
        for i, action in zip(indices.tolist(), actions.tolist(), strict=True):
            self._prompt_cell(session, i, *action)
        logits, *_ = session.play(indices.tolist(), self.config.frames)
        return self.mean_js(self._js_of(indices, logits))

    # Observations ------------------------------------------------------------------------------

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        index, config = to_device(indices, self.device), self.config
        logits = self.logits[index]
        area = (logits > self.backbone.mask_threshold).float().mean(dim=(2, 3))
        shown = logits.sigmoid()
        if config.obs == "handle":
            shown = in_cells(self.backbone, shown)
        mask, areas = to_host(shown, area)
        exists = np.arange(config.frames) < self.lengths[indices, None]
        prompted = np.zeros(exists.shape)
        for row, i in enumerate(indices.tolist()):
            prompted[row, self.session.conditioned(i)] = 1
        presence = 1 / (1 + np.exp(-self.scores[indices].clip(-30, 30)))
        ious = self.ious[indices].clip(0, 1)
        columns = [np.ones(exists.shape), prompted, ious, presence, areas]
        frames = np.stack(columns, axis=2) * exists[..., None]
        left = 1 - self.steps[indices] / config.budget
        return self._images_of(indices) | {
            "sam_pred_mask_prob": mask[:, :, None].copy(),
            "frames": frames.astype(np.float32),
            "clicks": self.clicks[indices],
            "budget": left.astype(np.float32)[:, None],
        }

    def _images_of(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        handles, count = self.frame_handles[indices], self.config.frames
        if self.config.obs == "handle":
            return {"handle": handles.astype(np.int32)}
        flat = to_device(handles.ravel(), self.device)
        (found,) = to_host(self.store.gather(flat, "embedding", check=False).contiguous())
        images = []
        for i in indices.tolist():
            own = [self.backbone.framed(frame.prepared) for frame in self._target(i).frames]
            images.append(np.stack(own + own[-1:] * (count - len(own))))
        return {
            "image": np.stack(images),
            "sam_image_embeddings": found.reshape(len(indices), count, *found.shape[1:]).copy(),
        }

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(indices)
        exists = np.arange(self.config.frames) < self.lengths[rows, None]
        ious = (self.ious[rows] * exists).sum(axis=1) / self.lengths[rows]
        return super().info(rows) | {
            "predicted_iou": ious.astype(np.float64),
            "frame": self.shown[rows],
            "clicks": self.steps[rows],
        }

    # Pictures ----------------------------------------------------------------------------------

    def _mask(self, env_index: int, frame: int) -> np.ndarray:
        """Return the mask of a frame at the size of the video: bool (H, W)."""
        size = self._target(env_index).size
        full = self.backbone.masks_at(self.logits[env_index, frame], size)
        return to_host(full > self.backbone.mask_threshold)[0]

    def render(self, env_index: int, height: int = FRAME_HEIGHT) -> np.ndarray:
        """Draw the frame that was clicked last, `height` pixels high, with a caption.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_episode

        target, own = self._target(env_index), self.info([env_index])
        return draw_episode(
            target.picture,
            self._mask(env_index, target.now),
            target=target.mask,
            caption=f"frame {target.now}  J {own['iou'][0]:.2f} ({own['gain'][0]:+.2f})  "
            f"clicks {self.steps[env_index]}",
            height=height,
        )
