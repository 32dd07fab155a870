#!/usr/bin/env bash
# timm: the last feature map of a ViT is not what the model computes: its final norm is missing.
#
# Versions: timm 1.0.31, torch 2.14.1.
# Expected: the last map of `create_model(..., features_only=True)` is the output of the same model's
#   `forward_features`, as it is for a ResNet: for a ViT, its patch tokens.
# Seen: for a ViT the extractor replaces the final norm by the identity, and has no option for it. The
#   maps have another scale in each channel. `forward_intermediates(..., norm=True)` has the norm.
# Consequence: heads on "features of DINO" that are read with `features_only=True` see others than
#   those that published linear probes see, and cosine similarities differ.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet timm==1.0.31 torch==2.14.1
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import timm
import torch


def same(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    extractor = timm.create_model(name, features_only=True).eval()
    inner = getattr(extractor, "model", extractor)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inner.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        whole, last = model.forward_features(image), extractor(image)[-1]
        if whole.ndim == 3:  # tokens
            whole = whole[:, model.num_prefix_tokens :].transpose(1, 2).reshape(last.shape)
            normed = model.forward_intermediates(
                image, indices=1, norm=True, intermediates_only=True
            )[-1]
            assert torch.allclose(normed, whole, atol=1e-5)
    difference = float((last - whole).abs().max() / whole.std())
    print(f"{name}: largest difference {difference:.2g} of the deviation")
    return difference < 1e-3


seen = {name: same(name) for name in ("test_resnet", "test_vit")}
assert seen == {"test_resnet": True, "test_vit": False}, "the behaviour has changed"
PYTHON
