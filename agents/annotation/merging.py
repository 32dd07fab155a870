"""Merge the shards of a run into one COCO file; neither is held in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from agents.annotation.files import OutputPaths
from agents.annotation.shards import Key, Shards
from sam_gym.data.coco_writer import CocoRecords, Segmentation
from sam_gym.data.io import read_json
from sam_gym.utils.files import JsonRows, atomic_file, write_tables


class AnnotationFile(Mapping[str, Any]):
    """A COCO file that a run has written: its content, which is read when it is asked for.

    Args:
        path: of the file.
        info, categories: what the file has under these names.
        num_images, num_annotations: number of its images and annotations.
    """

    def __init__(
        self,
        path: Path,
        info: dict[str, Any],
        categories: list[dict[str, Any]],
        num_images: int = 0,
        num_annotations: int = 0,
    ) -> None:
        self.path, self.info, self.categories = path, info, categories
        self.num_images, self.num_annotations = num_images, num_annotations

    def records(self, table: str) -> Iterator[dict[str, Any]]:
        """Yield the records of "images" or "annotations", without reading the whole file."""
        with self.path.open("rb") as file:
            for line in file:
                if line.startswith(f'"{table}": ['.encode()):
                    break
            for line in file:
                if line.startswith(b"]"):
                    return
                yield json.loads(line.rstrip(b",\n"))

    @cached_property
    def _content(self) -> dict[str, Any]:
        return read_json(str(self.path), "COCO file")

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


class _Described(Protocol):
    description: str

    def keys(self, file: str) -> list[Key]: ...


def merge(
    shards: Shards, outputs: OutputPaths, annotator: _Described, segmentation: Segmentation
) -> AnnotationFile:
    """Write the annotations and the results for COCOeval.

    Args:
        shards: all are finished.
        outputs: paths of the files.
        annotator: has the keys of the items of a file, and the `info` of the annotations.
        segmentation: form of the masks.
    """
    records, counts = CocoRecords(shards.plan.categories, segmentation), Counter[str]()
    info, categories = {"description": annotator.description}, records.categories()

    def images() -> Iterator[dict[str, Any]]:
        for number in range(len(shards)):
            sizes = shards.summary(number)["sizes"]
            for own, size in zip(shards.images(number), sizes, strict=True):
                if size is not None:
                    assert own.id is not None
                    counts["images"] += 1
                    yield records.image(own.id, own.file, size)

    def annotations(results: JsonRows) -> Iterator[dict[str, Any]]:
        for number in range(len(shards)):
            stored = shards.stored(number)
            for own in shards.images(number):
                keys = [key for key in annotator.keys(own.file) if key in stored]
                for annotation in (a for key in keys for a in stored[key]["annotations"]):
                    assert own.id is not None
                    record, result = records.annotation(own.id, annotation)
                    results.add(result)
                    yield record

    with atomic_file(outputs.results) as file, JsonRows(file) as results:
        tables = {"info": info, "images": images(), "categories": categories}
        write_tables(outputs.annotations, tables | {"annotations": annotations(results)})
    path, count = outputs.annotations, records.annotations
    return AnnotationFile(path, info, categories, counts["images"], count)
