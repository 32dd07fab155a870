#!/usr/bin/env bash
# Datumaro: objects that went through CVAT's format as masks come back as crowds.
#
# Versions: datumaro 1.13.12 (with its own dependencies).
# Expected: a COCO object with an RLE mask and `iscrowd: 0` that is exported to CVAT's XML and back to
#   COCO is an object with `iscrowd: 0` again.
# Seen: it has `iscrowd: 1`. Datumaro marks every mask that it writes as COCO RLE as a crowd; only
#   polygons stay single objects.
# Consequence: COCOeval ignores crowds and loaders drop them, so the round trip loses every object,
#   without a message. Write polygons, or read with crowds.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datumaro==1.13.12 opencv-python-headless
cd "$work"
venv/bin/python - <<'PYTHON'
import json
import os

import cv2
import numpy as np
from datumaro import Dataset
from pycocotools import mask as rle

mask = np.zeros((60, 80), np.uint8)
mask[20:40, 10:50] = 1
code = rle.encode(np.asfortranarray(mask))
code["counts"] = code["counts"].decode()
polygon = [[10, 20, 50, 20, 50, 40, 10, 40]]


def round_trip(name, segmentation):
    os.makedirs(f"{name}/images"), os.makedirs(f"{name}/annotations")
    cv2.imwrite(f"{name}/images/a.png", np.full((60, 80, 3), 99, np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "area": 800,
                "bbox": [10, 20, 40, 20],
                "segmentation": segmentation,
            }
        ],
    }
    with open(f"{name}/annotations/instances_all.json", "w") as file:
        json.dump(content, file)
    sent = Dataset.import_from(name, "coco_instances")
    sent.export(f"{name}_cvat", "cvat", save_media=True)
    returned = Dataset.import_from(f"{name}_cvat", "cvat")
    returned.export(f"{name}_back", "coco_instances", save_media=True)
    with open(f"{name}_back/annotations/instances_all.json") as file:
        (annotation,) = json.load(file)["annotations"]
    return annotation["iscrowd"]


seen = {"polygon": round_trip("polygon", polygon), "RLE": round_trip("rle", code)}
print(", ".join(f"{name}: iscrowd {value}" for name, value in seen.items()))
assert seen == {"polygon": 0, "RLE": 1}, "the behaviour has changed"
PYTHON
