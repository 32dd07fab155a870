"""Parts of the memory against closed forms."""

import math

import torch
from segment_anything.modeling.common import LayerNorm2d

from sam_gym.backbones.video.modules import _ChannelNorm, rotate


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


def test_channel_norm_is_that_of_segment_anything() -> None:
    own, reference = _ChannelNorm(6), LayerNorm2d(6)
    x = 3 * torch.randn((2, 6, 5, 4), generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        own.weight.normal_()
        own.bias.normal_()
    reference.load_state_dict(own.state_dict())
    torch.testing.assert_close(own(x), reference(x), atol=1e-5, rtol=1e-5)
