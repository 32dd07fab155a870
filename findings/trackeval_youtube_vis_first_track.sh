#!/usr/bin/env bash
# trackeval lets two tracks count for one object of YouTube-VIS if the first one has id 0.
#
# Versions: trackeval 1.3.0, numpy 2.3.5, scipy 1.16.3, pycocotools 2.0.11, tabulate 0.9.0.
# Expected: two predicted tracks on the first of two objects find one object: the second is a false
#   positive, and AP is 51/101 = 0.505.
# Seen: AP 1.0. The reader numbers predicted tracks from 0, the matching takes an object for taken
#   only if the id of its track is larger than 0, and so the track after it takes the object again.
#   The count of correct tracks is then two of two objects. With a third track before both (another
#   category), ids are larger than 0 and AP is 0.505.
# Consequence: AP of YouTube-VIS depends on the order of the tracks in the results file.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" --no-deps trackeval==1.3.0 numpy==2.3.5 \
    scipy==1.16.3 pycocotools==2.0.11 tabulate==0.9.0
cd "$work"
PYTHONPATH="$work/site" python3 - <<'PYTHON'
import contextlib
import io
import json
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from trackeval import Evaluator
from trackeval.datasets import YouTubeVIS
from trackeval.metrics import TrackMAP


def coded(left: int) -> dict:
    # Runs of a 20 x 20 mask whose columns from `left` on are set, ten of them.
    return {"size": [20, 20], "counts": [20 * left, 200, 200 - 20 * left]}


def compressed(left: int) -> dict:
    # Truth has runs, results have compressed RLE.
    code = rle.frPyObjects(coded(left), 20, 20)
    return code | {"counts": code["counts"].decode()}


def ap(before: list[dict]) -> float:
    truth = {
        "videos": [{"id": 1, "width": 20, "height": 20, "length": 1, "file_names": ["a/0.jpg"]}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {
                "id": number,
                "video_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "width": 20,
                "height": 20,
                "length": 1,
                "segmentations": [coded(left)],
                "bboxes": [[left, 0, 10, 20]],
                "areas": [200],
            }
            for number, left in ((1, 0), (2, 10))
        ],
    }
    found = [
        {"video_id": 1, "category_id": 1, "score": score, "segmentations": [compressed(0)]}
        for score in (0.9, 0.8)
    ]
    for path, content in (("gt/youtube_vis_val/truth.json", truth), ("found/youtube_vis_val/mine/data/r.json", before + found)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content))
    quiet = {"PRINT_CONFIG": False}
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = YouTubeVIS(
            quiet
            | {
                "GT_FOLDER": "gt/",
                "TRACKERS_FOLDER": "found/",
                "OUTPUT_FOLDER": "out",
                "SPLIT_TO_EVAL": "val",
            }
        )
        evaluator = Evaluator(
            quiet | {"USE_PARALLEL": False, "PLOT_CURVES": False, "PRINT_RESULTS": False}
        )
        results, _ = evaluator.evaluate([dataset], [TrackMAP(quiet | {"USE_TIME_RANGES": False})])
    scores = results["YouTubeVIS"]["mine"]["COMBINED_SEQ"]["dog"]["TrackMAP"]["AP_all"]
    return float(np.mean(scores))


cat = {"video_id": 1, "category_id": 2, "score": 0.5, "segmentations": [compressed(0)]}
first, later = ap([]), ap([cat])
print(f"two tracks on one of two objects: AP {first:.3f}; after a track of another category: {later:.3f}")
assert abs(first - 1.0) < 1e-6 and abs(later - 51 / 101) < 1e-6
PYTHON
