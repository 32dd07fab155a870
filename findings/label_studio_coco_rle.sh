#!/usr/bin/env bash
# label-studio-sdk: its COCO importer fails on RLE masks.
#
# Versions: label-studio-sdk 2.1.2 (with its own dependencies).
# Expected: COCO allows a segmentation to be polygons or RLE; pycocotools reads both, whatever
#   `iscrowd` is. An importer of COCO takes both, or skips what it cannot draw.
# Seen: `convert_coco_to_ls` takes every segmentation for a list of polygons. RLE, with `iscrowd` 0 or 1,
#   as SAM-based annotators and COCO itself write it, ends the import of the whole file with a
#   TypeError that names no annotation.
# Consequence: write polygons for Label Studio.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet label-studio-sdk==2.1.2 pycocotools==2.0.11
cd "$work"
venv/bin/python - <<'PYTHON'
import json
import logging

import numpy as np
from label_studio_sdk.converter.imports.coco import convert_coco_to_ls
from pycocotools import mask as rle

logging.disable(logging.CRITICAL)
mask = np.zeros((60, 80), np.uint8)
mask[20:40, 10:50] = 1
code = rle.encode(np.asfortranarray(mask))
code["counts"] = code["counts"].decode()
polygon = [[10, 20, 50, 20, 50, 40, 10, 40]]


def imported(segmentation, iscrowd):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": iscrowd,
                "area": 800,
                "segmentation": segmentation,
            }
        ],
    }
    with open("coco.json", "w") as file:
        json.dump(content, file)
    try:
        convert_coco_to_ls("coco.json", "tasks.json", image_root_url="images")
    except TypeError as error:
        return f"TypeError: {error}"
    with open("tasks.json") as file:
        tasks = json.load(file)
    return [own["type"] for task in tasks for own in task["annotations"][0]["result"]]


seen = {
    "polygons": imported(polygon, 0),
    "RLE, iscrowd 1": imported(code, 1),
    "RLE, iscrowd 0": imported(code, 0),
}
for name, result in seen.items():
    print(f"{name}: {result}")
assert seen["polygons"] == ["polygonlabels"], "the behaviour has changed"
for name in ("RLE, iscrowd 0", "RLE, iscrowd 1"):
    assert seen[name][:10] == "TypeError:", "the behaviour has changed"
PYTHON
