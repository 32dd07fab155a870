#!/usr/bin/env bash
# pycocotools: adding its box to a result changes the AP of its mask.
#
# Versions: pycocotools 2.0.11, numpy 2.3.5.
# Expected: COCOeval of masks ("segm") looks at masks only, so a `bbox` beside a `segmentation` in the
#   results changes nothing.
# Seen: with boxes, AP of small objects rises from 0.5 to 1.0. loadRes takes the area of a result
#   from its box whenever there is one. A thin diagonal mask of 494 pixels then has an area of
#   10,000, and as a false positive it no longer counts among small objects.
# Consequence: AP by size, of masks, depends on whether the results file has boxes as well.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" --no-deps pycocotools==2.0.11 numpy==2.3.5
cd "$work"
PYTHONPATH="$work/site" python3 - <<'PYTHON'
import contextlib
import io

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def coded(mask):
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return code | {"counts": code["counts"].decode()}


square = np.zeros((200, 200), bool)
square[150:170, 20:40] = True
diagonal = np.zeros((200, 200), bool)
for shift in range(-2, 3):
    rows = np.arange(max(0, -shift), 100 - max(0, shift))
    diagonal[rows, rows + shift] = True

truth = COCO()
truth.dataset = {
    "images": [{"id": 1, "width": 200, "height": 200}],
    "categories": [{"id": 1, "name": "thing"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 0,
            "area": int(square.sum()),
            "bbox": [20, 150, 20, 20],
            "segmentation": coded(square),
        }
    ],
}


def small_ap(boxes):
    results = []
    for mask, score in ((diagonal, 0.9), (square, 0.8)):
        code = coded(mask)
        result = {"image_id": 1, "category_id": 1, "score": score, "segmentation": code}
        if boxes:
            result["bbox"] = rle.toBbox(code).tolist()
        results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[3]


without, with_boxes = small_ap(boxes=False), small_ap(boxes=True)
print(f"{int(diagonal.sum())} pixels; AP small {without:.3f} without boxes, {with_boxes:.3f} with")
assert abs(without - 0.5) < 0.01 and with_boxes > 0.99, "the behaviour has changed"
PYTHON
