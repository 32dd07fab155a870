"""Write annotations in COCO's JSON format, which `sam_gym.data.coco` and pycocotools read."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

#: Forms of masks: compressed RLE, or polygons.
Segmentation = Literal["rle", "polygons"]
_OF_RESULTS = ("segmentation", "score")


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Return the outlines of a mask as COCO polygons, which pycocotools fills with the same pixels.

    Outlines run along the edges of pixels. Each 4-connected region is one polygon: a cut of zero
    width connects each hole, whose outline has the opposite direction, with the outline above.

    Args:
        mask: bool (H, W).

    Returns:
        Polygons [x0, y0, x1, y1, ...], clockwise, in pixels; empty if no pixel is set.
    """
    x, y, below, after = _outlines(mask)
    edges, is_done = range(0, len(x), 2), [False] * len(x)
    starts, cuts = [], []
    for left in edges:
        if is_done[left]:
            continue
        # The first edge of an outline is one of its topmost: the mask lies below it, or above if
        # it is the outline of a hole.
        if below[left]:
            starts.append(left)
        else:
            run = mask[: y[left], x[left]][::-1]
            top = y[left] - (len(run) if run.all() else int(run.argmin()))
            cuts.append((top, -x[left], left))
        corner = left
        while not is_done[corner]:
            is_done[corner] = True
            corner = after[corner]

    places = [(y[left], x[left]) for left in edges]
    for top, _, left in sorted(cuts):
        # From the edge above the hole, down to the hole, around it, and back.
        above = 2 * bisect.bisect_right(places, (top, x[left])) - 2
        down, up = len(x), len(x) + 1
        x += [x[left], x[left], x[left]]
        y += [top, y[left], top]
        after += [left, up + 1, after[above]]
        after[above], after[left + 1] = down, up

    found = []
    for start in starts:
        polygon, corner = [x[start], y[start]], after[start]
        while corner != start:
            if [x[corner], y[corner]] != polygon[-2:]:
                polygon += [x[corner], y[corner]]
            corner = after[corner]
        found.append(polygon)
    return found


def _outlines(mask: np.ndarray) -> tuple[list[int], list[int], list[bool], list[int]]:
    """Return the corners of a mask's outlines, row by row.

    Two corners lie where two pixels touch diagonally.

    Returns:
        x; y; whether the mask lies below the corner's horizontal edge, or above; and the index of
        the next corner, clockwise around the mask. Corners 2 * i and 2 * i + 1 are the left and
        the right end of a horizontal edge.
    """
    padded = np.pad(mask.astype(bool), 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    touching = (nw == se) & (ne == sw) & (nw != ne)
    y, x = np.nonzero(nw ^ ne ^ sw ^ se | touching)
    count = 1 + touching[y, x]
    y, x = y.repeat(count), x.repeat(count)
    corners = np.arange(len(x))
    # Of two corners at one place, the left one belongs to the pixel on the left.
    right = np.append(False, (np.diff(x) == 0) & (np.diff(y) == 0))[: len(x)]
    north = np.where(touching[y, x], nw[y, x] ^ right, (nw != ne)[y, x])
    columns = np.lexsort((~north, y, x)).reshape(-1, 2)
    vertical = np.empty_like(corners)
    vertical[columns] = columns[:, ::-1]
    below = se[y, x][::2].repeat(2)
    after = np.where((corners % 2 == 0) == below, corners ^ 1, vertical)
    return x.tolist(), y.tolist(), below.tolist(), after.tolist()


def mask_annotation(mask: np.ndarray | Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return the COCO annotation of a mask, without ids.

    Args:
        mask: bool (H, W), or its compressed RLE.
        **values: further entries, for example `score`.

    Returns:
        `segmentation` (compressed RLE as text), `area` in pixels, `bbox` (x, y, width, height),
        `iscrowd` (0) and `values`.
    """
    code: Any = mask
    if isinstance(mask, np.ndarray):
        code = rle.encode(np.asfortranarray(mask, np.uint8))
    counts = code["counts"]
    return {
        "segmentation": {
            "size": list(code["size"]),
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        },
        "area": int(rle.area(code)),
        "bbox": rle.toBbox(code).tolist(),
        "iscrowd": 0,
        **values,
    }


class CocoRecords:
    """Makes the records of one COCO file, whose annotations are numbered 1, 2, 3, ...

    Args:
        category_ids: category name -> id.
        segmentation: form of the masks in the file.

    Attributes:
        annotations: number of annotations so far.
    """

    def __init__(
        self, category_ids: Mapping[str, int | str], segmentation: Segmentation = "rle"
    ) -> None:
        self._category_ids, self._segmentation = category_ids, segmentation
        self.annotations = 0

    def categories(self) -> list[dict[str, Any]]:
        """Return the table of categories."""
        return [{"id": id, "name": name} for name, id in self._category_ids.items()]

    @staticmethod
    def image(image_id: int | str, file_name: str, size: tuple[int, int]) -> dict[str, Any]:
        """Return the record of an image of size (H, W)."""
        height, width = size
        return {"id": image_id, "file_name": file_name, "height": height, "width": width}

    def annotation(
        self, image_id: int | str, annotation: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the record of an annotation, and that of COCO's format of results.

        Results have masks as compressed RLE, and neither boxes nor areas: `COCO.loadRes` computes
        areas from boxes if there are any, and COCOeval sorts masks into small, medium and large by
        them.

        Args:
            image_id: id of its image.
            annotation: as of `mask_annotation`, with its `category` by name; it may have its
                `polygons`, which are computed otherwise.
        """
        ids = {"image_id": image_id, "category_id": self._category_ids[annotation["category"]]}
        own = {k: v for k, v in annotation.items() if k not in ("category", "polygons")}
        result = ids | {key: value for key, value in own.items() if key in _OF_RESULTS}
        if self._segmentation == "polygons":
            drawn = annotation.get("polygons")
            own["segmentation"] = (
                polygons(rle.decode(own["segmentation"])) if drawn is None else drawn
            )
        self.annotations += 1
        return {"id": self.annotations} | ids | own, result


class CocoWriter:
    """Collect images and their annotations for one COCO file.

    Args:
        category_ids: category name -> id.
        description: text of the file's `info`.
        segmentation: form of the masks in the file.

    Attributes:
        content: of the COCO file.
        results: the annotations in COCO's format of results; see `CocoRecords.annotation`.
    """

    def __init__(
        self,
        category_ids: Mapping[str, int | str],
        description: str = "",
        segmentation: Segmentation = "rle",
    ) -> None:
        self._records = CocoRecords(category_ids, segmentation)
        self.content: dict[str, Any] = {
            "info": {"description": description},
            "images": [],
            "categories": self._records.categories(),
            "annotations": [],
        }
        self.results: list[dict[str, Any]] = []

    def add(
        self,
        image_id: int | str,
        file_name: str,
        size: tuple[int, int],
        annotations: Iterable[Mapping[str, Any]],
    ) -> None:
        """Add annotations of an image; an image may be added several times in a row.

        Args:
            image_id: id of the image.
            file_name: path of the image file.
            size: (H, W) of the image.
            annotations: as of `mask_annotation`, each with its `category` by name.
        """
        images = self.content["images"]
        if not images or images[-1]["id"] != image_id:
            images.append(self._records.image(image_id, file_name, size))
        for annotation in annotations:
            record, result = self._records.annotation(image_id, annotation)
            self.content["annotations"].append(record)
            self.results.append(result)
