"""Annotate a folder of images: the loop shared by agents and everything mode."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as rle

from agents.annotation.files import CocoIds, ImageReader, OutputPaths
from agents.annotation.merging import AnnotationFile, merge
from agents.annotation.overlays import OverlayNames, OverlayWriter, repeated_names
from agents.annotation.shards import (
    Key,
    Plan,
    Result,
    Shards,
    images_per_shard,
    prepare_shards,
)
from agents.annotation.sources import ImageList, ImageRecord, ImageSearch
from agents.annotation.throughput import Throughput
from sam_gym.backbones import BackboneService
from sam_gym.backbones.loading import resolve_device
from sam_gym.data.coco_writer import Segmentation, polygons
from sam_gym.utils.fields import documented
from sam_gym.utils.files import plain
from sam_gym.utils.process_group import ProcessGroup
from sam_gym.utils.text import counted, printable


@documented
@dataclass(kw_only=True)
class FolderConfig:
    """Options of every way to annotate a folder."""

    images: str
    """Folder of images, searched recursively; tar files in it count as folders. Or one tar file."""
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
        write: writes further files of the item.
    """

    key: Key
    size: tuple[int, int]
    annotations: list[dict[str, Any]]
    draw: Callable[[], np.ndarray] | None
    write: Callable[[], None] | None = None


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
    #: Number of items that `stream` processes together; the last batch may be smaller.
    batch_size: int

    def keys(self, file: str) -> list[Key]:
        """Keys of the items of an image file: equally many for each file, sorted."""

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
        ranks: the processes that share the images.
        images: the images, which only the first process lists.
    """

    config: FolderConfig
    outputs: OutputPaths
    ranks: ProcessGroup
    images: ImageList | None

    @classmethod
    def prepare(cls, config: FolderConfig) -> FolderRun:
        """Check the output paths, join the other processes and list the images.

        Raises:
            ValueError, OSError: an option is wrong, or there is no image.
        """
        outputs = OutputPaths.prepare(config.out, config.overlays)
        written = outputs.existing()
        if config.coco is not None and os.path.realpath(config.coco) in written:
            raise ValueError(f"--out {config.out} would overwrite --coco. Name another file.")
        own = outputs.results.exists() or outputs.partial.exists()
        if outputs.annotations.exists() and not (config.overwrite or own):
            raise FileExistsError(
                f"--out {config.out} exists, without {outputs.results.name} beside it, so annotate "
                "did not write it. Pass --overwrite to replace it, or another --out."
            )
        search = ImageSearch(config.images, written, tars=True)
        ranks = ProcessGroup.join(cuda=resolve_device(config.device).type == "cuda")
        images = ImageList(search, outputs.annotations.parent) if ranks.is_first else None
        return cls(config, outputs, ranks, images)


def annotate_folder(
    run: FolderRun,
    annotator: Annotator,
    finish: Callable[[AnnotationFile], None] | None = None,
) -> AnnotationFile:
    """Annotate images and write COCO JSON and overlays; resume an interrupted run.

    The processes of a job share the images; the first one merges the results.

    Args:
        run: options and files.
        annotator: annotates the images.
        finish: writes further files of the run, in the first process. Until it has returned, an
            interrupted run resumes.

    Returns:
        The COCO file.

    Raises:
        ValueError: an option is wrong, or an unfinished run has other settings.
        FileExistsError: another job writes the same files.
    """
    ranks = run.ranks
    try:
        with run.outputs.locked() if ranks.is_first else nullcontext():
            return _FolderAnnotation(run, annotator).annotate(finish)
    finally:
        ranks.leave()


class _FolderAnnotation:
    """Annotates the images of a run, in one of its processes."""

    def __init__(self, run: FolderRun, annotator: Annotator) -> None:
        self.run, self.annotator = run, annotator
        self.overlays = OverlayWriter(run.outputs)

    def annotate(self, finish: Callable[[AnnotationFile], None] | None) -> AnnotationFile:
        run, ranks = self.run, self.run.ranks
        ids = self._prepare() if ranks.is_first else None
        ranks.wait()
        shards = Shards(run.outputs.partial)
        if shards.plan.identity != self.annotator.identity:
            raise ValueError(
                f"The model of process {ranks.rank} is not that of the first one. All processes "
                "need the same files and options."
            )
        self.names = OverlayNames(shards.plan.repeated)
        per_image = len(self.annotator.keys(""))
        with Throughput(shards, per_image, ranks) as throughput:
            for number in shards.claim():
                self._annotate_shard(shards, number, throughput)
            ranks.wait()
            if ranks.is_first:  # those of the processes of another job that has died meanwhile
                for number in shards.claim(wait=True):
                    self._annotate_shard(shards, number, throughput)
        written: AnnotationFile | None = None
        if ids is not None:
            written = merge(shards, run.outputs, self.annotator, run.config.segmentation)
            if run.outputs.overlay_list.exists():
                self.overlays.keep_only(lambda: shards.summarized("overlays"))
            if finish is not None:
                finish(written)
            self._report(ids, shards, written)
            print(throughput.summary())
        (written, *_) = ranks.gather(written)
        assert written is not None
        if ranks.is_first:  # nobody reads the shards any more
            shards.remove()
        return written

    def _prepare(self) -> CocoIds:
        """Write the plan of the run; what an interrupted run has done is kept."""
        run, annotator, config = self.run, self.annotator, self.run.config
        images, outputs = run.images, run.outputs
        assert images is not None
        ids = CocoIds(config.coco, annotator.categories, annotator.new_categories)
        settings = asdict(config) | annotator.settings | {"coco": ids.digest}
        del settings["overwrite"]
        keys = len(annotator.keys(""))
        self.names = OverlayNames(repeated_names(self._labels(ids.number(images))))
        plan = Plan(
            plain(settings),
            annotator.identity,
            ids.categories,
            self.names.repeated,
            images_per_shard(len(images), keys, annotator.batch_size),
        )
        shards = prepare_shards(outputs.partial, ids.number(images), plan, self._is_good)
        done, total = shards.count_done(keys, annotator.batch_size), shards.plan.total * keys
        if done:
            print(f"Resuming: {done} of {total} are done.")
        if outputs.has_overlays:
            self.overlays.start_list()
        return ids

    def _labels(self, records: Iterable[ImageRecord]) -> Iterator[str]:
        """Yield the labels of all overlays that may be drawn."""
        if self.run.outputs.has_overlays:
            for record in records:
                yield from map(self.annotator.label, self.annotator.keys(record.file))

    def _is_good(self, before: ImageRecord, now: ImageRecord, key: Key, result: Result) -> bool:
        """Return whether a result of an interrupted run holds for an image as it is now."""
        if key not in self.annotator.keys(now.file):
            return False
        if result["overlay"] not in (None, self.names(key, self.annotator.label(key))):
            return False
        if before._replace(id=now.id) == now:
            return True
        try:
            content = now.read(self.run.config.images)
        except (OSError, ValueError):
            return False
        return hashlib.sha256(content).hexdigest() == result["digest"]

    def _annotate_shard(self, shards: Shards, number: int, throughput: Throughput) -> None:
        """Annotate what is left of a shard."""
        annotator, outputs = self.annotator, self.run.outputs
        records = shards.images(number)
        record_of = {key: own for own in records for key in annotator.keys(own.file)}
        results = shards.results(number)
        # Whole batches only, so that the rest of the items come in the same batches as in a run
        # that is not interrupted.
        whole = len(results.done) - len(results.done) % annotator.batch_size
        good = set([key for key in record_of if key in results.done][:whole])
        results.keep_only(lambda key, _: key in good)
        throughput.start_shard(len(results.done))
        reader = ImageReader(self.run.config.images, annotator.backbone)
        digest_of: dict[Key, str] = {}
        self.overlays.failed = {}

        def readable() -> Iterator[tuple[Key, np.ndarray]]:
            for key, record in record_of.items():
                if key in results.done:
                    continue
                read = reader.read(record)
                if read is None:
                    throughput.add_item()
                else:
                    image, digest_of[key] = read
                    yield key, image

        for item in annotator.stream(readable()):
            key, overlay = item.key, None
            if item.draw is not None and outputs.has_overlays:
                overlay = self.names(key, annotator.label(key))
                self.overlays.write(overlay, item.draw())
            if item.write is not None:
                item.write()
            masks = {"size": item.size, "annotations": [*map(self._drawn, item.annotations)]}
            results.add(key, {**masks, "overlay": overlay, "digest": digest_of.pop(key)})
            throughput.add_item()

        size_of = {key[0]: result["size"] for key, result in results.done.items()}
        drawn = (results.done[key]["overlay"] for key in record_of if key in results.done)
        shards.finish(
            number,
            {
                "sizes": [size_of.get(record.file) for record in records],
                "overlays": [overlay for overlay in drawn if overlay is not None],
                "skipped": [f"skipped {file}: {reason}" for file, reason in reader.broken.items()],
                "notes": [
                    *(f"no overlay {name}: {why}" for name, why in self.overlays.failed.items()),
                    *(
                        f"only the first of {n} frames of {file} is read"
                        for file, n in reader.frames.items()
                    ),
                ],
            },
        )

    def _drawn(self, annotation: dict[str, Any]) -> dict[str, Any]:
        """Add the polygons, if they are wanted: the process that merges the shards has no time."""
        if self.run.config.segmentation == "rle":
            return annotation
        return annotation | {"polygons": polygons(rle.decode(annotation["segmentation"]))}

    def _report(self, ids: CocoIds, shards: Shards, written: AnnotationFile) -> None:
        """Print what was skipped, what was written and how to evaluate it."""
        config, outputs, images = self.run.config, self.run.outputs, self.run.images
        assert images is not None
        skipped = _print_lines(
            chain(
                (f"skipped {file}: {reason}" for file, reason in images.search.skipped.items()),
                (f"skipped {file}: not in {config.coco}" for file in ids.unknown),
                shards.summarized("skipped"),
            )
        )
        _print_lines(chain(shards.summarized("notes"), images.search.ignored()))
        counts = (
            f"{counted(written.num_annotations, 'mask')} in {counted(written.num_images, 'image')}"
        )
        lines = [f"{counts}, {counted(skipped, 'file')} skipped: {outputs.annotations}"]
        if ids.absent:
            lines.insert(
                0, f"{config.images} lacks {counted(ids.absent, 'image')} of {config.coco}"
            )
        if written.num_annotations:  # `COCO.loadRes` takes no empty file
            lines.append(f"Results for COCOeval: {outputs.results}")
        if outputs.has_overlays:
            lines.append(f"Overlays: {outputs.overlays}")
        _print_lines(lines)


def _print_lines(lines: Iterable[str]) -> int:
    """Print lines; return their number."""
    count = 0
    for count, line in enumerate(lines, start=1):  # noqa: B007
        print(printable(line))
    return count
