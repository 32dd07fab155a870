"""Spaces of saved policies."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from agents.policies.spaces import space_from_json, space_from_pickle, space_to_json
from sam_gym.envs.handles import HandleSpace

SPACES: list[spaces.Space] = [
    spaces.Discrete(3, start=1),
    HandleSpace(),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
    spaces.Box(np.array([0, -np.inf], np.float32), np.array([1, 5], np.float32)),
    spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiBinary(3),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(0, 1, (1,), np.float32)}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_is_read_as_it_was(space: spaces.Space) -> None:
    assert space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False))) == space
    if not isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):  # of no earlier policy
        space.seed(0)  # pickles the random generator
        assert space_from_pickle(pickle.dumps(space)) == space


@pytest.mark.parametrize(
    "content",
    [
        {"box": [10**6, 10**6], "dtype": "float32", "low": 0, "high": 1},
        {"box": [-1], "dtype": "float32", "low": 0, "high": 1},
        {"box": [1], "dtype": "O", "low": 0, "high": 1},
        {"discrete": 0, "start": 0},
        {"discrete": 2**40, "start": 0},
    ],
)
def test_what_is_no_space(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        space_from_json(content)
    with pytest.raises(TypeError, match="types Dict, Box, Discrete"):
        space_to_json(spaces.Text(3))
    with pytest.raises(ValueError, match="no space of a policy"):
        space_from_pickle(pickle.dumps(np.dtype("f4")))
