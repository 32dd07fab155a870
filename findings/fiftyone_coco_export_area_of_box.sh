#!/usr/bin/env bash
# FiftyOne: an export to COCO writes the area of the box as that of the mask.
#
# Versions: fiftyone 1.10.0 (with its own dependencies).
# Expected: `area` of an annotation that is read from COCO and exported to COCO is the number of pixels
#   of the mask, as COCO has it, and as the file that was read had it.
# Seen: it is width times height of the box, for polygons and for RLE: 3575 instead of 215 pixels for an
#   object in two parts that lie far from each other.
# Consequence: COCOeval sorts objects into small, medium and large ones by `area`, so AP by size is
#   measured on other objects, without a message. Compute the areas anew after the export.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet fiftyone==1.10.0 pycocotools==2.0.11
cd "$work"
venv/bin/python - <<'PYTHON'
import json
import os

import cv2
import numpy as np
from fiftyone.utils.coco import COCODetectionDatasetExporter, COCODetectionDatasetImporter
from pycocotools import mask as rle

parts = np.zeros((60, 80), np.uint8)
parts[3:12, 5:20] = parts[50:58, 60:70] = 1
code = rle.encode(np.asfortranarray(parts))
annotation = {
    "id": 1,
    "image_id": 1,
    "category_id": 1,
    "iscrowd": 0,
    "area": int(parts.sum()),
    "bbox": rle.toBbox(code).tolist(),
    "segmentation": {"size": [60, 80], "counts": code["counts"].decode()},
}
content = {
    "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
    "categories": [{"id": 1, "name": "thing"}],
    "annotations": [annotation],
}
os.makedirs("images")
cv2.imwrite("images/a.png", np.full((60, 80, 3), 99, np.uint8))
with open("annotations.json", "w") as file:
    json.dump(content, file)


def exported_area(iscrowd):
    importer = COCODetectionDatasetImporter(
        data_path="images", labels_path="annotations.json", label_types="segmentations"
    )
    exporter = COCODetectionDatasetExporter(labels_path="back.json", export_media=False)
    with importer, exporter:
        for path, metadata, found in importer:
            found.detections[0]["iscrowd"] = iscrowd
            exporter.export_sample(path, found, metadata=metadata)
    with open("back.json") as file:
        (back,) = json.load(file)["annotations"]
    return back["area"]


seen = {"polygons": exported_area(0), "RLE": exported_area(1)}
print(f"area before: {annotation['area']}, exported: {seen}")
assert annotation["area"] == 215, annotation
assert seen == {"polygons": 3575.0, "RLE": 3575.0}, "the behaviour has changed"
PYTHON
