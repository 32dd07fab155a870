"""Hiera without gradients against timm's own forward pass."""

import pytest
import torch
from timm.models.hieradet_sam2 import HieraDet
from torch import nn

from sam_gym.backbones.hiera import hiera_stages
from sam_gym.backbones.sam2 import Sam2Encoder

#: Windows of 6 and 3 cells do not divide the grids of stages 3 and 4.
TRUNK = {"embed_dim": 8, "stages": (1, 2, 3, 2), "window_spec": (8, 4, 6, 3)}


@pytest.mark.parametrize("side", [96, 160, 224])
def test_stages_are_those_of_timm(side: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(side)
        trunk = HieraDet(num_classes=0, global_att_blocks=(4,), **TRUNK).eval()
        for parameter in trunk.parameters():
            # Biases, which are zero at first, are the keys and values of padding.
            nn.init.normal_(parameter, 0.0, 0.3)
        pixels = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = trunk.forward_intermediates(pixels, intermediates_only=True)
        found = hiera_stages(trunk, pixels.clone())
        alone = hiera_stages(trunk, pixels[1:2])
    assert [own.shape for own in found] == [own.shape for own in expected]
    for own, single, reference in zip(found, alone, expected, strict=True):
        scale = reference.std()
        torch.testing.assert_close(own / scale, reference / scale, atol=1e-4, rtol=0)
        torch.testing.assert_close(single[0] / scale, own[1] / scale, atol=1e-4, rtol=0)


def test_gradients_are_those_of_timm() -> None:
    encoder = Sam2Encoder(96, 16, global_att_blocks=(4,), **TRUNK)
    encoder(torch.zeros(1, 3, 96, 96)).sum().backward()
    assert all(own.grad is not None for own in encoder.trunk.blocks.parameters())
