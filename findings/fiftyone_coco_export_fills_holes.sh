#!/usr/bin/env bash
# FiftyOne: masks with holes lose them in an export to COCO.
#
# Versions: fiftyone 1.10.0 (with its own dependencies).
# Expected: COCO RLE that is read by the importer of `COCODetectionDataset` and written by its
#   exporter covers the same pixels.
# Seen: the exporter writes the outer outline of every mask as a polygon, so that a ring comes back as
#   a disc (IoU 0.76). An object in two parts keeps them, with other pixels at its outline (IoU 0.92).
#   Only objects with an attribute `iscrowd` of 1 are written as RLE, pixel by pixel.
# Consequence: a round trip changes the ground truth, without a message. Set `iscrowd` to 1 on all
#   detections before the export, and read the result with crowds.
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

y, x = np.mgrid[:60, :80]
distance = np.hypot(y - 30, x - 40)
ring = (distance < 25) & (distance > 10)
parts = np.zeros((60, 80), bool)
parts[3:12, 5:20] = parts[50:58, 60:70] = True


def round_trip(mask, iscrowd):
    os.makedirs("images", exist_ok=True)
    cv2.imwrite("images/a.png", np.full((60, 80, 3), 99, np.uint8))
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": rle.toBbox(code).tolist(),
        "segmentation": {"size": [60, 80], "counts": code["counts"].decode()},
    }
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [annotation],
    }
    with open("annotations.json", "w") as file:
        json.dump(content, file)
    importer = COCODetectionDatasetImporter(
        data_path="images", labels_path="annotations.json", label_types="segmentations"
    )
    exporter = COCODetectionDatasetExporter(labels_path="back.json", export_media=False)
    with importer, exporter:
        for path, metadata, found in importer:
            if iscrowd:
                found.detections[0]["iscrowd"] = 1
            exporter.export_sample(path, found, metadata=metadata)
    with open("back.json") as file:
        (annotation,) = json.load(file)["annotations"]
    code = annotation["segmentation"]
    if isinstance(code, list):
        code = rle.merge(rle.frPyObjects(code, 60, 80))
    elif isinstance(code["counts"], list):
        code = rle.frPyObjects(code, 60, 80)
    back = rle.decode(code).astype(bool)
    kind = "polygon" if isinstance(annotation["segmentation"], list) else "RLE"
    return kind, round(float((back & mask).sum() / (back | mask).sum()), 2)


seen = {
    (name, iscrowd): round_trip(mask, iscrowd)
    for name, mask in (("ring", ring), ("two parts", parts))
    for iscrowd in (0, 1)
}
for (name, iscrowd), (kind, iou) in seen.items():
    print(f"{name}, iscrowd {iscrowd}: {kind}, IoU {iou}")
assert seen["ring", 0][0] == seen["two parts", 0][0] == "polygon", "the behaviour has changed"
assert seen["ring", 0][1] < 0.8 < seen["two parts", 0][1] < 1, "the behaviour has changed"
assert seen["ring", 1] == seen["two parts", 1] == ("RLE", 1.0), "the behaviour has changed"
PYTHON
