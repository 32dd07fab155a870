"""Teach everything mode to return whole objects (SAOM), on rooms of your own.

python examples/whole_objects.py
python examples/whole_objects.py --data PATH/rooms --steps 3000 --max-images 1000
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from adaptation import Trainer
from adaptation.options import TrainConfig
from sam_gym import GeneratorOptions, MaskGenerator, load_backbone, make_dataset
from sam_gym.data.streams import dataset_stream
from sam_gym.metrics.panoptic import Overlaps, encoded, match


def write_rooms(root: Path, count: int) -> None:
    """Write procedural rooms in the layout of `entities`, in place of photographs of yours."""
    metadata: dict[str, list] = {}
    for split in ("train", "val"):
        rooms = make_dataset("rooms", split, length=count)
        metadata["entity classes"] = list(rooms.categories)
        for index in range(count):
            sample, stem = rooms[index], f"{split}{index:03d}"
            names = [f"{stem}_{number:03d}.png" for number in range(len(sample.masks))]
            files = {root / "images" / f"{stem}.png": sample.image}
            for name, mask in zip(names, sample.masks, strict=True):
                files[root / "masks" / name] = mask * np.uint8(255)
            for path, pixels in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            entry = {"image_name": f"{stem}.png", "entity_masks": names}
            entry |= {"entity_indices": sample.categories.tolist()}
            metadata.setdefault(f"{split}_data", []).append(entry)
    (root / "metadata.json").write_text(json.dumps(metadata))


def main(
    data: Path | None = None,
    steps: int = 100,
    max_images: int = 24,
    grid: int = 32,
    out: Path = Path("runs/example_whole_objects"),
) -> None:
    """Fine-tune the mask decoder, then compare everything mode before and after.

    Args:
        data: Folder of a dataset in the layout of `entities` (None: rooms are written).
        steps: Optimizer steps.
        max_images: Maximum number of images per split.
        grid: Columns and rows of the grid of everything mode.
        out: Folder of the adapter.
    """
    if data is None:
        data = out / "data"
        write_rooms(data, max_images)
    stream = dataset_stream("entities", str(data))
    config = TrainConfig(
        steps=steps, batch_size=32, max_images=max_images, augmentations=1, learning_rate=1e-3
    )
    result = Trainer(config, out=out).fit(stream, strategy="saom_v1", overwrite=True)
    adapter = out / f"saom_v1-{result.tune}-0" / "adapter.safetensors"

    held_out = make_dataset("entities", "val", root=str(data))
    samples = [held_out[index] for index in range(min(8, max_images, len(held_out)))]
    options = GeneratorOptions(
        grid=(grid, grid), pred_iou_thresh=0.65, stability_score_thresh=0.5, output="coco_rle"
    )
    for name, path in {"pretrained": None, "whole objects": str(adapter)}.items():
        generator = MaskGenerator(load_backbone("micro", adapter=path), options)
        found = generator.generate_all([sample.image for sample in samples])
        ious = [
            match(Overlaps.of([r["segmentation"] for r in own], encoded(sample.masks))).iou
            for own, sample in zip(found, samples, strict=True)
        ]
        count = sum(map(len, found)) / len(samples)
        objects = sum(len(sample.masks) for sample in samples) / len(samples)
        print(
            f"{name:13} {count:.1f} masks per image ({objects:.1f} objects), mean IoU of the "
            f"objects {np.mean(np.concatenate(ious)):.3f}"
        )


if __name__ == "__main__":
    tyro.cli(main)
