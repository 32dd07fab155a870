"""The image encoder of `micro`, at its smallest size."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from sam_gym.backbones.micro import model
from sam_gym.backbones.micro.model import FINE, PIECE, FusedConv, MicroEncoder


@pytest.fixture(scope="module")
def encoder() -> MicroEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MicroEncoder(img_size=96, depth=1).eval()


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, PIECE + 1])
def test_pieces_of_a_batch_change_nothing(encoder: MicroEncoder, count: int) -> None:
    with torch.no_grad():
        found = encoder.forward_with_early(pixels(count))
    # With gradients, the trunk takes the batch as a whole.
    torch.testing.assert_close(found, encoder.forward_with_early(pixels(count)))
    assert found[0].shape == (count, 128, 4, 4) and found[1].shape == (count, FINE, 4, 4)


@pytest.mark.parametrize("size", [96, 192])
def test_blocks_pad_as_those_of_timm(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = model.build_trunk().eval()
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.5)
        x = torch.randn(2, 3, size, size)
    ours = model.fold_norms(copy.deepcopy(trunk))
    with monkeypatch.context() as patch:
        patch.setattr(model, "_pad_early", lambda block: None)
        theirs = model.fold_norms(copy.deepcopy(trunk))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for own, other, plain in zip(ours(x), theirs(x), trunk(x), strict=True):
            torch.testing.assert_close(own, other)
            torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-3)
    for folded in (ours, theirs):
        sum(own.square().mean() for own in folded(x)).backward()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.ReLU(), nn.Identity()])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (5, 1, 8)])
def test_a_convolution_with_its_activation(
    act: nn.Module, kernel: int, stride: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 16, kernel, stride, kernel // 2, groups=groups).requires_grad_(False)
    conv.weight.normal_(generator=generator)
    conv.bias.normal_(generator=generator)  # type: ignore[union-attr]
    fused = FusedConv(conv, act)
    x = 3 * torch.randn(2, 8, 12, 12, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)

    def check(own: FusedConv) -> None:
        with torch.no_grad():
            torch.testing.assert_close(own(x), act(conv(x)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own(x), act(conv(x)))  # with gradients, as two operations

    check(fused)
    conv.weight.mul_(-2.0)  # as an optimizer or `load_state_dict` changes it
    check(fused)
    check(copy.deepcopy(fused))
    check(pickle.loads(pickle.dumps(fused)))


@pytest.mark.skipif(not model._HAS_FUSED, reason="this build of torch has no oneDNN")
def test_activations_are_part_of_convolutions(encoder: MicroEncoder) -> None:
    with torch.no_grad(), torch.profiler.profile() as profile:
        encoder.trunk(pixels(1).contiguous(memory_format=torch.channels_last))
    called = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in called
    assert not called & {"aten::hardtanh_", "aten::clamp_", "aten::convolution"}


def test_it_compiles_as_one_graph(encoder: MicroEncoder) -> None:
    whole: Any = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(whole(pixels(3)), encoder(pixels(3)))


def test_sizes_must_be_whole_cells_of_every_stride() -> None:
    with pytest.raises(ValueError, match="img_size must be a multiple of 96, got 256"):
        MicroEncoder(img_size=256)
