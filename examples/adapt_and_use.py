"""Adapt SAM to the images of one domain, then segment with the adapter.

python examples/adapt_and_use.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from adaptation import Trainer
from adaptation.options import TrainConfig
from sam_gym import Predictor
from sam_gym.data.streams import Stream, make_stream
from sam_gym.metrics.masks import iou


def main(
    domain: int = 0,
    steps: int = 60,
    max_images: int = 48,
    out: Path = Path("runs/example_adaptation"),
) -> None:
    """Fine-tune the mask decoder on a procedural domain and compare it with the pretrained SAM.

    Args:
        domain: Index of the domain, 0 to 9.
        steps: Optimizer steps.
        max_images: Maximum number of images per split.
        out: Folder of the adapter.
    """
    chosen = make_stream("scenes-domains").domains[domain]
    trainer = Trainer(TrainConfig(steps=steps, max_images=max_images), out=out)
    stream = Stream(chosen.name, (chosen,))
    result = trainer.fit(stream, strategy="naive", tune="decoder", overwrite=True)
    adapter = out / f"{result.method}-{result.tune}-{result.seed}" / "adapter.safetensors"

    held_out = chosen.split("test")
    samples = [held_out[index] for index in range(min(16, max_images))]
    corners = [[np.argwhere(mask)[:, ::-1] for mask in sample.masks] for sample in samples]
    boxes = [
        np.array([[*c.min(axis=0), *c.max(axis=0)] for c in own]).reshape(-1, 4) for own in corners
    ]
    for name, path in {"pretrained": None, "adapted": str(adapter)}.items():
        predictor = Predictor("micro", adapter=path)
        predictor.set_images([sample.image for sample in samples])
        masks = predictor.predict(boxes=boxes, multimask=False).masks
        scores = [
            iou(mask[0], target)
            for own, sample in zip(masks, samples, strict=True)
            for mask, target in zip(own, sample.masks, strict=True)
        ]
        print(f"{name:10} mean IoU of box prompts {np.mean(scores):.3f}")


if __name__ == "__main__":
    tyro.cli(main)
