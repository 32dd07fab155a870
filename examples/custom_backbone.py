"""Add a SAM of your own: here `micro` at half its resolution, compared with the original.

python examples/custom_backbone.py
python examples/custom_backbone.py --images 2
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import tyro
from torch.nn import functional as F

from sam_gym import BackboneSpec, Predictor, make_dataset
from sam_gym.backbones import BACKBONES
from sam_gym.backbones.encoders import assemble
from sam_gym.backbones.micro.model import STRIDE, UPSCALING, MicroEncoder
from sam_gym.metrics.masks import iou

#: Side of the input frame in pixels; `micro` has 384.
SIZE = 192


def build() -> Any:
    """Return the model with random weights: an image encoder, and SAM's prompt encoder and decoder.

    The encoder is any module from pixels float32 (B, 3, SIZE, SIZE) to embeddings
    (B, 128, SIZE / 24, SIZE / 24), with the attribute `img_size`.
    """
    encoder = MicroEncoder(img_size=SIZE)
    return assemble(encoder, width=128, mlp_dim=512, stride=STRIDE, upscaling=UPSCALING)


def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of `micro` as weights of this model: one tensor depends on the resolution."""
    name, side = "image_encoder.pos_embed", SIZE // STRIDE
    grid = state[name].permute(0, 3, 1, 2)  # (1, h, w, C) -> (1, C, h, w)
    resized = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return state | {name: resized.permute(0, 2, 3, 1)}


#: `backbone="custom_backbone:HALF"` in commands, environments and worker processes.
HALF = BackboneSpec(
    name="micro_half",
    build=build,
    description="micro with an input of 192 x 192 pixels",
    weights=BACKBONES.get("micro").weights,
    convert=convert,
    thresholds=(0.5, 0.7),
    input_size=SIZE,
)


def main(images: int = 16) -> None:
    """Segment held-out scenes from boxes with both models.

    Args:
        images: Number of images.
    """
    scenes = make_dataset("scenes", split="test", length=images)
    samples = [scenes[index] for index in range(images)]
    corners = [[np.argwhere(mask)[:, ::-1] for mask in sample.masks] for sample in samples]
    boxes = [
        np.array([[*c.min(axis=0), *c.max(axis=0)] for c in own]).reshape(-1, 4) for own in corners
    ]
    for name in ("micro", "custom_backbone:HALF"):
        predictor = Predictor(name)
        predictor.set_images([samples[0].image])  # the first call is slower
        started = time.perf_counter()
        predictor.set_images([sample.image for sample in samples])
        seconds = (time.perf_counter() - started) / images
        masks = predictor.predict(boxes=boxes, multimask=False).masks
        scores = [
            iou(mask[0], target)
            for own, sample in zip(masks, samples, strict=True)
            for mask, target in zip(own, sample.masks, strict=True)
        ]
        print(f"{name:21} mean IoU {np.mean(scores):.3f}, {1000 * seconds:.0f} ms per image")


if __name__ == "__main__":
    tyro.cli(main)
