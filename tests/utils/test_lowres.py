"""Masks on the input frame and on the low-res grid."""

import numpy as np
import pytest

from sam_gym.utils.lowres import frame_mask, low_res


@pytest.mark.parametrize("side", [64, 256])
def test_low_res_is_the_mean_of_each_cell(side: int) -> None:
    mask = np.random.default_rng(0).random((side, side)) < 0.4
    cells = mask.reshape(side // 4, 4, side // 4, 4).mean(axis=(1, 3), dtype=np.float32)
    np.testing.assert_array_equal(low_res(mask, (side // 4, side // 4)), cells)


def test_frame_mask_pads_at_the_bottom_and_right() -> None:
    mask = np.ones((30, 40), bool)
    framed = frame_mask(mask, (12, 16), 16)
    assert framed.shape == (16, 16) and framed.dtype == np.float32
    assert (framed[:12] == 1).all() and not framed[12:].any()
    np.testing.assert_array_equal(frame_mask(mask, (30, 40), 40)[:30], mask)
