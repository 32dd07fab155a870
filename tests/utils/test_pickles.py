"""Pickles are read as data."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_gym.utils.pickles import Call, Name, read_pickle, to_plain


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_and_plain_values(protocol: int) -> None:
    values: dict[str, Any] = {
        "numbers": [1, -(2**100), 0.5, True, None, np.float32(0.5), np.int64(3)],
        "texts": ("", "ü", b"bytes"),
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "empty": [{}, [], (), OrderedDict()],
    }
    found = to_plain(read_pickle(pickle.dumps(values, protocol)))
    assert {key: found[key] for key in ("numbers", "texts", "empty")} == {
        key: values[key] for key in ("numbers", "texts", "empty")
    }
    for key in ("array", "transposed"):
        assert found[key].dtype == values[key].dtype
        np.testing.assert_array_equal(found[key], values[key])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_calls_are_named_and_never_made(tmp_path: Path) -> None:
    content = pickle.dumps([Trap(tmp_path / "sprung"), Path])
    call, name = read_pickle(content)
    assert isinstance(call, Call) and call.name.endswith(".mkdir")
    assert call.args == (str(tmp_path / "sprung"),)
    assert isinstance(name, Name) and name == "pathlib.Path"
    with pytest.raises(ValueError, match="mkdir makes no numbers, lists or arrays"):
        to_plain([call])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            Call(
                "numpy._core.numeric._frombuffer",
                (b"1234", Call("numpy.dtype", ("O8",)), (1,), "C"),
            ),
            "O8",
        ),
        (Call("numpy._core.numeric._frombuffer", (10**12, Name("numpy.int8"), (1,), "C")), "bytes"),
        (
            Call("numpy._core.numeric._frombuffer", (b"1234", Name("numpy.int8"), (9,), "C")),
            "reshape",
        ),
        (Call("numpy._core.multiarray.scalar", (Call("numpy.dtype", ("O8",)), b"12345678")), "O8"),
        (Call("numpy.ndarray", ((10**9,), "f8")), "numpy.ndarray makes no"),
    ],
)
def test_arrays_that_are_none(call: Call, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        to_plain(call)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x80\x05.", b"\x80\x05K\x01K", b"\x80\x05(e.", b"I1\n."]
)
def test_damaged_pickles(content: bytes) -> None:
    with pytest.raises(ValueError):
        read_pickle(content)


def test_a_small_pickle_stays_small() -> None:
    """A list that holds the one before it twice, 60 times: 2**60 numbers if it were copied."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    found = to_plain(read_pickle(pickle.dumps(value)))
    assert found[0] is found[1]
