"""Annotate a folder of images: the loop shared by agents and everything mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agents.annotation.files import CocoIds, ImageReader, OverlayWriter, PartialResults
from sam_gym.backbones import BackboneService
from sam_gym.data.coco_writer import CocoWriter
from sam_gym.utils.files import write_json
from sam_gym.utils.progress import ProgressBar

#: What is annotated in one go: an image file, followed by whatever tells items of it apart.
Key = tuple[Any, ...]


@dataclass(kw_only=True)
class FolderConfig:
    """Options of every way to annotate a folder."""

    images: str
    """Folder of images, searched recursively."""
    out: str = "annotations.json"
    """COCO JSON to write."""
    overlays: str | None = None
    """Folder for overlays (None: beside `out`; "none": no overlays)."""
    coco: str | None = None
    """COCO JSON whose image and category ids to use, so that COCOeval can compare with it."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""


@dataclass(frozen=True)
class AnnotatedItem:
    """Annotations of one item.

    Attributes:
        key: key of the item.
        size: (H, W) of its image.
        annotations: as of `mask_annotation`, each with its `category` by name.
        name: name of the overlay.
        draw: draws the overlay, uint8 (H', W', 3), or None if there is nothing to show.
    """

    key: Key
    size: tuple[int, int]
    annotations: list[dict[str, Any]]
    name: str
    draw: Callable[[], np.ndarray] | None


class Annotator(Protocol):
    """A way to annotate images."""

    @property
    def backbone(self) -> BackboneService:
        """The model that segments."""

    #: Category names of the annotations.
    categories: Sequence[str]
    #: Whether categories that a given COCO file lacks get new ids.
    new_categories: bool
    #: `info` of the annotation file.
    description: str
    #: What a run must share, beside its options, to be resumed.
    settings: dict[str, Any]

    def keys(self, file: str) -> list[Key]:
        """Keys of the items of an image file."""

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        """Annotate items, given with their images uint8 (H, W, 3), in order."""


def annotate_folder(
    config: FolderConfig, files: Sequence[str], annotator: Annotator
) -> dict[str, Any]:
    """Annotate images and write COCO JSON and overlays; resume an interrupted run.

    Args:
        config: the command's options.
        files: image files, as `image_files` lists them.
        annotator: annotates the images.

    Returns:
        Content of the COCO file.

    Raises:
        ValueError: an option is wrong, or an unfinished run has other settings.
    """
    ids = CocoIds(config.coco, files, annotator.categories, annotator.new_categories)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    overlays = OverlayWriter(config.overlays, out)
    settings = asdict(config) | annotator.settings
    results = PartialResults(out.with_suffix(".partial.jsonl"), settings)
    keys = [key for file in ids.images for key in annotator.keys(file)]
    if results.done:
        print(f"Resuming: {len(results.done)} of {len(keys)} are done.")
    reader = ImageReader(config.images, annotator.backbone)
    with ProgressBar() as bar:
        task = bar.add_task("annotating", total=len(keys), completed=len(results.done))

        def readable() -> Iterator[tuple[Key, np.ndarray]]:
            for key in [key for key in keys if key not in results.done]:
                image = reader.read(key[0])
                if image is None:
                    bar.advance(task)
                else:
                    yield key, image

        for item in annotator.stream(readable()):
            results.add(item.key, {"size": item.size, "annotations": item.annotations})
            if item.draw is not None and overlays.folder is not None:
                overlays.write(item.name, item.draw())
            bar.advance(task)

    writer = CocoWriter(ids.categories, annotator.description)
    for (file, *_), result in sorted(results.done.items()):
        if file in ids.images:
            writer.add(ids.images[file], file, result["size"], result["annotations"])
    content = writer.content
    write_json(out, content)
    results.finish()
    for file in files:
        if file not in ids.images:
            print(f"skipped {file}: not in {config.coco}")
    for file, reason in reader.broken.items():
        print(f"skipped {file}: {reason}")
    counts = f"{len(content['annotations'])} masks in {len(content['images'])} images"
    print(f"{counts}, {len(reader.broken)} files skipped: {out}")
    if overlays.folder is not None:
        print(f"Overlays: {overlays.folder}")
    return content
