"""Spaces of saved policies as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from gymnasium import spaces

from sam_gym.utils.pickles import Call, number_dtype, read_pickle, to_dtype, to_plain

#: Largest number of elements of a box.
_MAX_ELEMENTS = 2**24


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Return a space as plain JSON, for `space_from_json`.

    Raises:
        TypeError: it is none of Dict, Box, Discrete, MultiDiscrete and MultiBinary.
    """
    if isinstance(space, spaces.Dict):
        return {"dict": {key: space_to_json(own) for key, own in space.items()}}
    if isinstance(space, spaces.Discrete):
        return {"discrete": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"multi_discrete": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"multi_binary": space.n if isinstance(space.n, int) else list(space.n)}
    if isinstance(space, spaces.Box):
        return {
            "box": list(space.shape),
            "dtype": space.dtype.name,
            "low": _bound_to_json(space.low),
            "high": _bound_to_json(space.high),
        }
    raise TypeError(
        "Policies are saved with spaces of the types Dict, Box, Discrete, MultiDiscrete and "
        f"MultiBinary, got {space}."
    )


def _bound_to_json(bound: np.ndarray) -> Any:
    """Return a bound as a number if all are equal, else as a list; infinite ones as a text."""
    values = bound.ravel()
    if not values.size or (values == values[0]).all():
        value = values[0].item() if values.size else 0
        return value if math.isfinite(value) else str(value)
    return [value if math.isfinite(value) else str(value) for value in values.tolist()]


def space_from_json(content: Mapping[str, Any]) -> spaces.Space:
    """Build the space of `space_to_json`.

    Raises:
        ValueError: the content is no space, or too large for one.
    """
    if "dict" in content:
        return spaces.Dict({str(k): space_from_json(own) for k, own in content["dict"].items()})
    if "discrete" in content:
        return _discrete(content["discrete"], content["start"])
    if "multi_discrete" in content:
        return spaces.MultiDiscrete(content["multi_discrete"], start=content["start"])
    if "multi_binary" in content:
        size = content["multi_binary"]
        return spaces.MultiBinary(size if isinstance(size, int) else _shape(size))
    return _box(
        content["box"], number_dtype(content["dtype"]), *(content[end] for end in ("low", "high"))
    )


def _discrete(count: Any, start: Any) -> spaces.Discrete:
    if not 0 < int(count) < 2**31:
        raise ValueError(f"a space of {count} choices")
    return spaces.Discrete(int(count), start=int(start))


def _shape(shape: Any) -> tuple[int, ...]:
    shape = tuple(map(int, shape))
    if min(shape, default=0) < 0 or math.prod(shape) > _MAX_ELEMENTS:
        raise ValueError(f"a space of the shape {shape}")
    return shape


def _box(shape: Any, dtype: np.dtype, low: Any, high: Any) -> spaces.Box:
    shape = _shape(shape)
    bounds = [np.asarray(bound, dtype).ravel() for bound in (low, high)]
    ends = [np.broadcast_to(b.reshape(shape if b.size > 1 else ()), shape) for b in bounds]
    return spaces.Box(ends[0], ends[1], shape, cast(Any, dtype.type))


def space_from_pickle(content: bytes) -> spaces.Space:
    """Build a space that stable-baselines3 has pickled, without unpickling it.

    Raises:
        ValueError: the pickle holds something else than a space.
    """
    return _space(read_pickle(content))


def _space(call: Any) -> spaces.Space:
    if not isinstance(call, Call):
        raise ValueError(f"expected a space, got {call!r}")
    name, state = call.name, call.state
    if name == "gymnasium.spaces.dict.Dict":
        return spaces.Dict({str(key): _space(own) for key, own in state["spaces"].items()})
    if name == "gymnasium.spaces.discrete.Discrete":
        return _discrete(to_plain(state["n"]), to_plain(state["start"]))
    if name == "gymnasium.spaces.box.Box" and state is None:  # `HandleSpace`
        low, high, shape, dtype = call.args
        return _box(shape, number_dtype(dtype), low, high)
    if name == "gymnasium.spaces.box.Box":
        low, high = (to_plain(state[end]) for end in ("low", "high"))
        return _box(state["_shape"], to_dtype(state["dtype"]), low, high)
    raise ValueError(f"{name} is no space of a policy (Dict, Box, Discrete)")
