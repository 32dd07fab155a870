"""Draw the objects of a training step and gather their features and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adaptation.features import FeatureBank, Pool
from sam_gym.backbones.features import ImageFeatures
from sam_gym.utils.transfer import to_device


@dataclass(frozen=True)
class ObjectIndices:
    """The objects of a step.

    Attributes:
        domains: int64 (P,), index of the domain of each object.
        objects: int64 (P,), its index in the `AugmentedImages` of that domain.
    """

    domains: np.ndarray
    objects: np.ndarray

    @classmethod
    def draw(
        cls, rng: np.random.Generator, count: int, pools: Sequence[Pool], per_image: int = 1
    ) -> ObjectIndices:
        """Draw objects: a domain, uniformly, then an image, then some of its objects.

        Args:
            rng: the generator.
            count: number of objects.
            pools: what to draw from.
            per_image: consecutive objects from one image. If it has fewer, they are repeated as
                evenly as possible.
        """
        choices = rng.integers(len(pools), size=-(-count // per_image))
        objects: list[int] = []
        for choice in choices:
            _, images, allowed = pools[choice]
            own = images.objects[int(rng.choice(allowed))]
            left = per_image
            while left > 0:
                some = rng.choice(own, min(left, len(own)), replace=False)
                objects.extend(some)
                left -= len(some)
        domains = np.repeat([pools[k][0] for k in choices], per_image)
        return cls(domains[:count], np.array(objects[:count]))

    def part(self, rank: int, world: int) -> ObjectIndices:
        """Return the objects of one of several processes; all get equally many."""
        size = len(self.objects) // world
        own = slice(rank * size, (rank + 1) * size)
        return ObjectIndices(self.domains[own], self.objects[own])

    def __add__(self, other: ObjectIndices) -> ObjectIndices:
        return ObjectIndices(
            np.concatenate([self.domains, other.domains]),
            np.concatenate([self.objects, other.objects]),
        )


@dataclass(frozen=True)
class BatchTargets:
    """Features and targets of P objects.

    Attributes:
        raw: `raw_features` of the B augmented images that occur.
        rows: int64 (P,), the image of each object.
        targets: float32 (P, hm, wm), in [0, 1].
        valid: float32 (P, hm, wm), 1 where a pixel counts.
        empty: bool (P, hm, wm), pixels of the image on no object.
        boxes: float32 (P, 4), in pixels of the frame.
        categories: int64 (P,), the category of each object.
    """

    raw: ImageFeatures
    rows: Tensor
    targets: Tensor
    valid: Tensor
    empty: Tensor
    boxes: Tensor
    categories: Tensor


def gather_targets(bank: FeatureBank, indices: ObjectIndices, kind: str) -> BatchTargets:
    """Gather objects of several domains, with `raw_features` of a kind."""
    raw, parts, first = [], [], 0
    for number in np.unique(indices.domains):
        domain = bank.stream[int(number)]
        images = bank.train(domain)
        where = np.flatnonzero(indices.domains == number)
        objects = indices.objects[where]
        seen, own = np.unique(images.rows[objects], return_inverse=True)
        raw.append(bank.raw(domain, "train", kind, seen))
        in_images = (images.valid[seen][own], images.empty[seen][own])
        of_objects = (images.boxes[objects], images.categories[objects])
        parts.append((where, first + own, images.targets[objects], *in_images, *of_objects))
        first += len(seen)
    where, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    back, device = np.argsort(where), bank.backbone.device
    rows, targets, valid, *others = (to_device(column[back], device) for column in columns)
    return BatchTargets(
        ImageFeatures.cat(raw), rows, targets.float() / 255.0, valid.float(), *others
    )
