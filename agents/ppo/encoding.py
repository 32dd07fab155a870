"""The state of a run as values that `torch.load` reads with `weights_only=True`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from sam_gym.utils.pickles import NUMPY_NAMES, Call, number_dtype, to_numpy
from sam_gym.utils.training import read_state

#: Key of a dict that stands for an array or a number of numpy.
_NUMPY = "__numpy__"


def encoded(value: Any) -> Any:
    """Return nested values with plain ones in place of numpy's, for `unpacked`.

    Tensors are copied; arrays are not.

    Raises:
        TypeError: a value is no tensor, array, number, text, list, tuple, dict or None.
    """
    if isinstance(value, np.ndarray):
        return {_NUMPY: torch.from_numpy(np.asarray(value, order="C"))}
    if isinstance(value, np.generic):
        return {_NUMPY: value.item(), "dtype": number_dtype(value.dtype.name).name}
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(encoded(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"A checkpoint cannot hold {type(value).__name__}: {value!r}.")


def unpacked(content: bytes) -> dict[str, Any]:
    """Read a file of `torch.save` of an `encoded` state, or of one of an earlier version.

    Raises:
        Exception: of many kinds, where the file is damaged or holds anything else.
    """
    with safe_globals(_FORMER):
        return _decoded(read_state(io.BytesIO(content)), {})


class _FormerDeque(list):
    def __init__(self, items: Any = (), maxlen: Any = None) -> None:
        super().__init__(items)


def _call(name: str, *args: Any) -> Call:
    return Call(name, args)


#: What files of earlier versions name: read as data, as of `sam_gym.utils.pickles`.
_FORMER: list[Any] = [
    Call,
    (_FormerDeque, "collections.deque"),
    *((partial(_call, name), name) for name in NUMPY_NAMES),
]


def _decoded(value: Any, done: dict[int, Any]) -> Any:
    """Return nested values with numpy's; each object is converted once (see `to_plain`)."""
    if isinstance(value, Call):
        return to_numpy(value)
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        if isinstance(value, dict) and _NUMPY in value:
            own = value[_NUMPY]
            is_array = isinstance(own, torch.Tensor)
            new: Any = own.numpy() if is_array else number_dtype(value["dtype"]).type(own)
        elif isinstance(value, dict):
            new = {key: _decoded(item, done) for key, item in value.items()}
        else:
            kind = tuple if isinstance(value, tuple) else list
            new = kind(_decoded(item, done) for item in value)
        done[id(value)] = new
    return done[id(value)]
