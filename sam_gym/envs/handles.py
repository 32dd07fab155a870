"""The space of embedding handles in observations."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from gymnasium.spaces import Box
from gymnasium.spaces.utils import flatdim, flatten_space
from gymnasium.vector.utils import batch_space

from sam_gym.backbones.embeddings.store import MAX_HANDLES


class HandleSpace(Box):
    """The handle of an image in the embedding store: int32 (1,), or a batch of them.

    Handles are names, not quantities. So this space does not flatten, and policies that would feed
    the number to a network, as those of stable-baselines3 do, are refused.
    """

    def __init__(self, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__(0, MAX_HANDLES - 1, shape, np.int32)

    def __reduce__(self) -> tuple[type[Box], tuple[int, int, tuple[int, ...], str]]:
        # Files of policies name only gymnasium's own spaces.
        return Box, (0, MAX_HANDLES - 1, self.shape, "int32")

    def __deepcopy__(self, memo: dict[int, Any]) -> HandleSpace:
        return HandleSpace(self.shape)


@batch_space.register
def _batch(space: HandleSpace, n: int = 1) -> HandleSpace:
    return HandleSpace((n, *space.shape))


@flatdim.register
@flatten_space.register
def _refuse(space: HandleSpace) -> NoReturn:
    raise ValueError(
        "An embedding handle is not an input of a network: it names an embedding in the store, "
        "which the policies of agents.policies gather. Use one of them (python -m "
        "agents.train_ppo), or make the environment with obs='full'."
    )
