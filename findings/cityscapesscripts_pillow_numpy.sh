#!/usr/bin/env bash
# cityscapesScripts writes no instance images with Pillow 13, and its evaluation needs NumPy < 2.4.
#
# Versions: cityscapesScripts 2.3.0, pillow 13.0.0, numpy 2.4.6, pyquaternion 0.9.9.
# Expected: json2instanceImg writes a PNG of instance ids from polygons, and
#   evalPixelLevelSemanticLabeling scores predictions; its requirements name no upper versions.
# Seen: json2instanceImg ends with "cannot write mode I as PNG" (Pillow 13 dropped that conversion),
#   and evaluateImgLists with its default options with "module 'numpy' has no attribute 'in1d'"
#   (removed in NumPy 2.4). Without the instance-level score (evalInstLevelScore=False) it runs.
# Consequence: a fresh installation prepares and scores no Cityscapes.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" --no-deps cityscapesScripts==2.3.0 \
    pillow==13.0.0 numpy==2.4.6 pyquaternion==0.9.9
cd "$work"
PYTHONPATH="$work/site" python3 - <<'PYTHON'
import json

import numpy as np
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as evaluation
from cityscapesscripts.preparation.json2instanceImg import json2instanceImg
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from PIL import Image

car = {"label": "car", "polygon": [[1, 1], [9, 1], [9, 9], [1, 9]]}
with open("ulm_000000_000000_gtFine_polygons.json", "w") as file:
    json.dump({"imgHeight": 16, "imgWidth": 16, "objects": [car]}, file)
labels = "ulm_000000_000000_gtFine_labelIds.png"
instances = labels.replace("labelIds", "instanceIds")
json2labelImg("ulm_000000_000000_gtFine_polygons.json", labels)
ids = np.array(Image.open(labels))
print("labelIds:", np.unique(ids).tolist())
assert np.unique(ids).tolist() == [0, 26]

try:
    json2instanceImg("ulm_000000_000000_gtFine_polygons.json", instances)
except OSError as error:
    print("json2instanceImg:", error)
    assert "cannot write mode I as PNG" in str(error)
else:
    raise SystemExit("json2instanceImg writes the file")

Image.fromarray(np.where(ids == 26, 26000, ids).astype(np.uint16)).save(instances)
evaluation.args.quiet, evaluation.args.JSONOutput = True, False
try:
    evaluation.evaluateImgLists([labels], [labels], evaluation.args)
except AttributeError as error:
    print("evaluateImgLists:", error)
    assert "in1d" in str(error)
else:
    raise SystemExit("evaluateImgLists scores the prediction")
evaluation.args.evalInstLevelScore = False
scores = evaluation.evaluateImgLists([labels], [labels], evaluation.args)
print("without the instance-level score: car", scores["classScores"]["car"])
assert scores["classScores"]["car"] == 1.0
PYTHON
