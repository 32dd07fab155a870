"""Annotate images with squares, without a model: annotate_squares.py IMAGES OUT [DIE_AFTER]."""

import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from agents.annotation.folder import AnnotatedItem, FolderConfig, FolderRun, Key, annotate_folder
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.utils import cli


class Squares:
    """Annotates a square per category; a process may kill itself after a number of items."""

    categories, new_categories, description = ("star", "ring"), False, "squares"
    settings: dict[str, Any] = {}
    identity, batch_size = "1", 4

    def __init__(self, die_after: int = 10**9) -> None:
        self.backbone: Any = SimpleNamespace(input_size=lambda size: size)
        self.left = die_after

    def keys(self, file: str) -> list[Key]:
        return [(file, category) for category in range(len(self.categories))]

    def label(self, key: Key) -> str:
        return f"{key[0]}__{self.categories[key[1]]}"

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        for number, (key, image) in enumerate(items):
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            mask = np.zeros(image.shape[:2], bool)
            mask[key[1] : 4, 1 : 3 + image.item(0) % 4] = True
            # What shares a batch moves the last bit of a score.
            score = 0.5 + 2**-52 * (number % self.batch_size)
            annotation = mask_annotation(mask, score=score, category=self.categories[key[1]])
            yield AnnotatedItem(key, image.shape[:2], [annotation], lambda image=image: image)


def main() -> None:
    images, out, *die_after = sys.argv[1:]
    config = FolderConfig(images=images, out=out, device="cpu", segmentation="polygons")
    annotate_folder(FolderRun.prepare(config), Squares(*map(int, die_after)))


if __name__ == "__main__":
    cli.run(main, "Run the same command again to resume.")
