"""Muon against torch's own, which takes matrices only and computes in bfloat16."""

import pytest
import torch
from torch import nn

from sam_gym.backbones.micro.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_orthogonalized_keeps_directions_and_evens_out_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalized(matrix) @ vh.T
    sizes = inner.diagonal()
    assert 0.5 < sizes.min() and sizes.max() < 1.3
    assert (inner - sizes.diag()).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_like_torch() -> None:
    start = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    noise = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradient = torch.randn(12, 30, generator=noise)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_convolution_steps_as_a_matrix_of_its_filters() -> None:
    start = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    convolution, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    convolution.grad = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    matrix.grad = convolution.grad.flatten(1).clone()
    Muon([convolution], lr=0.01).step()
    Muon([matrix], lr=0.01).step()
    torch.testing.assert_close(convolution.flatten(1), matrix)


def test_a_parameter_without_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(8, 8))
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert (parameter == 1).all()
