"""The fused attention against segment_anything's own."""

import copy

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, Block

from sam_gym.backbones.attention import FusedAttention, fuse_attention


def attention(shape: tuple[int, int], positions: bool) -> Attention:
    noise = torch.Generator().manual_seed(0)
    layer = Attention(24, 3, use_rel_pos=positions, input_size=shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.4, generator=noise)
    return layer


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (4, 7)])
def test_same_values_and_gradients(shape: tuple[int, int], positions: bool) -> None:
    original = attention(shape, positions)
    fused = FusedAttention(copy.deepcopy(original))
    assert list(fused.state_dict()) == list(original.state_dict())
    x = torch.randn(2, *shape, 24, generator=torch.Generator().manual_seed(1))
    expected, got = original(x), fused(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.std()
    expected.square().sum().backward()
    got.square().sum().backward()
    for (name, one), other in zip(original.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert (one.grad - other.grad).norm() <= 1e-4 * one.grad.norm(), name


def test_positions_interpolate_as_the_original_does() -> None:
    original = attention((6, 6), True)
    fused = FusedAttention(copy.deepcopy(original))
    x = torch.randn(1, 4, 5, 24, generator=torch.Generator().manual_seed(1))
    expected = original(x)
    assert (fused(x) - expected).abs().max() <= 1e-5 * expected.std()


def test_copies_keep_weights_of_their_own() -> None:
    block = Block(24, 3, use_rel_pos=True, window_size=3, input_size=(6, 6))
    names = list(block.state_dict())
    fuse_attention(block)
    assert list(block.state_dict()) == names and type(block.attn) is FusedAttention
    x = torch.randn(1, 6, 6, 24)
    before = block(x)
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.attn.proj.weight.zero_()
        other.attn.proj.bias.zero_()
    assert torch.equal(block(x), before)
    assert not torch.equal(other(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_originals(dtype: torch.dtype) -> None:
    original = attention((6, 6), True)
    fused = FusedAttention(copy.deepcopy(original))
    x = torch.randn(2, 6, 6, 24, generator=torch.Generator().manual_seed(1))
    exact = original(x)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        errors = [(layer(x).float() - exact).square().mean().sqrt() for layer in (fused, original)]
    assert errors[0] <= 1.5 * errors[1] and errors[1] <= 0.05 * exact.std()
