"""`domain`: procedural images of domains that are unlike each other, for continual learning.

Every domain has a look, a kind of object and a convention of annotation of its own. The bundled
`micro` was trained on `scenes` and on none of these.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from sam_gym.data.base import Sample
from sam_gym.data.synthetic.base import Procedural
from sam_gym.data.synthetic.domains import field, lab  # noqa: F401 (they fill the table)
from sam_gym.data.synthetic.domains.kinds import DOMAINS

#: Objects below this share of the image's area are drawn but not annotated: compact, and thin.
LEAST_AREA, LEAST_AREA_THIN = 0.003, 0.002


class ProceduralDomain(Procedural):
    """Procedural images of one domain, with one mask for each object.

    Sample `i` of a kind, split and seed is always the same image. There is one category, "object",
    in every domain: what is observed does not tell the domain. Masks may overlap in domains whose
    convention is that the whole of a hidden object counts.

    Args:
        kind: one of `DOMAINS`; required.
        split: "train", "val" or "test"; disjoint by seed.
        length: how many different images there are (None: 2^31 - 1, in effect endless).
        size: height and width of the images, in pixels.
        seed: of all images.

    Raises:
        ValueError: unknown kind or split, or a length, size or seed out of range.
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
                "Environments take dataset_kwargs={'kind': 'cells'}."
            )
        self._kind = DOMAINS.get(kind)
        super().__init__(split, length, size, seed=seed)
        self.name = kind

    def __getitem__(self, index: int) -> Sample:
        words = self.words(index)
        least = (LEAST_AREA_THIN if self._kind.thin else LEAST_AREA) * self.size**2
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
