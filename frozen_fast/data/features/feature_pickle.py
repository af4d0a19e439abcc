"""Reads released pickles of features without executing code from them, and loads arrays on demand.

The files hold {video: array}, {video: [array per caption]} or NaN for a missing video. The reader walks the pickle's
opcodes; an array's bytes are skipped and read later from the file. Names outside a fixed table are errors, so
nothing is imported or called.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from frozen_fast.errors import UserError, reason

LAZY_BYTES = 64
"""Shorter strings of bytes are read at once."""


class LazyBytes(NamedTuple):
    """Bytes in the file. As old protocols write them they are text: Latin-1 characters encoded as UTF-8."""

    path: Path
    offset: int
    length: int
    is_text: bool = False

    def read(self) -> bytes:
        """Read them."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        return data.decode("utf-8").encode("latin-1") if self.is_text else data


class _DataType:
    """numpy.dtype of numbers: its code and byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if str(code).lstrip("<>|=")[:1] not in tuple("fiubO"):
            raise pickle.UnpicklingError(f"an array of type {code!r}; allowed: numbers")
        self.code = str(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1] if state[1] in ("<", ">") else ""
        self.code = order + self.code.lstrip("<>|=")


class ArrayInFile:
    """An array of a feature pickle, read on demand.

    Attributes:
        shape: its shape.
        items: the objects of an object array, otherwise None.
    """

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] = ()
        self.items: list[Any] | None = None
        self._code = "f4"
        self._fortran = False
        self._data: LazyBytes | bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, self._fortran, data = state
        self._hold(kind, shape, data)

    def _hold(self, kind: Any, shape: Any, data: Any) -> None:
        whole = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not whole or not isinstance(kind, _DataType):
            raise pickle.UnpicklingError("an array's shape or type is malformed")
        self.shape, self._code = shape, kind.code
        if "O" in kind.code:
            if not isinstance(data, list):
                raise pickle.UnpicklingError("an array of objects contains no list")
            self.items = data
            return
        data = data.encode("latin-1") if isinstance(data, str) else data
        length = data.length if isinstance(data, LazyBytes) else len(data)
        wanted = int(np.prod(shape)) * np.dtype(kind.code).itemsize
        if length < wanted or (length > wanted and not (isinstance(data, LazyBytes) and data.is_text)):
            raise pickle.UnpicklingError(f"an array of shape {shape} has {length} bytes, not {wanted}")
        self._data = data

    def read(self) -> np.ndarray:
        """Its values, float32.

        Raises:
            UserError: the file is cut short.
        """
        data = self._data.read() if isinstance(self._data, LazyBytes) else self._data
        try:
            flat = np.frombuffer(data, dtype=np.dtype(self._code), count=int(np.prod(self.shape)))
        except ValueError as error:
            path = self._data.path if isinstance(self._data, LazyBytes) else "features"
            raise UserError(f"{path}: is damaged ({reason(error)})") from error
        return flat.reshape(self.shape, order="F" if self._fortran else "C").astype(np.float32)


def _reconstruct(*_: Any) -> ArrayInFile:
    """Replacement for numpy's array constructor; __setstate__ follows."""
    return ArrayInFile()


def _from_buffer(data: Any, kind: Any, shape: Any, order: str) -> ArrayInFile:
    """Replacement for numpy's constructor of protocol 5."""
    array = ArrayInFile()
    array._hold(kind, shape, data)
    array._fortran = order == "F"
    return array


def _scalar(kind: Any, data: Any) -> Any:
    """Replacement for numpy's scalar constructor."""
    if not isinstance(kind, _DataType) or "O" in kind.code:
        raise pickle.UnpicklingError("a numpy value of an unknown type")
    data = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype=np.dtype(kind.code))[0].item()


