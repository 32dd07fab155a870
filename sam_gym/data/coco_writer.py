"""Write annotations in COCO's JSON format, which `sam_gym.data.coco` and pycocotools read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle


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


class CocoWriter:
    """Collect images and their annotations for one COCO file.

    Args:
        category_ids: category name -> id.
        description: text of the file's `info`.
    """

    def __init__(self, category_ids: Mapping[str, int], description: str = "") -> None:
        self._category_ids = category_ids
        self.content: dict[str, Any] = {
            "info": {"description": description},
            "images": [],
            "categories": [{"id": id, "name": name} for name, id in category_ids.items()],
            "annotations": [],
        }

    def add(
        self,
        image_id: int,
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
        images, written = self.content["images"], self.content["annotations"]
        if not images or images[-1]["id"] != image_id:
            height, width = size
            image = {"id": image_id, "file_name": file_name, "height": height, "width": width}
            images.append(image)
        for annotation in annotations:
            ids = {"id": len(written) + 1, "image_id": image_id}
            ids["category_id"] = self._category_ids[annotation["category"]]
            written.append(ids | {k: v for k, v in annotation.items() if k != "category"})
