"""`domain`: procedural images of very different domains, for continual learning.

Domains differ in appearance, objects and annotation convention. The bundled `micro` was trained on
`scenes` and photographs, and on none of them.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from sam_gym.data.base import Sample
from sam_gym.data.synthetic.base import Procedural
from sam_gym.data.synthetic.domains import field, lab  # noqa: F401 (fill the table)
from sam_gym.data.synthetic.domains.kinds import DOMAINS

#: Minimum area of an annotated object, as a fraction of the image: compact, and thin objects.
MIN_AREA, MIN_AREA_THIN = 0.003, 0.002


class ProceduralDomain(Procedural):
    """Procedural images of one domain, with one mask per object.

    The same index of a kind, split and seed always gives the same image. All domains have one
    category, "object", so that observations do not reveal the domain. Masks overlap in domains
    whose convention is to annotate occluded objects in full.

    Args:
        kind: one of `DOMAINS`; required.
        split: "train", "val" or "test"; disjoint by seed.
        length: number of different images (None: 2^31 - 1, practically endless).
        size: height and width of the images, in pixels.
        seed: seed of all images.

    Raises:
        ValueError: the kind or split is unknown, or the length, size or seed is out of range.
    """

    categories: tuple[str, ...] = ("object",)

    def __init__(
        self,
        kind: str | None = None,
        split: str = "train",
        *,
        length: int | None = None,
        size: int = 256,
        seed: int = 0,
    ) -> None:
        if kind is None:
            raise ValueError(
                f"Dataset 'domain' needs a kind: one of {', '.join(DOMAINS)}. "
                "Pass dataset_kwargs={'kind': 'cells'}, or --dataset-kwargs kind cells."
            )
        self._kind = DOMAINS.get(kind)
        super().__init__(split, length, size, seed=seed)
        self.name = kind

    def __getitem__(self, index: int) -> Sample:
        words = self.words(index)
        least = (MIN_AREA_THIN if self._kind.thin else MIN_AREA) * self.size**2
        for attempt in count():
            image, drawn = self._kind.draw(np.random.default_rng([*words, attempt]), self.size)
            masks = [mask for mask in drawn if np.count_nonzero(mask) >= least]
            if masks:
                break
        return Sample(
            image=image,
            masks=np.stack(masks),
            categories=np.zeros(len(masks), np.int64),
            source=self.source(index),
        )
