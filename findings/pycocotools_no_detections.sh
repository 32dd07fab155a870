#!/usr/bin/env bash
# pycocotools: the results of a model that has found nothing cannot be evaluated.
#
# Versions: pycocotools 2.0.11, numpy 2.3.5.
# Expected: loadRes([]) gives results without annotations, whose AP and AR are 0, as for a model
#   whose only detection lies on the wrong image.
# Seen: loadRes([]) raises IndexError: list index out of range, because it looks at the first result
#   to tell boxes from masks. One wrong result of score 0 is enough to get AP 0.
# Consequence: an evaluation during early training, or at a high threshold, stops instead of
#   reporting 0. Evaluate by hand, or skip COCOeval when there are no results.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" --no-deps pycocotools==2.0.11 numpy==2.3.5
cd "$work"
PYTHONPATH="$work/site" python3 - <<'PYTHON'
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

truth = COCO()
truth.dataset = {
    "images": [{"id": 1, "width": 64, "height": 64}],
    "categories": [{"id": 1, "name": "thing"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400, "bbox": [8, 8, 20, 20]}
    ],
}


def ap(results):
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


wrong = [{"image_id": 1, "category_id": 1, "bbox": [40, 40, 4, 4], "score": 0.0}]
print("one wrong result: AP", ap(wrong))
assert ap(wrong) == 0.0
try:
    ap([])
except IndexError as error:
    print(f"no results: IndexError: {error}")
else:
    raise SystemExit("loadRes accepts an empty list now")
PYTHON
