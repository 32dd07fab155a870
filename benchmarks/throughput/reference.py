"""The reference of `throughput`: one `SamPredictor` per environment, one step at a time."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from sam_gym.backbones import BACKBONES, Backbone, BackboneSpec
from sam_gym.backbones.spec import HUB_PREFIX, backbones_by_size
from sam_gym.envs.click import ClickCore, ClickTarget
from sam_gym.metrics import masks as metrics


def check_comparable(name: str) -> None:
    """Raise `ValueError` for a backbone that `SamPredictor` does not support."""

    def is_plain(spec: BackboneSpec) -> bool:
        return spec.features == BackboneSpec.features and spec.memory is None

    if name.startswith(HUB_PREFIX) or not is_plain(BACKBONES.get(name)):
        comparable = [spec.name for spec in backbones_by_size() if is_plain(spec)]
        raise ValueError(
            f"{name}: segment_anything's SamPredictor does not support this backbone, so "
            f"there is no reference. Pass one of: {', '.join(comparable)}."
        )


def plain_sam(backbone: Backbone) -> Sam:
    """Build segment_anything's model with the weights of a backbone, unmodified, in float32."""
    sam = BACKBONES.get(backbone.name).build()
    sam.load_state_dict(backbone.private_copy().state_dict())
    return sam.to(backbone.device).eval().requires_grad_(False)


class PredictorEnv(gym.Env[Any, Any]):
    """The click task as research code implements it (the design of AlignSAM's environments).

    The model is shared. Each environment encodes the image at every reset, copies the embedding
    into every observation, and upsamples the mask to image size for scoring. Targets, clicks and
    mask selection are those of `SamSeg-v0`.

    Args:
        sam: the model.
        core: draws targets and maps actions to clicks.
    """

    def __init__(self, sam: Sam, core: ClickCore) -> None:
        self.predictor, self.core = SamPredictor(sam), core
        self.action_space = core.action_space
        size = core.backbone.image_size
        mask = gym.spaces.Box(0, 1, (size, size), np.float32)
        embedding = gym.spaces.Box(-np.inf, np.inf, core.backbone.embedding_shape, np.float32)
        self.observation_space = gym.spaces.Dict(
            {
                "image": gym.spaces.Box(0, 255, (size, size, 3), np.uint8),
                "sam_image_embeddings": embedding,
                "sam_pred_mask_prob": mask,
                "target_category": gym.spaces.Discrete(len(core.dataset.categories)),
                "num_steps": gym.spaces.Discrete(core.config.max_steps + 1),
            }
        )
        self.target: ClickTarget
        self.low_res: np.ndarray | None = None
        #: bool (hm, wm), the mask after the last click; kept by a reset.
        self.last_mask = np.zeros(core.backbone.mask_shape, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.target = self.core.draw(self.np_random)
        self.predictor.set_image(self.target.image)
        self.points: list[tuple[float, float]] = []
        self.labels: list[int] = []
        self.low_res = None
        self.iou, self.steps = 0.0, 0
        self.probability: np.ndarray = np.zeros(self.target.mask.shape, np.float32)
        return self._observation(), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        x, y, positive = self.core.click_of(action)
        height, width = self.core.backbone.input_size(self.target.mask.shape)
        image_height, image_width = self.target.mask.shape
        self.points.append(
            (
                min(x, width - 1.0) * image_width / width,
                min(y, height - 1.0) * image_height / height,
            )
        )
        self.labels.append(int(positive))
        logits, quality, low_res = self.predictor.predict(
            np.array(self.points),
            np.array(self.labels),
            mask_input=self.low_res,
            multimask_output=len(self.points) == 1,
            return_logits=True,
        )
        best = int(quality.argmax())
        self.low_res = low_res[best : best + 1]
        self.last_mask = self.low_res[0] > 0
        self.probability = torch.from_numpy(logits[best]).sigmoid().numpy()
        before = self.iou
        self.iou = metrics.iou(logits[best] > 0, self.target.mask, self.target.ignore)
        self.steps += 1
        truncated = self.steps >= self.core.config.max_steps
        return self._observation(), self.iou - before, False, truncated, {"iou": self.iou}

    def _observation(self) -> dict[str, Any]:
        size = self.core.backbone.image_size
        height, width = self.target.mask.shape
        frame = np.zeros((size, size, 3), np.uint8)
        probability: np.ndarray = np.zeros((size, size), np.float32)
        if (height, width) == (size, size):
            frame, probability = self.target.image.copy(), self.probability.copy()
        else:
            import cv2

            rows, columns = self.core.backbone.input_size((height, width))
            frame[:rows, :columns] = cv2.resize(self.target.image, (columns, rows))
            probability[:rows, :columns] = cv2.resize(self.probability, (columns, rows))
        return {
            "image": frame,
            "sam_image_embeddings": self.predictor.features[0].cpu().numpy().copy(),
            "sam_pred_mask_prob": probability,
            "target_category": self.target.category,
            "num_steps": self.steps,
        }
