"""SAOM and PanoSAM: whole objects from single grid points."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptation.losses import MaskLoss, whole_object_loss
from adaptation.objects import BatchTargets
from adaptation.strategies.nearest import extents, inner_grid_points, nearest_points, vanished
from adaptation.strategy import STRATEGIES, Batch, Strategy, StrategyContext, seeded
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.class_head import ClassHead
from sam_gym.backbones.adapters.model import Model, embed
from sam_gym.backbones.adapters.tuning import bytes_of, tuned_weights
from sam_gym.backbones.decode import MaskTokens
from sam_gym.backbones.prompts import Prompts
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Fraction, NotNegative
from sam_gym.utils.transfer import to_device


@STRATEGIES.register("saom_v1")
class Saom(Strategy):
    """SAOM (arXiv 2403.10780): fine-tune everything mode to segment whole objects.

    The mask of the highest predicted IoU is trained by focal and Dice loss, its token by a class
    loss, and the predicted IoU of all masks is trained, since it selects among them. In the paper,
    the prompt of an object is the grid point of its nearest neighbour in the embedding: `inside=0`
    and `background=0`. Everything mode prompts every grid point, so the defaults differ: prompts
    are random grid points inside their object (`inside=1`; the nearest one if the object is thinner
    than the grid). A fraction of them is on no object (`background=0.4`); there, the target of the
    predicted IoU is 0.
    """

    @documented
    @dataclass(frozen=True)
    class Options:
        class_weight: NotNegative = 0.5
        """Weight of the class loss."""
        inside: Fraction = 1.0
        """Fraction of prompts at a random grid point inside their object; 0: all by nearest
        neighbour, as in the paper."""
        background: Fraction = 0.4
        """Fraction of prompts on no object; the target of their predicted IoU is 0. Use 0 if images
        contain objects that are not annotated."""

    #: Columns and rows of the grid.
    _grid: ClassVar[tuple[int, int]] = (32, 32)

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        names = {domain.split("train").categories for domain in context.bank.stream}
        if len(names) > 1:
            raise ValueError(
                f"The domains have categories of their own, and {type(self).__name__} has one head "
                "for all: train on domains with the same categories."
            )
        with seeded(context.seed):
            head = ClassHead(context.bank.backbone.embedding_shape[0], *names)
        self._head = head.to(context.bank.backbone.device)

    @property
    def module(self) -> nn.Module:
        return nn.ModuleDict({"sam": self.sam, "head": self._head})

    def before_task(self, task: int) -> None:
        super().before_task(task)
        bank = self.context.bank
        targets = bank.train(bank.stream[task]).targets
        _, height, width = bank.backbone.embedding_shape
        count = sum(
            int(vanished(torch.from_numpy(targets[k : k + 1024]) / 255.0, (height, width)).sum())
            for k in range(0, len(targets), 1024)
        )
        if count:
            stands = "; each is represented by the cell that it fills most"
            warnings.warn(
                f"{bank.stream[task].name}: {count} of {len(targets)} objects fill half of "
                f"no cell of the embedding{stands * (self.options.inside < 1)}.",
                stacklevel=2,
            )

    @torch.no_grad()
    def batch(self, objects: BatchTargets, seeds: np.ndarray) -> Batch:
        options, size = self.options, self.context.bank.backbone.image_size
        device = objects.targets.device
        draws = np.array([np.random.default_rng([int(seed), 1]).random(2) for seed in seeds])
        anywhere, outside = (
            to_device(draws[:, k] < fraction, device)
            for k, fraction in enumerate((options.inside, options.background))
        )
        boxes = extents(objects.valid, size)

        def drawn(regions: Tensor) -> tuple[Tensor, Tensor]:
            rngs = [np.random.default_rng(seed) for seed in seeds]
            return inner_grid_points(rngs, regions, boxes, self._grid, size)

        points, inside = drawn(torch.where(outside[:, None, None], objects.empty, objects.targets))
        crowded = outside & (inside < 0.5)
        if crowded.any():  # the space between objects may be narrower than the grid
            points = torch.where(crowded[:, None], drawn(objects.targets)[0], points)
            outside &= ~crowded
        by_neighbour = ~(anywhere | outside)
        if by_neighbour.any():
            points = torch.where(by_neighbour[:, None], self._nearest(objects), points)
        labels = torch.ones((len(points), 1), dtype=torch.int64, device=device)
        return Batch(
            objects.raw,
            Prompts(points=points[:, None], labels=labels, rows=objects.rows),
            torch.ones_like(outside),
            objects.targets * ~outside[:, None, None],
            objects.valid,
            objects.categories,
        )

    def _nearest(self, objects: BatchTargets) -> Tensor:
        """The grid points of the objects by nearest neighbour: float32 (P, 2)."""
        return nearest_points(
            embed(self.sam, objects.raw).embedding,
            objects.rows,
            objects.targets,
            objects.valid,
            self._grid,
            self.context.bank.backbone.image_size,
        )

    def masks(self, batch: Batch, tokens: MaskTokens) -> MaskLoss:
        masks = whole_object_loss(tokens, batch.targets, batch.valid)
        assert tokens.tokens is not None
        rows = torch.arange(len(masks.chosen), device=masks.chosen.device)
        logits = self._head(tokens.tokens[rows, masks.chosen])
        there = batch.targets.amax(dim=(1, 2)) > 0
        costs = F.cross_entropy(logits.float(), batch.categories, reduction="none") * there
        cost = costs.sum() / there.sum().clamp(min=1)
        total = masks.total + self.options.class_weight * cost
        return MaskLoss(total, masks.logits, masks.chosen, masks.ious)

    def model(self) -> Model:
        head = copy.deepcopy(self._head).requires_grad_(False)
        return Model(self.sam, self.raw, head).eval()

    def adapter(self) -> Adapter:
        return self._adapter(
            experts=[tuned_weights(self.sam)],
            classes=list(self._head.classes),
            head={name: value.detach().cpu() for name, value in self._head.state_dict().items()},
        )

    def kept_bytes(self) -> int:
        return super().kept_bytes() + bytes_of(self._head.state_dict().values())


@STRATEGIES.register("saom_v2")
class SaomV2(Saom):
    """SAOM with a finer grid."""

    _grid: ClassVar[tuple[int, int]] = (64, 64)


@STRATEGIES.register("panosam")
class PanoSam(Saom):
    """SAOM for panoramas (PanoSAM), with the wide grid."""

    _grid: ClassVar[tuple[int, int]] = (320, 64)
