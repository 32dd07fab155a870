"""Read pickles as data: nothing that they name is imported or called.

Unpickling can run any code; even constructors of numpy alone can be made to read foreign memory.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


class Name(str):
    """The name of a global object, "module.name"."""


@dataclass
class Call:
    """A call that a pickle asks for.

    Attributes:
        name: of the function or class.
        args: its positional arguments.
        state: what its result gets by `__setstate__` or as attributes; None: nothing.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(content: bytes) -> Any:
    """Read a pickle of protocol 3 to 5.

    Returns:
        Plain values; a `Name` for each global object, and a `Call` for each object that is made.

    Raises:
        ValueError: the pickle is damaged, or holds what numbers, lists, dicts and calls are not.
    """
    try:
        return _read(content)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error


def _read(content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        code = opcode.name
        if code in _VALUES:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code]())
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code == "MARK":
            marks.append(len(stack))
        elif code == "TUPLE":
            stack.append(tuple(since_mark()))
        elif code in _TUPLES:
            marks.append(len(stack) - _TUPLES[code])
            stack.append(tuple(since_mark()))
        elif code in ("APPEND", "APPENDS"):
            items = since_mark() if code == "APPENDS" else [stack.pop()]
            _of(list, stack[-1]).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = since_mark() if code == "SETITEMS" else [stack.pop() for _ in "kv"][::-1]
            _of(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        elif code == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".")))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(Name(f"{module}.{name}"))
        elif code in ("REDUCE", "NEWOBJ"):
            args, name = _of(tuple, stack.pop()), _of(Name, stack.pop())
            empty = name == "collections.OrderedDict" and not args
            stack.append({} if empty else Call(name, args))
        elif code == "BUILD":
            state = stack.pop()
            _of(Call, stack[-1]).state = state
        elif code == "STOP":
            return stack.pop()
        elif code not in ("PROTO", "FRAME"):
            raise ValueError(f"a pickle with the opcode {code} is not read")
    raise ValueError("the pickle has no end")


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"damaged pickle: expected {kind.__name__}, got {type(value).__name__}")
    return value


#: Names of numpy's functions that make arrays and numbers; numpy 1 says "core" for "_core".
NUMPY_NAMES = tuple(
    f"{module}.{name}"
    for module, name in (
        *(("numpy", "dtype"), ("numpy", "ndarray")),
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("_core", "core")),
        *((f"numpy.{core}.multiarray", "scalar") for core in ("_core", "core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("_core", "core")),
    )
)


def to_numpy(call: Call) -> Any:
    """Return the array or number of numpy that a call stands for.

    Raises:
        ValueError: the call makes something else, or its parts contradict each other.
    """
    function = call.name.rpartition(".")[2] if call.name in NUMPY_NAMES else ""
    try:
        if function == "scalar":
            dtype, raw = call.args
            return _array(raw, dtype, (), "C")[()]
        if function == "_frombuffer":
            return _array(*call.args)
        if function == "_reconstruct":
            _, shape, dtype, in_fortran_order, raw = call.state
            return _array(raw, dtype, shape, "F" if in_fortran_order else "C")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"damaged array ({error})") from error
    raise ValueError(f"{call.name} makes no numbers, lists or arrays of numbers")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(raw, bytes | bytearray):
        raise ValueError(f"bytes expected, got {type(raw).__name__}")
    return np.frombuffer(raw, to_dtype(dtype)).reshape(tuple(shape), order=order).copy(order="K")


def to_dtype(value: Any) -> np.dtype:
    """Return the dtype of a pickle: of numbers or bool.

    Raises:
        ValueError: it is another one.
    """
    if isinstance(value, Name):  # a class of numpy, such as numpy.float32
        return number_dtype(value.removeprefix("numpy."))
    call = _of(Call, value)
    if call.name != "numpy.dtype":
        raise ValueError(f"{call.name} is no dtype")
    dtype = number_dtype(call.args[0])
    return dtype.newbyteorder(call.state[1]) if call.state else dtype


def number_dtype(name: Any) -> np.dtype:
    """Return the dtype of a name: of numbers or bool.

    Raises:
        ValueError: it is the name of another one.
    """
    known = [np.dtype(code) for code in "?bhilqBHILQefd"]
    for dtype in known:
        if name in (dtype.name, dtype.str, dtype.str[1:]):
            return dtype
    raise ValueError(f"{name!r} is no dtype of numbers")


def to_plain(value: Any) -> Any:
    """Return a value of `read_pickle` with numbers and arrays of numpy in place of its calls.

    Raises:
        ValueError: it names anything else.
    """
    done: dict[int, Any] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Name):
            raise ValueError(f"{value} makes no numbers, lists or arrays of numbers")
        if not isinstance(value, Call | dict | list | tuple):
            return value
        # An object that occurs often is converted once: a small file cannot grow without bound.
        if id(value) not in done:
            if isinstance(value, Call):
                done[id(value)] = to_numpy(value)
            elif isinstance(value, dict):
                done[id(value)] = {key: plain(item) for key, item in value.items()}
            else:
                kind = tuple if isinstance(value, tuple) else list
                done[id(value)] = kind(plain(item) for item in value)
        return done[id(value)]

    return plain(value)
