#!/usr/bin/env bash
# A default EdgeTamConfig of transformers describes a ResNet-50 that its neck does not fit.
#
# Versions: transformers 5.24.0, timm 1.0.31, torch 2.14.1.
# Expected: EdgeTamConfig(), like Sam2Config(), is the published model: the trunk is repvit_m1, with
#   stages of 48, 96, 192 and 384 channels, as the neck of the same configuration says.
# Seen: the trunk is resnet50, which has other channels. The model is built without a word, and its
#   first forward fails: RuntimeError, "Invalid channel dimensions". Whoever wants
#   random weights of EdgeTAM passes a configuration of the trunk, or takes that of a checkpoint.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 timm==1.0.31 torch==2.14.1 pillow
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers import EdgeTamConfig, EdgeTamModel

config = EdgeTamConfig()
vision = config.vision_config
print("trunk:", vision.backbone_config.architecture)
print("channels that the neck takes:", vision.backbone_channel_list)
with torch.device("meta"):
    model = EdgeTamModel(config).eval()
    pixels = torch.zeros(1, 3, 1024, 1024)
    try:
        model.get_image_features(pixel_values=pixels)
        failure = None
    except RuntimeError as error:
        failure = error
print("forward:", type(failure).__name__, str(failure)[:80])
assert vision.backbone_config.architecture == "resnet50"
assert vision.backbone_channel_list == [384, 192, 96, 48]
assert failure is not None and "channel" in str(failure)
PYTHON
