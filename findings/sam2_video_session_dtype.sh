#!/usr/bin/env bash
# A video session of SAM 2 in transformers fails with its own default dtype.
#
# Versions: transformers 5.24.0, torch 2.14.1.
# Expected: Sam2VideoInferenceSession(video, height, width), with the defaults that its signature
#   shows (dtype="float32"), holds the frames in float32.
# Seen: TypeError from torch. The name is passed to Tensor.to(), which takes a torch.dtype only. The
#   processor's init_video_session passes one, so that only those meet it who open a session for
#   frames that are prepared already. EdgeTamVideoInferenceSession is the same.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1 numpy pillow
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import inspect

import torch
from transformers.models.edgetam_video.modeling_edgetam_video import EdgeTamVideoInferenceSession
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

video = torch.zeros(2, 3, 64, 64)
for session in (Sam2VideoInferenceSession, EdgeTamVideoInferenceSession):
    default = inspect.signature(session).parameters["dtype"].default
    try:
        session(video, 64, 64)
        failure = None
    except TypeError as error:
        failure = error
    right = session(video, 64, 64, dtype=torch.float32).get_frame(0).dtype
    print(f"{session.__name__}: dtype={default!r} -> {type(failure).__name__}; torch.float32 -> {right}")
    assert default == "float32" and failure is not None and right == torch.float32
PYTHON
