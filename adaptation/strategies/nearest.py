"""Grid points that prompt an object: SAOM's nearest neighbour, or any point inside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adaptation.prompting import points_inside
from sam_gym.utils.transfer import to_device

#: Points that are drawn to find one whose grid point lies inside the object.
_DRAWS = 16


def cell_fractions(targets: Tensor, cells: tuple[int, int]) -> Tensor:
    """Fraction of each cell of the embedding that an object fills: float32 (P, h * w).

    Args:
        targets: float32 (P, hm, wm), fractions of low-res pixels.
        cells: (h, w) of the embedding.
    """
    return F.adaptive_avg_pool2d(targets[:, None], cells).flatten(1)


def vanished(targets: Tensor, cells: tuple[int, int]) -> Tensor:
    """Objects that fill half of no cell of the embedding: bool (P,); see `cell_fractions`."""
    return cell_fractions(targets, cells).amax(dim=1) < 0.5


def nearest_points(
    embeddings: Tensor,
    rows: Tensor,
    targets: Tensor,
    valid: Tensor,
    grid: tuple[int, int],
    image_size: int,
) -> Tensor:
    """Return the grid point nearest to the cell that is most similar to each object: (P, 2).

    The query of an object is half the mean and half the maximum of the normalised embedding inside
    its mask. The cell of the highest cosine similarity wins, and the grid point nearest to its
    centre is the prompt (SAOM, arXiv 2403.10780). Cells, points and masks share one frame. An
    object that has `vanished` is represented by the cell that it fills most.

    Args:
        embeddings: (B, C, h, w).
        rows: int64 (P,), the image of each object.
        targets: float32 (P, hm, wm), fractions of low-res pixels.
        valid: float32 (P, hm, wm), low-res pixels of the image; the grid covers their box.
        grid: columns and rows.
        image_size: side of the frame.
    """
    height, width = embeddings.shape[-2:]
    cells = F.normalize(embeddings, dim=1).flatten(2)[rows]
    filled = cell_fractions(targets, (height, width))[:, None]
    most = filled.amax(dim=2, keepdim=True)
    inside = filled >= most.clamp(max=0.5)
    mean = (cells * inside).sum(dim=2) / inside.sum(dim=2)
    highest = cells.masked_fill(~inside, -torch.inf).amax(dim=2)
    query = F.normalize(0.5 * mean + 0.5 * highest, dim=1)
    shown = F.adaptive_max_pool2d(valid[:, None], (height, width)).flatten(1) > 0
    alike = torch.einsum("pc,pcn->pn", query, cells).masked_fill(~shown, -torch.inf)
    best = alike.argmax(dim=1)
    side = image_size / width
    centres = torch.stack([best % width, best // width], dim=1).float()
    return snapped((centres + 0.5) * side - 0.5, extents(valid, image_size), grid)


def inner_grid_points(
    rngs: Sequence[np.random.Generator],
    regions: Tensor,
    boxes: Tensor,
    grid: tuple[int, int],
    image_size: int,
) -> tuple[Tensor, Tensor]:
    """Draw a grid point inside each region, if there is one.

    Points are drawn inside the region and moved to the grid. The first grid point inside the region
    is taken; if there is none, mostly because the region is thinner than the grid, the one with the
    largest fraction of the region.

    Args:
        rngs: a generator for each region.
        regions: float32 (P, hm, wm), fractions of low-res pixels.
        boxes: as of `extents`; the grids cover them.
        grid: columns and rows.
        image_size: side of the frame.

    Returns:
        The points, float32 (P, 2), and the fraction of the region there, float32 (P,): at least one
        half inside it.
    """
    drawn = [
        points_inside(rng, region, _DRAWS, image_size)
        for rng, region in zip(rngs, regions.cpu().numpy(), strict=True)
    ]
    points = to_device(np.array(drawn, np.float32), regions.device)
    points = snapped(points, boxes[:, None], grid)
    places = (points + 0.5) / (image_size / 2) - 1
    fractions = F.grid_sample(
        regions[:, None], places[:, None], padding_mode="border", align_corners=False
    )[:, 0, 0]
    best = fractions.clamp(max=0.5).argmax(dim=1)
    rows = torch.arange(len(points), device=points.device)
    return points[rows, best], fractions[rows, best]


def extents(valid: Tensor, image_size: int) -> Tensor:
    """Bounding boxes of valid pixels: float32 (P, 2, 2), first and last (x, y) in pixels.

    Args:
        valid: float32 (P, hm, wm).
        image_size: side of the frame.
    """
    side = image_size / valid.shape[-1]
    boxes = []
    for axis in (1, 2):  # over rows: where columns begin and end
        line = (valid.amax(dim=axis) > 0).int()
        first = line.argmax(dim=1)
        last = line.shape[1] - line.flip(1).argmax(dim=1)
        boxes.append(torch.stack([first, last], dim=1).float() * side - 0.5)
    return torch.stack(boxes, dim=2)


def snapped(points: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Move points to the nearest points of grids that cover boxes: float32 (..., 2).

    Args:
        points: float32 (..., 2).
        boxes: float32 (..., 2, 2), as of `extents`.
        grid: columns and rows; its points are the centres of its cells.
    """
    counts = torch.tensor(grid, dtype=torch.float32, device=points.device)
    first, last = boxes.unbind(dim=-2)
    spacing = (last - first) / counts
    number = ((points - first) / spacing).floor()
    number = torch.minimum(number.clamp(min=0), counts - 1)
    return first + (number + 0.5) * spacing
