"""Parts of the memory against closed forms."""

import math

import pytest
import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from sam_gym.backbones.sam2 import pointwise
from sam_gym.backbones.video import modules
from sam_gym.backbones.video.memory import Entry, MemoryKeys, VideoMemory, recall
from sam_gym.backbones.video.modules import Workspace, _ChannelNorm, rotate


def test_pairs_turn_by_column_and_row() -> None:
    grid, channels = (2, 3), 8
    x = torch.randn((2, 2 * 6, channels), generator=torch.Generator().manual_seed(0))
    turned = rotate(x, grid)
    for token in range(12):
        row, column = divmod(token % 6, 3)
        for pair in range(4):
            place = column if pair < 2 else row
            angle = place * 10000 ** -(4 * (pair % 2) / channels)
            first, second = x[:, token, 2 * pair], x[:, token, 2 * pair + 1]
            expected = torch.stack(
                [
                    first * math.cos(angle) - second * math.sin(angle),
                    first * math.sin(angle) + second * math.cos(angle),
                ]
            )
            own = turned[:, token, 2 * pair : 2 * pair + 2].T
            torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)
    assert rotate(x.bfloat16(), grid).dtype == torch.bfloat16


@pytest.mark.parametrize("channels", [4, 12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_norm_is_that_of_segment_anything(
    channels: int, layout: torch.memory_format
) -> None:
    own, reference = _ChannelNorm(channels), LayerNorm2d(channels)
    x = 3 * torch.randn((2, channels, 5, 4), generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        own.weight.normal_()
        own.bias.normal_()
    reference.load_state_dict(own.state_dict())
    found = own(x.to(memory_format=layout))
    torch.testing.assert_close(found, reference(x), atol=1e-5, rtol=1e-5)


def test_pointwise_convolutions_are_one_map() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1)
        x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(pointwise(x, first), first(x))
    torch.testing.assert_close(pointwise(x, first, second), second(first(x)))


def test_attention_in_pieces_is_attention(
    memory: VideoMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, to values that are not projected yet, as the fused kernel in one batch."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    prepared, exists = normal(3, 16, 32), torch.rand((3, 6), generator=random) > 0.3
    exists[:, 0] = True
    slots = torch.tensor([[6, 1, 0]]).expand(3, -1)
    spatial = normal(3, 3, *memory.memory_shape)
    given = spatial, slots, normal(3, 3, 32), torch.rand((3, 3), generator=random)
    monkeypatch.setattr(modules, "_PIECE", 1)
    monkeypatch.setattr(modules, "_LEAST", 5)
    for seen in (None, exists):
        expected = memory.attend(prepared, *given, seen).detach()
        with torch.no_grad():
            found = memory.attend(prepared, *given, seen)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_kept_keys_change_no_result(memory: VideoMemory) -> None:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def entry() -> Entry:
        zero = torch.zeros(())
        return Entry(zero, zero, zero, normal(32), normal(*memory.memory_shape).bfloat16())

    tracks: list[dict[int, Entry]] = [{0: entry()} for _ in range(2)]
    kept: list[dict[int, MemoryKeys]] = [{} for _ in tracks]
    kept_low: list[dict[int, MemoryKeys]] = [{} for _ in tracks]
    rows, work = torch.tensor([1, 0]), Workspace()
    for frame in range(1, 12):
        if frame == 9:
            # A prompted frame gets another memory.
            tracks[1][0] = entry()
        tracked = [{k: own for k, own in track.items() if k} for track in tracks]
        recalls = [recall(frame, [0], own, num_frames=20) for own in tracked]
        prepared = normal(2, 16, 32)
        expected = memory.condition(prepared[rows], recalls, tracks).detach()
        with torch.no_grad():
            found = memory.condition(prepared, recalls, tracks, rows, kept, work)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            low = memory.condition(prepared, recalls, tracks, rows, kept_low)
        assert (low - expected).std() < 0.05 * expected.std()
        assert all(set(own) == {f for f, _ in recalls[0].frames} for own in kept)
        for track in tracks:
            track[frame] = entry()
    assert all(len(own) == 7 for own in kept)
