"""The table of procedural domains, which `lab` and `field` fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sam_gym.utils.registry import Registry

#: An image uint8 (size, size, 3), and the mask bool (size, size) of each object.
Drawing = tuple[np.ndarray, list[np.ndarray]]
#: Draws an image of a domain: `(rng, size) -> Drawing`.
Draw = Callable[[np.random.Generator, int], Drawing]


@dataclass(frozen=True)
class Kind:
    """A domain.

    Attributes:
        draw: draws an image and its masks.
        thin: whether objects are thin or branching.
    """

    draw: Draw
    thin: bool = False


#: Domain name -> its drawing function.
DOMAINS: Registry[Kind] = Registry("domain")


def domain(name: str, thin: bool = False) -> Callable[[Draw], Draw]:
    """Register the decorated function, which draws domain `name`; its docstring defines objects."""

    def add(draw: Draw) -> Draw:
        DOMAINS.add(name, Kind(draw, thin))
        return draw

    return add
