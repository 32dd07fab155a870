#!/usr/bin/env bash
# OpenCV reads TIFF files of compressions that it lacks as black images, without an error.
#
# Versions: opencv-python-headless 5.0.0.93, tifffile 2025.5.10, imagecodecs 2025.3.30, numpy 2.2.6.
# Expected: cv2.imread returns None for a file that it cannot decode, as it does for other formats
#   (and as its documentation says), or the pixels.
# Seen: for 8-bit RGB TIFF with JPEG 2000, JPEG XL or PNG compression, which slide scanners and remote
#   sensing use, it returns an array of the right shape and type, all zeros. Only a line on stderr
#   tells. TIFF with deflate and LZW compression, written by the same library, are read.
# Consequence: a training set holds black images beside correct masks.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" opencv-python-headless==5.0.0.93 \
    tifffile==2025.5.10 imagecodecs==2025.3.30 numpy==2.2.6
cd "$work"
PYTHONPATH="$work/site" python3 - <<'PYTHON' 2> stderr.txt
import cv2
import numpy as np
import tifffile

y, x = np.mgrid[:64, :96]
image = np.stack([2 * x, 3 * y, 128 + 0 * x], axis=-1).astype(np.uint8)
read = {}
for name in ("deflate", "lzw", "jpeg2000", "jpegxl", "png"):
    file = f"{name}.tif"
    tifffile.imwrite(file, image, photometric="rgb", compression=name)
    read[name] = cv2.imread(file, cv2.IMREAD_COLOR)
    own = read[name]
    shown = "None" if own is None else f"{own.shape} {own.dtype}, maximum {own.max()}"
    print(f"{name}: {shown}", flush=True)
for name in ("deflate", "lzw"):
    assert np.array_equal(read[name][..., ::-1], image), name
for name in ("jpeg2000", "jpegxl", "png"):
    own = read[name]
    assert own is not None and own.shape == image.shape and own.dtype == np.uint8, name
    assert own.max() == 0, name
PYTHON
