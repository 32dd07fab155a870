"""A click agent beside a person: where would it click next?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from agents.annotation.clicks import UnknownCategory, check_categories, check_others
from agents.annotation.presence import Calibration, Presence
from agents.baselines.base import TrainedAgent
from agents.search import best_clicks
from agents.tasks import task_of_policy
from sam_gym.backbones import BackboneService
from sam_gym.backbones.embeddings.store import shared_store
from sam_gym.backbones.features import ImageFeatures
from sam_gym.envs.base_core import in_cells
from sam_gym.simulation.clicks import cell_centres
from sam_gym.utils.transfer import to_host

#: A click (x, y, positive), in pixels of the input frame -> mask logits (hm, wm) after it.
Preview = Callable[[tuple[float, float, bool]], Tensor]
#: Mask logits before the first click, as environments begin.
_EMPTY = -20.0
#: Maximum number of known names that are listed.
_LISTED = 12


@dataclass(frozen=True)
class Proposal:
    """What the agent makes of an object so far.

    Attributes:
        chances: float32 (2, grid, grid), probabilities of positive and of negative clicks on cells
            of the input frame.
        click: (x, y, positive) of the action that it would take, in pixels of the input frame, or
            None.
        other: the action if it is no click: "stop" or "undo".
    """

    chances: np.ndarray
    click: tuple[float, float, bool] | None
    other: str | None


class PinnedImages:
    """The features of the images that people have open, for any thread.

    Args:
        backbone: the SAM.

    Attributes:
        lock: held while the store, or a policy's words, are in use.
    """

    def __init__(self, backbone: BackboneService) -> None:
        self.store, self.lock = shared_store(backbone), threading.Lock()

    def pin(self, image: np.ndarray) -> tuple[int, ImageFeatures]:
        """Encode an image uint8 (H, W, 3); returns its handle in the store, and its features.

        Raises:
            MemoryError: people have more images open than the store holds.
        """
        with self.lock:
            (handle,) = self.store.acquire([image])
            return handle, self.store.gather(np.array([handle]))

    def unpin(self, handle: int) -> None:
        """Let an image go."""
        with self.lock:
            self.store.unpin(handle)


class ClickPlayer:
    """Proposes the next action of a click agent on images of any number of people.

    Args:
        agent: the agent.
        calibration: of its score of presence, or None.

    Attributes:
        backbone: the SAM that the agent was trained on.
        needs_cue: whether a first click must show the object to the agent.

    Raises:
        ValueError: the agent is no click agent.
    """

    def __init__(self, agent: TrainedAgent, calibration: Calibration | None = None) -> None:
        self.policy = policy = agent.policy
        task_of_policy(policy).require("annotate")
        check_others(policy)
        self.backbone: BackboneService = policy.features_extractor.backbone
        self.images = PinnedImages(self.backbone)
        self.needs_cue = "cue_click" in policy.observation_space.spaces
        self.max_steps = int(policy.features["max_steps"])
        self._presence: Presence | None = None
        if calibration is not None and not self.needs_cue:
            self._presence = Presence(calibration, self.backbone, self.known)
        policy.set_training_mode(False)

    @property
    def known(self) -> list[str]:
        """Names that the agent was trained on; it may take others."""
        return list(self.policy.features.get("vocabulary") or self.policy.features["categories"])

    def known_text(self) -> str:
        """Return what the agent knows, for people."""
        names = self.known
        more = f" and {len(names) - _LISTED:,} others" if len(names) > _LISTED else ""
        return f"This agent knows: {', '.join(names[:_LISTED])}{more}"

    @torch.no_grad()
    def presence(
        self, image: np.ndarray, logits: Tensor, predicted: Sequence[float], name: str
    ) -> float | None:
        """Return the probability that an image shows what the agent has segmented.

        Args:
            image: uint8 (H, W, 3).
            logits: mask logits (hm, wm).
            predicted: predicted IoU of the masks after each click.
            name: of the object.

        Returns:
            The presence; None: the agent is not calibrated, or does not know the name.
        """
        if self._presence is None or name not in self.known:
            return None
        cells = to_host(in_cells(self.backbone, logits.sigmoid()[None, None]))[0][0, 0]
        with self.images.lock:
            return self._presence.score_of_mask(
                cells, np.array(predicted), image, self.known.index(name)
            )

    @torch.no_grad()
    def propose(
        self,
        image: np.ndarray,
        handle: int,
        logits: Tensor | None,
        steps: int,
        names: Sequence[str],
        cue: tuple[float, float] | None = None,
        preview: Preview | None = None,
    ) -> Proposal:
        """Return click probabilities, and the action that the agent would take.

        Args:
            image: uint8 (H, W, 3).
            handle: of the pinned image.
            logits: mask logits (hm, wm) of the object so far; None: nothing yet.
            steps: number of clicks so far.
            names: name of the object, followed by names of others in the image.
            cue: (x, y) of a click that shows the object, in pixels of the input frame.
            preview: decodes clicks for the policy's search; None: the likeliest action.

        Raises:
            ValueError: the agent does not know a name, or needs a cue.
        """
        backbone, policy = self.backbone, self.policy
        if logits is None:
            logits = torch.full(backbone.mask_shape, _EMPTY, device=backbone.device)
        observation = {
            "handle": np.array([[handle]], np.int32),
            "sam_pred_mask_prob": to_host(in_cells(backbone, logits.sigmoid()[None, None]))[0][0],
            "target_category": np.zeros(1, np.int64),
            "num_steps": np.array([min(steps, self.max_steps)], np.int64),
        }
        if self.needs_cue:
            if cue is None:
                raise ValueError("This agent segments the object that you click: click it first.")
            observation["cue_click"] = np.array([cue], np.float32) / backbone.image_size
        with self.images.lock:
            if not self.needs_cue:
                try:
                    check_categories(policy, names)
                except UnknownCategory:  # its options are those of command lines
                    known = self.known_text()
                    raise ValueError(f"{known}; use Suggest for other things.") from None
            self.images.store.compute_features({handle: image})
            tensors, _ = policy.obs_to_tensor(observation)
            with policy.playing():
                all_logits, _ = policy.logits_and_value(tensors)
                action = int(all_logits[0].argmax())
                if preview is not None and policy.search:
                    own = _OneObject(self, image.shape[:2], logits, preview)
                    action = int(best_clicks(policy, cast(Any, own), tensors, all_logits)[0])
        (chances,) = to_host(all_logits[0].softmax(dim=0))
        grid = policy.grid
        maps = chances[: 2 * grid**2].reshape(2, grid, grid)
        if action >= 2 * grid**2:
            return Proposal(maps, None, policy.others[action - 2 * grid**2])
        return Proposal(maps, self.click_of(action, image.shape[:2]), None)

    def click_of(self, action: int, size: tuple[int, int]) -> tuple[float, float, bool]:
        """Return the click (x, y, positive) of an action on an image of (H, W).

        It is in pixels of the input frame, and in the image.
        """
        grid = self.policy.grid
        negative, cell = divmod(action, grid**2)
        side = self.backbone.image_size / grid
        x, y = cell_centres(np.array(cell), grid, (side, side)).tolist()
        height, width = self.backbone.input_size(size)
        return min(x, width - 1.0), min(y, height - 1.0), not negative


class _OneObject:
    """The object that a person and the agent segment: what `best_clicks` needs of a `ClickCore`.

    Args:
        player: the agent.
        size: (H, W) of the image.
        logits: mask logits (hm, wm) so far.
        preview: decodes a click.
    """

    def __init__(
        self, player: ClickPlayer, size: tuple[int, int], logits: Tensor, preview: Preview
    ) -> None:
        self.backbone, self.device = player.backbone, player.backbone.device
        self._player, self._size, self._preview = player, size, preview
        self._logits = logits

    def current_logits(self, indices: np.ndarray) -> Tensor:
        return self._logits[None]

    def playing(self) -> np.ndarray:
        return np.arange(1)

    def previews_at_once(self, count: int) -> int:
        return 1

    def preview(self, indices: np.ndarray, actions: np.ndarray) -> tuple[Tensor, Tensor]:
        logits = self._preview(self._player.click_of(int(actions[0]), self._size))
        return logits[None], logits.new_zeros(1)
