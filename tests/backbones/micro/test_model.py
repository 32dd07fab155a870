"""The image encoder of `micro`, at its smallest size."""

from typing import Any

import pytest
import torch

from sam_gym.backbones.micro.model import FINE, PIECE, MicroEncoder


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


def test_it_compiles_as_one_graph(encoder: MicroEncoder) -> None:
    whole: Any = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(whole(pixels(3)), encoder(pixels(3)))


def test_sizes_must_be_whole_cells_of_every_stride() -> None:
    with pytest.raises(ValueError, match="img_size must be a multiple of 96, got 256"):
        MicroEncoder(img_size=256)
