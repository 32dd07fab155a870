"""Tiny data whose answers are known."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest


def red_disc(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A red disc on blue, with noise: BGR image and its mask."""
    rng = np.random.default_rng(height)
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, (width // 2, height // 2), min(height, width) // 4, 255, -1)
    image = np.where(mask[..., None] > 0, (30, 20, 220), (200, 60, 20))
    return (image + rng.integers(-15, 15, image.shape)).clip(0, 255).astype(np.uint8), mask


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Root of a `folder` dataset of three discs; the corner of each mask is to be ignored."""
    root = tmp_path / "discs"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, size in enumerate([(96, 128), (128, 80), (100, 100)]):
        image, mask = red_disc(*size)
        mask[:8, :8] = 128
        cv2.imwrite(str(root / "images" / f"{number}.png"), image)
        cv2.imwrite(str(root / "masks" / f"{number}.png"), mask)
    return root


@pytest.fixture
def coco_discs(tmp_path: Path) -> Path:
    """Root of a `coco` dataset: one image with a `left` and a `right` square."""
    root = tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    image = np.full((64, 96, 3), 90, np.uint8)
    annotations = []
    for number, x in enumerate((10, 60), start=1):
        image[20:40, x : x + 20] = 230
        corners = [x, 20, x + 20, 20, x + 20, 40, x, 40]
        annotations.append(
            {"id": number, "image_id": 1, "category_id": number, "segmentation": [corners]}
        )
    cv2.imwrite(str(root / "images" / "a.png"), image)
    table = {
        "images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 96}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}],
    }
    (root / "instances_val.json").write_text(json.dumps(table))
    return root
