"""Label the pixels of a folder of images: `python -m agents.annotate --semantic`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from agents.annotation.files import OutputPaths
from agents.annotation.folder import (
    AnnotatedItem,
    FolderConfig,
    FolderRun,
    Key,
    annotate_folder,
)
from agents.annotation.merging import AnnotationFile
from agents.annotation.overlays import NameSet
from agents.annotation.sources import ImageList
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.spec import backbone_help
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.data.io import write_png
from sam_gym.data.labelmaps import CLASSES
from sam_gym.data.panoptic import segment_colours
from sam_gym.utils import cli
from sam_gym.utils.digest import text_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.files import write_json, write_tables
from sam_gym.utils.render import draw_labels
from sam_gym.utils.settings import check_settings

#: What a segment of COCO panoptic has of an annotation.
_OF_SEGMENTS = ("category_id", "area", "bbox")


@documented
@dataclass(kw_only=True)
class AnnotateSemanticConfig(FolderConfig):
    """Label every pixel of a folder of images with the class that an adapter's head gives it.

    Writes, beside `out`, COCO JSON with one annotation per class of an image: the folder
    NAME_labels with a label map for each image (PNG, uint8 indices of the classes in its
    classes.json), and COCO panoptic, NAME_panoptic.json and its PNG files. A `score` is the mean
    probability of the class over its pixels. Files that cannot be read are reported and skipped.
    Run the same command again to resume an interrupted run.
    """

    adapter: str
    """Adapter file with a semantic head (adaptation.train --method semantic), or a head of the
    SAM-Cityscapes code (.pth)."""
    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("SAM to use"))] = "micro"
    checkpoint: str | None = None
    """Weights of the SAM, .safetensors or .pth (None: its own)."""
    dtype: str = "auto"
    """Precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    segmentation: tyro.conf.Suppress[Literal["rle"]] = "rle"


class SemanticAnnotator:
    """Labels the pixels of images; keys are (file,).

    Args:
        backbone: the SAM, with a semantic head.
        description: `info` of the annotation file.
        outputs: paths of the label maps and of the segments of COCO panoptic.

    Raises:
        ValueError: it has no semantic head.
    """

    new_categories = True
    batch_size = 1

    def __init__(self, backbone: Backbone, description: str, outputs: OutputPaths) -> None:
        self.backbone, self.description, self.outputs = backbone, description, outputs
        self.categories: Sequence[str] = backbone.semantic_classes
        if not self.categories:
            raise ValueError(
                "--adapter has no semantic head: pass one of python -m adaptation.train --method "
                "semantic."
            )
        self.settings: dict[str, Any] = {}
        self.identity = text_digest(backbone.identity, *self.categories)

    def keys(self, file: str) -> list[Key]:
        return [(file,)]

    def label(self, key: Key) -> str:
        (file,) = key
        return file

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        for key, image in items:
            (logits,) = self.backbone.pixel_logits([image])
            probabilities, labels = logits.softmax(dim=0).max(dim=0)
            yield self._annotated(key, image, labels.cpu().numpy(), probabilities.cpu().numpy())

    def _annotated(
        self, key: Key, image: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
    ) -> AnnotatedItem:
        annotations = []
        found, segments = np.unique(labels, return_inverse=True)
        for number in found.tolist():
            mask = labels == number
            score = float(probabilities[mask].mean())
            category = self.categories[number]
            annotations.append(mask_annotation(mask, score=score, category=category))

        def draw() -> np.ndarray:
            shown = ", ".join(self.categories[k] for k in found.tolist())
            return draw_labels(image, labels.astype(np.uint8), caption=shown, height=len(image))

        def write() -> None:
            (file,) = key
            name = _label_file(file)
            write_png(self.outputs.labels / name, labels.astype(np.uint8))
            ids = segments.reshape(labels.shape) + 1  # 1, 2, 3, ...
            write_png(self.outputs.panoptic.with_suffix("") / name, segment_colours(ids))

        return AnnotatedItem(key, (labels.shape[0], labels.shape[1]), annotations, draw, write)


def annotate_semantic(config: AnnotateSemanticConfig) -> AnnotationFile:
    """Annotate images and write all files; returns the COCO file.

    Raises:
        ValueError, FileNotFoundError: an option, the weights, the adapter or the folder is wrong.
    """
    check_settings(config)
    run = FolderRun.prepare(config)
    if run.images is not None:
        _check_names(run.images)
    backbone = load_backbone(
        config.backbone, config.checkpoint, config.device, config.dtype, adapter=config.adapter
    )
    description = f"classes of pixels by {config.adapter}"
    annotator = SemanticAnnotator(backbone, description, run.outputs)

    def finish(written: AnnotationFile) -> None:
        run.outputs.labels.mkdir(exist_ok=True)
        write_json(run.outputs.labels / CLASSES, {"classes": list(annotator.categories)})
        _write_panoptic(run.outputs.panoptic, written)

    written = annotate_folder(run, annotator, finish)
    if run.ranks.is_first:
        print(f"Label maps: {run.outputs.labels}")
        print(f"COCO panoptic: {run.outputs.panoptic}")
    return written


def _check_names(images: ImageList) -> None:
    """Raise `ValueError` if two images would have one label map."""
    repeated = set(NameSet(_label_file(own.file) for own in images).repeated)
    for name in (_label_file(own.file) for own in images if repeated):
        if NameSet.hash(name) in repeated:
            raise ValueError(
                f"Several images would have the label map {name}: give them different names, "
                "apart from the suffix."
            )


def _label_file(file: str) -> str:
    """Path of the label map of an image, in the folder of label maps."""
    return f"{os.path.splitext(file)[0]}.png"


def _write_panoptic(path: Path, written: AnnotationFile) -> None:
    """Write COCO panoptic: each class of an image is a segment of a category without things."""
    of_image = groupby(written.records("annotations"), key=itemgetter("image_id"))

    def records() -> Iterator[dict[str, Any]]:
        # Each image has a class, so that both tables have the same images in the same order.
        for image, (image_id, found) in zip(written.records("images"), of_image, strict=True):
            about = [
                {"id": number, "iscrowd": 0} | {key: own[key] for key in _OF_SEGMENTS}
                for number, own in enumerate(found, start=1)
            ]
            name = _label_file(image["file_name"])
            yield {"image_id": image_id, "file_name": name, "segments_info": about}

    categories = [own | {"isthing": 0} for own in written.categories]
    tables = {"info": written.info, "images": written.records("images")}
    write_tables(path, tables | {"categories": categories, "annotations": records()})


def main(args: Sequence[str]) -> AnnotationFile:
    """Run the command line, without --semantic."""
    prog = "python -m agents.annotate --semantic"
    return annotate_semantic(cli.parse(AnnotateSemanticConfig, prog, args))
