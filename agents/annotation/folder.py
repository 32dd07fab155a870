"""Annotate a folder of images: the loop shared by agents and everything mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from agents.annotation.files import (
    CocoIds,
    ImageFolder,
    ImageReader,
    OutputPaths,
    OverlayWriter,
    PartialResults,
    overlay_names,
)
from sam_gym.backbones import BackboneService
from sam_gym.data.coco_writer import CocoWriter, Segmentation
from sam_gym.utils.fields import documented
from sam_gym.utils.files import write_json
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.text import printable

#: Key of an item to annotate: an image file, followed by what distinguishes its items.
Key = tuple[Any, ...]


@documented
@dataclass(kw_only=True)
class FolderConfig:
    """Options of every way to annotate a folder."""

    images: str
    """Folder of images, searched recursively."""
    out: str = "annotations.json"
    """COCO JSON to write. The results for COCOeval go to annotations_results.json beside it."""
    overwrite: bool = False
    """Replace a file `out` that annotate did not write. Its own are replaced anyway."""
    overlays: str | None = None
    """Folder for overlays (None: beside `out`; "none": no overlays)."""
    segmentation: Segmentation = "rle"
    """Masks in `out`: "rle", or "polygons" that cover the same pixels, for tools without RLE."""
    coco: str | None = None
    """COCO JSON whose image and category ids to use. To evaluate with pycocotools:
    truth = COCO(FILE), COCOeval(truth, truth.loadRes("annotations_results.json"), "segm")."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""


@dataclass(frozen=True)
class AnnotatedItem:
    """Annotations of one item.

    Attributes:
        key: key of the item.
        size: (H, W) of its image.
        annotations: as of `mask_annotation`, each with its `category` by name.
        draw: draws the overlay, uint8 (H', W', 3), or None if there is nothing to show.
    """

    key: Key
    size: tuple[int, int]
    annotations: list[dict[str, Any]]
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
    #: Digest of the models; results of others are dropped.
    identity: str

    def keys(self, file: str) -> list[Key]:
        """Keys of the items of an image file."""

    def label(self, key: Key) -> str:
        """Name of an item's overlay."""

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        """Annotate items, given with their images uint8 (H, W, 3), in order."""


@dataclass(frozen=True)
class FolderRun:
    """An annotation run, checked before a model is loaded.

    Attributes:
        config: the command's options.
        outputs: paths that are written.
        folder: the images.
    """

    config: FolderConfig
    outputs: OutputPaths
    folder: ImageFolder

    @classmethod
    def prepare(cls, config: FolderConfig) -> FolderRun:
        """Check the output paths and list the images.

        Raises:
            ValueError, OSError: an option is wrong, or there is no image.
        """
        outputs = OutputPaths.prepare(config.out, config.overlays)
        written = outputs.existing()
        if config.coco is not None and os.path.realpath(config.coco) in written:
            raise ValueError(f"--out {config.out} would overwrite --coco. Name another file.")
        if outputs.annotations.exists() and not (config.overwrite or outputs.results.exists()):
            raise FileExistsError(
                f"--out {config.out} exists, without {outputs.results.name} beside it, so annotate "
                "did not write it. Pass --overwrite to replace it, or another --out."
            )
        return cls(config, outputs, ImageFolder.search(config.images, written))


def annotate_folder(run: FolderRun, annotator: Annotator) -> dict[str, Any]:
    """Annotate images and write COCO JSON and overlays; resume an interrupted run.

    Args:
        run: options and files.
        annotator: annotates the images.

    Returns:
        Content of the COCO file.

    Raises:
        ValueError: an option is wrong, or an unfinished run has other settings.
        FileExistsError: another process writes the same files.
    """
    with run.outputs.locked():
        return _annotate(run, annotator)


def _annotate(run: FolderRun, annotator: Annotator) -> dict[str, Any]:
    config, outputs, folder = run.config, run.outputs, run.folder
    ids = CocoIds(config.coco, folder.images, annotator.categories, annotator.new_categories)
    settings = asdict(config) | annotator.settings | {"coco": ids.digest}
    del settings["overwrite"]
    results = PartialResults(outputs.partial, settings)
    names = overlay_names(
        {key: annotator.label(key) for file in ids.images for key in annotator.keys(file)}
    )
    reader = ImageReader(folder.root, annotator.backbone, ids.sizes)
    if results.done:
        digests = {file: reader.digest(file) for file in {key[0] for key in results.done}}
        dropped = results.keep_only(
            lambda key, result: (
                key in names
                and result["digest"] == [annotator.identity, digests[key[0]]]
                and result["overlay"] in (None, names[key])
            )
        )
        if dropped:
            print(f"Dropped {dropped} results: the model or their images have changed.")
        if results.done:
            print(f"Resuming: {len(results.done)} of {len(names)} are done.")
    overlays = OverlayWriter(outputs)
    with ProgressBar() as bar:
        task = bar.add_task("annotating", total=len(names), completed=len(results.done))
        digest_of: dict[Key, str] = {}

        def readable() -> Iterator[tuple[Key, np.ndarray]]:
            for key in [key for key in names if key not in results.done]:
                read = reader.read(key[0])
                if read is None:
                    bar.advance(task)
                else:
                    image, digest_of[key] = read
                    yield key, image

        for item in annotator.stream(readable()):
            key, overlay = item.key, None
            if item.draw is not None and outputs.has_overlays:
                overlay = names[key]
                overlays.write(overlay, item.draw())
            digest = [annotator.identity, digest_of.pop(key)]
            masks = {"size": item.size, "annotations": item.annotations}
            results.add(key, {**masks, "overlay": overlay, "digest": digest})
            bar.advance(task)

    writer = CocoWriter(ids.categories, annotator.description, config.segmentation)
    for (file, *_), result in sorted(results.done.items()):
        writer.add(ids.images[file], file, result["size"], result["annotations"])
    content = writer.content
    write_json(outputs.results, writer.results)
    write_json(outputs.annotations, content)
    overlays.keep_only({result["overlay"] for result in results.done.values()} - {None})
    results.finish()
    _report(run, ids, reader, overlays, content)
    return content


def _report(
    run: FolderRun,
    ids: CocoIds,
    reader: ImageReader,
    overlays: OverlayWriter,
    content: Mapping[str, Any],
) -> None:
    """Print what was skipped, what was written and how to evaluate it."""
    config, outputs, folder = run.config, run.outputs, run.folder
    unknown = {f: f"not in {config.coco}" for f in folder.images if f not in ids.images}
    skipped = folder.skipped | unknown | reader.broken
    lines = [f"skipped {file}: {reason}" for file, reason in skipped.items()]
    lines += [f"no overlay {name}: {reason}" for name, reason in overlays.failed.items()]
    lines += [
        f"only the first of {n} frames of {file} is read" for file, n in reader.frames.items()
    ]
    lines += folder.ignored()
    if ids.absent:
        lines.append(f"{ids.absent} images of {config.coco} are not in {config.images}")
    counts = f"{len(content['annotations'])} masks in {len(content['images'])} images"
    lines.append(f"{counts}, {len(skipped)} files skipped: {outputs.annotations}")
    if content["annotations"]:  # `COCO.loadRes` takes no empty file
        lines.append(f"Results for COCOeval: {outputs.results}")
    if outputs.has_overlays:
        lines.append(f"Overlays: {outputs.overlays}")
    for line in lines:
        print(printable(line))