def _encode(text: Any, encoding: str = "latin1") -> Any:
    """Replacement for _codecs.encode, which protocol 2 uses for bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text._replace(is_text=True) if isinstance(text, LazyBytes) else text.encode("latin-1")


def _no_bytes() -> bytes:
    """Replacement for bytes, which protocol 2 calls for an empty string of bytes."""
    return b""


class _Nothing:
    """numpy.ndarray as an argument of its constructor."""


_NUMPY_CORES = ("numpy.core", "numpy._core")
_TABLE: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _DataType,
    ("numpy", "ndarray"): _Nothing,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _NUMPY_CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _NUMPY_CORES},
    **{(f"{core}.numeric", "_frombuffer"): _from_buffer for core in _NUMPY_CORES},
}
_CALLABLE = (_DataType, _reconstruct, _encode, _scalar, _from_buffer, _no_bytes, OrderedDict)


class _Reader:
    """A pickle machine for plain values and numpy arrays. Opcodes are those of pickletools; others are refused."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        while True:
            code = self._file.read(1)
            if not code:
                raise pickle.UnpicklingError("it ends before its value does")
            info = _OPCODES.get(code)
            if info is None or info.name not in _ACTIONS:
                raise pickle.UnpicklingError(f"opcode {info.name if info else code!r} is refused")
            if info.name == "STOP":
                return self._stack.pop()
            argument = self._argument(info)
            _ACTIONS[info.name](self, argument)

    def _argument(self, info: pickletools.OpcodeInfo) -> Any:
        """The opcode's argument; long bytes and texts stay in the file."""
        size = _LENGTHS.get(info.name)
        if size is None:
            return info.arg.reader(self._file) if info.arg is not None else None  # type: ignore[attr-defined]
        length = int.from_bytes(self._file.read(size), "little")
        is_text = info.name in _TEXTS
        if length > LAZY_BYTES and (not is_text or length > LAZY_BYTES * 8):
            start = self._file.tell()
            self._file.seek(length, 1)
            return LazyBytes(self._path, start, length)
        data = self._file.read(length)
        if len(data) != length:
            raise pickle.UnpicklingError("it is cut short")
        if is_text:
            return data.decode("utf-8", "surrogatepass")
        return data.decode("latin-1") if info.name in _OLD_STRINGS else data

    def pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def name(self, argument: Any) -> None:
        module, name = argument.split(" ") if argument is not None else self._top(2)
        if (module, name) not in _TABLE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        self._stack.append(_TABLE[module, name])

    def call(self, _: Any) -> None:
        function, arguments = self._top(2)
        if not any(function is allowed for allowed in _CALLABLE) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that is refused")
        self._stack.append(function(*arguments))

    def build(self, _: Any) -> None:
        state = self._stack.pop()
        if not isinstance(self._stack[-1], (_DataType, ArrayInFile)):
            raise pickle.UnpicklingError("it fills an object that is refused")
        self._stack[-1].__setstate__(state)

    def set_items(self, pairs: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise pickle.UnpicklingError("it fills a dict that is none")
        self._stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def add_items(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise pickle.UnpicklingError("it fills a list that is none")
        self._stack[-1].extend(items)

    def _top(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def tuple_of(self, count: int) -> None:
        self._stack.append(tuple(self._top(count)))

    def pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.pop_mark()


Action = Callable[[_Reader, Any], None]
_OPCODES = {info.code.encode("latin-1"): info for info in pickletools.opcodes}
_LENGTHS = {
    "BINBYTES": 4,
    "SHORT_BINBYTES": 1,
    "BINBYTES8": 8,
    "BYTEARRAY8": 8,
    "BINUNICODE": 4,
    "SHORT_BINUNICODE": 1,
    "BINUNICODE8": 8,
    "BINSTRING": 4,
    "SHORT_BINSTRING": 1,
}
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_OLD_STRINGS = ("BINSTRING", "SHORT_BINSTRING")
_ACTIONS: dict[str, Action] = {
    **{name: lambda r, a: None for name in ("PROTO", "FRAME", "STOP")},
    **{name: _Reader.push for name in (*_LENGTHS, "BININT", "BININT1", "BININT2", "INT", "LONG1", "LONG4", "BINFLOAT")},
    **{name: _Reader.put for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")},
    **{name: _Reader.get for name in ("GET", "BINGET", "LONG_BINGET")},
    "MARK": _Reader.mark,
    "NONE": lambda r, a: r.push(None),
    "NEWTRUE": lambda r, a: r.push(True),
    "NEWFALSE": lambda r, a: r.push(False),
    "EMPTY_DICT": lambda r, a: r.push({}),
    "EMPTY_LIST": lambda r, a: r.push([]),
    "EMPTY_TUPLE": lambda r, a: r.push(()),
    "TUPLE1": lambda r, a: r.tuple_of(1),
    "TUPLE2": lambda r, a: r.tuple_of(2),
    "TUPLE3": lambda r, a: r.tuple_of(3),
    "TUPLE": lambda r, a: r.push(tuple(r.pop_mark())),
    "SETITEM": lambda r, a: r.set_items(r._top(2)),
    "SETITEMS": lambda r, a: r.set_items(r.pop_mark()),
    "APPEND": lambda r, a: r.add_items(r._top(1)),
    "APPENDS": lambda r, a: r.add_items(r.pop_mark()),
    "GLOBAL": _Reader.name,
    "STACK_GLOBAL": lambda r, a: r.name(None),
    "REDUCE": _Reader.call,
    "BUILD": _Reader.build,
    "POP": _Reader.pop,
}


def open_feature_pickle(path: Path) -> dict[str, Any]:
    """The entries of a feature pickle; arrays are ArrayInFile.

    Raises:
        UserError: the file does not exist or is not a pickle of such a dict.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            value = _Reader(file, path).load()
            if file.tell() > size:
                raise pickle.UnpicklingError("it is cut short")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: is not a pickle of features ({reason(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a {type(value).__name__}; allowed: a dict of video to features")
    return {str(key): entry for key, entry in value.items()}


def is_missing(entry: Any) -> bool:
    """Whether an entry marks a missing feature: None or NaN."""
    return entry is None or (isinstance(entry, float) and entry != entry)
