"""Label the pixels of a folder of images: `python -m agents.annotate --semantic`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import tyro
from pycocotools import mask as rle

from agents.annotation.folder import (
    AnnotatedItem,
    FolderConfig,
    FolderRun,
    Key,
    annotate_folder,
)
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.spec import backbone_help
from sam_gym.data.base import IGNORED
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.data.labelmaps import CLASSES
from sam_gym.utils import cli
from sam_gym.utils.digest import text_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.files import write_atomic, write_json
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

    Raises:
        ValueError: it has no semantic head.
    """

    new_categories = True

    def __init__(self, backbone: Backbone, description: str) -> None:
        self.backbone, self.description = backbone, description
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
        for number in np.unique(labels).tolist():
            mask = labels == number
            score = float(probabilities[mask].mean())
            category = self.categories[number]
            annotations.append(mask_annotation(mask, score=score, category=category))

        def draw() -> np.ndarray:
            shown = ", ".join(self.categories[k] for k in np.unique(labels).tolist())
            return draw_labels(image, labels.astype(np.uint8), caption=shown, height=len(image))

        return AnnotatedItem(key, (labels.shape[0], labels.shape[1]), annotations, draw)


def annotate_semantic(config: AnnotateSemanticConfig) -> dict[str, Any]:
    """Annotate images and write all files; returns the content of the COCO file.

    Raises:
        ValueError, FileNotFoundError: an option, the weights, the adapter or the folder is wrong.
    """
    check_settings(config)
    run = FolderRun.prepare(config)
    files = [_label_file(file) for file in run.folder.images]
    if twice := {file for file in files if files.count(file) > 1}:
        raise ValueError(
            f"Several images would have the label map {min(twice)}: give them different names, "
            "apart from the suffix."
        )
    backbone = load_backbone(
        config.backbone, config.checkpoint, config.device, config.dtype, adapter=config.adapter
    )
    annotator = SemanticAnnotator(backbone, f"classes of pixels by {config.adapter}")
    content = annotate_folder(run, annotator)
    _write_labels(run, content, annotator.categories)
    _write_panoptic(run, content)
    print(f"Label maps: {run.outputs.labels}")
    print(f"COCO panoptic: {run.outputs.panoptic}")
    return content


def _label_file(file: str) -> str:
    """Path of the label map of an image, in the folder of label maps."""
    return f"{os.path.splitext(file)[0]}.png"


def _segments(
    content: Mapping[str, Any],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield the images of a COCO file with their annotations."""
    own = defaultdict(list)
    for annotation in content["annotations"]:
        own[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        yield image, own[image["id"]]


def _painted(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], values: Sequence[Any]
) -> np.ndarray:
    """Paint a value into the pixels of each annotation: uint8 (H, W) or (H, W, 3), else 255."""
    shape = (image["height"], image["width"], *np.shape(values[0]))
    canvas = np.full(shape, IGNORED, np.uint8)
    for annotation, value in zip(annotations, values, strict=True):
        canvas[rle.decode(annotation["segmentation"]).astype(bool)] = value
    return canvas


def _save_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, cv2.imencode(".png", pixels)[1].tobytes())


def _write_labels(run: FolderRun, content: Mapping[str, Any], classes: Sequence[str]) -> None:
    names = {own["id"]: own["name"] for own in content["categories"]}
    for image, found in _segments(content):
        values = [classes.index(names[own["category_id"]]) for own in found]
        labels = _painted(image, found, values)
        _save_png(run.outputs.labels / _label_file(image["file_name"]), labels)
    write_json(run.outputs.labels / CLASSES, {"classes": list(classes)})


def _write_panoptic(run: FolderRun, content: Mapping[str, Any]) -> None:
    """Write COCO panoptic: each class of an image is a segment of a category without things."""
    path = run.outputs.panoptic
    records = []
    for image, found in _segments(content):
        ids = list(range(1, len(found) + 1))
        name = _label_file(image["file_name"])
        # The id of a segment is R + 256 * G + 65536 * B; OpenCV writes B, G, R.
        segments = _painted(image, found, [(0, 0, number) for number in ids])
        _save_png(path.with_suffix("") / name, segments)
        about = [
            {"id": number, "iscrowd": 0} | {key: own[key] for key in _OF_SEGMENTS}
            for number, own in zip(ids, found, strict=True)
        ]
        records.append({"image_id": image["id"], "file_name": name, "segments_info": about})
    categories = [own | {"isthing": 0} for own in content["categories"]]
    parts = {name: content[name] for name in ("info", "images")}
    write_json(path, {**parts, "categories": categories, "annotations": records})


def main(args: Sequence[str]) -> dict[str, Any]:
    """Run the command line, without --semantic."""
    prog = "python -m agents.annotate --semantic"
    return annotate_semantic(cli.parse(AnnotateSemanticConfig, prog, args))
