"""Whole objects from single points of a grid: SAOM and PanoSAM."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptation.features import BatchTargets
from adaptation.losses import MaskLoss, whole_object_loss
from adaptation.strategies.nearest import extents, inner_grid_points, nearest_points, vanished
from adaptation.strategy import STRATEGIES, Batch, Strategy, seeded
from sam_gym.backbones.adapters.adapter import Adapter, ClassHead, Model, embed
from sam_gym.backbones.adapters.tuning import bytes_of, tuned_weights
from sam_gym.backbones.decode import MaskTokens, Prompts
from sam_gym.utils.transfer import to_device


@STRATEGIES.register("saom_v1")
class Saom(Strategy):
    """SAOM (arXiv 2403.10780): fine-tunes SAM's everything mode to answer with whole objects.

    The mask that is trusted most learns the object by focal and Dice loss, its token the class, and
    the predicted IoU of all masks is trained, for it chooses. In the paper, the prompt of an object
    is the grid point that its nearest neighbour in the embedding says; that is `Options.inside=0`
    and `Options.background=0`. Since everything mode asks every point, the defaults differ: prompts
    are any points of the grid inside of their object (`inside=1`; the nearest where it is thinner
    than the grid), and a share of them lie on no object (`background=0.4`), where the predicted IoU
    learns 0.
    """

    #: Columns and rows of the grid.
    _grid: ClassVar[tuple[int, int]] = (32, 32)

    def __init__(self, setting: Any) -> None:
        super().__init__(setting)
        names = {domain.split("train").categories for domain in setting.bank.stream}
        if len(names) > 1:
            raise ValueError(
                f"The domains have categories of their own, and {type(self).__name__} has one head "
                "for all: train on domains with the same categories."
            )
        with seeded(setting.seed):
            head = ClassHead(self.sam.prompt_encoder.embed_dim, *names)
        self._head = head.to(setting.bank.backbone.device)

    @property
    def module(self) -> nn.Module:
        return nn.ModuleDict({"sam": self.sam, "head": self._head})

    def before_task(self, task: int) -> None:
        super().before_task(task)
        bank = self.setting.bank
        views = bank.train(bank.stream[task])
        _, height, width = bank.backbone.embedding_shape
        count = sum(
            int(vanished(own.float() / 255.0, (height, width)).sum())
            for own in torch.from_numpy(views.targets).split(1024)
        )
        if count:
            stands = "; the cell that they fill most stands for them"
            warnings.warn(
                f"{bank.stream[task].name}: {count} of {len(views.targets)} objects fill half of "
                f"no cell of the embedding{stands * (self.setting.options.inside < 1)}.",
                stacklevel=2,
            )

    @torch.no_grad()
    def batch(self, objects: BatchTargets, seeds: np.ndarray) -> Batch:
        options, size = self.setting.options, self.setting.bank.backbone.image_size
        device = objects.targets.device
        draws = np.array([np.random.default_rng([int(seed), 1]).random(2) for seed in seeds])
        anywhere, outside = (
            to_device(draws[:, k] < share, device)
            for k, share in enumerate((options.inside, options.background))
        )
        boxes = extents(objects.valid, size)

        def drawn(regions: Tensor) -> tuple[Tensor, Tensor]:
            rngs = [np.random.default_rng(seed) for seed in seeds]
            return inner_grid_points(rngs, regions, boxes, self._grid, size)

        points, shares = drawn(torch.where(outside[:, None, None], objects.empty, objects.targets))
        crowded = outside & (shares < 0.5)
        if crowded.any():  # what is between the objects may be narrower than the grid
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
        """The points that stand for the objects by nearest neighbour: float32 (P, 2)."""
        embeddings = objects.raw
        if self.raw == "pixels":
            embeddings = embed(self.sam, objects.raw, self.raw)
        return nearest_points(
            embeddings[:, : self.sam.prompt_encoder.embed_dim],
            objects.rows,
            objects.targets,
            objects.valid,
            self._grid,
            self.setting.bank.backbone.image_size,
        )

    def masks(self, batch: Batch, tokens: MaskTokens) -> MaskLoss:
        masks = whole_object_loss(tokens, batch.targets, batch.valid)
        assert tokens.tokens is not None
        rows = torch.arange(len(masks.chosen), device=masks.chosen.device)
        logits = self._head(tokens.tokens[rows, masks.chosen])
        there = batch.targets.amax(dim=(1, 2)) > 0
        costs = F.cross_entropy(logits.float(), batch.categories, reduction="none") * there
        cost = costs.sum() / there.sum().clamp(min=1)
        total = masks.total + self.setting.options.class_weight * cost
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
