#!/usr/bin/env bash
# The precise distance transform of OpenCV depends on where its output lies in memory.
#
# Versions: opencv-python-headless 4.11.0.86 and 5.0.0.93, numpy 2.2.6, on x86-64.
# Expected: cv2.distanceTransform(mask, DIST_L2, DIST_MASK_PRECISE) gives the same distances of the
#   same mask each time; its documentation calls the algorithm precise.
# Seen: outputs that begin 16 bytes apart differ in the last bit, for nearly all of 200 masks of
#   66 x 66 pixels, with one thread too. Distances of one array that are equal by geometry differ
#   likewise. With cv2.setUseOptimized(False) all are equal and correctly rounded.
# Consequence: the simulated click of interactive segmentation (the argmax of this transform, in
#   RITM and its successors) is not reproducible: where pixels are equally far inside, the place of
#   a temporary array chooses. Rounding the squares to integers, which they are, restores it.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/distances.py" <<'PYTHON'
import cv2
import numpy as np

rng = np.random.default_rng(0)
noise = [cv2.GaussianBlur(rng.normal(size=(66, 66)), (0, 0), 3) for _ in range(200)]
masks = [(field > 0).astype(np.uint8) for field in noise]
cv2.setNumThreads(1)


def distances(mask, offset):
    """Distances, written `offset` bytes after a multiple of 64."""
    memory = np.zeros(4 * mask.size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    out = memory[start : start + 4 * mask.size].view(np.float32).reshape(mask.shape)
    return cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE, dst=out)


def compare():
    pairs = [(distances(mask, 0), distances(mask, 16)) for mask in masks]
    differing = sum(not np.array_equal(a, b) for a, b in pairs)
    moved = sum(int(a.argmax()) != int(b.argmax()) for a, b in pairs)
    exact = [np.sqrt(np.rint(np.square(a.astype(float)))).astype(np.float32) for a, _ in pairs]
    rounded = all(np.array_equal(a, e) for (a, _), e in zip(pairs, exact))
    gap = max(np.abs(a - b).max() for a, b in pairs)
    return differing, moved, gap, rounded


print(f"OpenCV {cv2.__version__}")
cv2.setUseOptimized(True)
differing, moved, gap, rounded = compare()
print(f"optimized: {differing} of 200 differ, by up to {gap:.1e}; {moved} with another argmax")
assert differing > 50 and moved > 0 and 0 < gap < 1e-5 and not rounded
cv2.setUseOptimized(False)
differing, moved, gap, rounded = compare()
print(f"not optimized: {differing} of 200 differ; correctly rounded: {rounded}")
assert differing == 0 and moved == 0 and rounded
PYTHON
for version in 4.11.0.86 5.0.0.93; do
    python3 -m pip install --quiet --target "$work/$version" "opencv-python-headless==$version" numpy==2.2.6
    PYTHONPATH="$work/$version" python3 "$work/distances.py"
done
