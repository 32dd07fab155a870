"""Adapt SAM to folders of your own, one after the other, and measure what it forgets.

python examples/continual_folders.py
python examples/continual_folders.py --data PATH/nuclei PATH/polyps --methods naive ewc+er
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from adaptation import Trainer
from adaptation.options import TrainConfig
from sam_gym.data.streams import make_stream


def write_folder(root: Path, kind: str, count: int) -> Path:
    """Write a procedural domain as a folder, in place of data of yours.

    `images/` holds images, `instances/` a PNG of the same stem for each (0 is background, 1 to n
    are objects), and `splits.json` the stems of each split. For one object per image, `masks/` of 0
    and 255 will do.
    """
    splits: dict[str, list[str]] = {}
    for split in ("train", "val", "test"):
        domain = make_stream("scenes-domains", domains=kind).domains[0].split(split)
        for index in range(count):
            sample, stem = domain[index], f"{split}{index:03d}"
            ids = np.zeros(sample.image.shape[:2], np.uint8)
            for number, mask in enumerate(sample.masks, start=1):
                ids[mask] = number
            for name, pixels in (("images", sample.image), ("instances", ids)):
                (root / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / name / f"{stem}.png")
            splits.setdefault(split, []).append(stem)
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def main(
    data: tuple[Path, ...] = (),
    methods: tuple[str, ...] = ("naive", "er"),
    steps: int = 40,
    images: int = 12,
    out: Path = Path("runs/example_continual"),
) -> None:
    """Learn the domains in the order given, with each method.

    Args:
        data: Folders, one per domain (none: two procedural domains are written).
        methods: Adaptation methods; "ewc+er" combines two.
        steps: Optimizer steps per domain.
        images: Maximum number of images per split.
        out: Folder of the adapters.
    """
    if not data:
        kinds = ("cells", "night")
        data = tuple(write_folder(out / "data" / kind, kind, images) for kind in kinds)
    stream = make_stream("folders", [str(folder) for folder in data])
    trainer = Trainer(TrainConfig(steps=steps, max_images=images, augmentations=2), out=out)
    for method in methods:
        result = trainer.fit(stream, strategy=method, overwrite=True)
        matrix = np.array(result.scores["box"]["iou"])  # stages x domains, in %
        print(f"{method}: IoU of box prompts on the test splits, in %")
        print(f"  {'pretrained':18}", np.round(result.zero_shot["box"]["iou"], 1))
        for name, row in zip(result.domains, matrix, strict=True):
            print(f"  {'after ' + name:18}", np.round(row, 1))
        numbers = result.summary("box")
        print(f"  Last-IoU {numbers['last_iou']:.1f}, forgetting {numbers['ff_iou']:.1f}")
        print(f"  {out / f'{result.method}-{result.tune}-{result.seed}' / 'adapter.safetensors'}")


if __name__ == "__main__":
    tyro.cli(main)
