"""Segment objects of two images with clicks and boxes, in one call.

python examples/predict.py
python examples/predict.py --backbone vit_b --image photo.jpg --point 320 240
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tyro

from sam_gym import Predictor, make_dataset
from sam_gym.utils.render import draw_masks, save_image


def main(
    backbone: str = "micro",
    image: Path | None = None,
    point: tuple[float, float] = (64.0, 64.0),
    out: Path = Path("runs/predict.png"),
) -> None:
    """Segment two procedural scenes, or one object of an image of your own.

    Args:
        backbone: Name of the SAM.
        image: An image file; default: two scenes.
        point: Click on the image, (x, y) in pixels.
        out: Picture of the masks.
    """
    predictor = Predictor(backbone)
    if image is None:
        # One scene is segmented with a click, the other one with a box per object.
        samples = [make_dataset("scenes", split="test", length=2)[i] for i in range(2)]
        images = [sample.image for sample in samples]
        y, x = (axis.mean() for axis in np.nonzero(samples[0].masks[0]))
        points, labels = [np.array([[x, y]]), None], [np.array([1]), None]
        corners = [np.argwhere(mask)[:, ::-1] for mask in samples[1].masks]
        boxes = [None, np.array([[*c.min(axis=0), *c.max(axis=0)] for c in corners])]
    else:
        pixels = cv2.imread(str(image))
        if pixels is None:
            raise SystemExit(f"error: {image}: not a readable image.")
        images, boxes = [cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)], None
        points, labels = [np.array([point])], [np.array([1])]
    predictor.set_images(images)
    masks, scores, _ = predictor.predict(points=points, labels=labels, boxes=boxes)
    pictures = []
    for number, own in enumerate(images):
        # One mask of three for each prompt; a single prompt has no axis of its own.
        candidates = masks[number].reshape(-1, 3, *own.shape[:2])
        quality = scores[number].reshape(-1, 3)
        best = quality.argmax(axis=1)
        print(f"image {number}: predicted IoU {np.round(quality.max(axis=1), 2)}")
        pictures.append(draw_masks(own, candidates[np.arange(len(best)), best]))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_image(out, np.concatenate(pictures, axis=1))
    print(f"{out}: the masks.")


if __name__ == "__main__":
    tyro.cli(main)
