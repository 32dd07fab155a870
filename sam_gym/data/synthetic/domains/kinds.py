"""The table of procedural domains; `domains_lab` and `domains_field` fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sam_gym.utils.registry import Registry

#: An image uint8 (size, size, 3), and a mask bool (size, size) of each object in it.
Drawing = tuple[np.ndarray, list[np.ndarray]]
#: Draws an image of a domain: `(rng, size) -> Drawing`.
Draw = Callable[[np.random.Generator, int], Drawing]


@dataclass(frozen=True)
class Kind:
    """A domain.

    Attributes:
        draw: draws an image and its masks.
        thin: whether its objects are thin or branching.
    """

    draw: Draw
    thin: bool = False


#: Domain name -> how it is drawn.
DOMAINS: Registry[Kind] = Registry("domain")


def domain(name: str, thin: bool = False) -> Callable[[Draw], Draw]:
    """Decorator: the function draws the domain `name`; its docstring says what is an object."""

    def add(draw: Draw) -> Draw:
        DOMAINS.add(name, Kind(draw, thin))
        return draw

    return add
