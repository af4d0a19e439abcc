"""Reads tensors from a torch pickle without executing code from it.

A released checkpoint pickles its configuration as an object of a class that is not installed here. torch's weights-only
loading therefore refuses it, and plain loading would import and call any name in the file. This reader looks up names
in a fixed table. Other names become inert stubs, and nothing is imported or called. Tensors are read from disk by
`LazyTensor.read` only, so that an optimizer's state in the file costs nothing.

The few real objects that a file can access are tuples and functions without attributes, so that it cannot modify them.
Both of torch's layouts are supported: the zip (torch >= 1.6) and the earlier stream of pickles.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from frozen_fast.errors import UserError, reason

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of torch's layout before 1.6 (torch.serialization.MAGIC_NUMBER)."""

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stub for an object of a class outside the table: it accepts all calls of pickle and does nothing.

    Attributes:
        state: the object's state in the file, read by the same rules; None if there is none.
    """

    state: Any = None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Inert:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Ignore the arguments."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Inert:
        """Return another stub if called by a file."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        """Store the state as data."""
        self.state = state

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Ignore an entry."""

    def append(self, _item: Any) -> None:
        """Ignore an item."""

    def extend(self, _items: Any) -> None:
        """Ignore items."""

    def add(self, _item: Any) -> None:
        """Ignore an item."""


class StorageKind(NamedTuple):
    """Class of a storage in the file, which determines the dtype."""

    dtype: torch.dtype


class StoredBytes(NamedTuple):
    """A storage in the file; the archive finds its bytes by the key."""

    archive: Any
    key: str
    dtype: torch.dtype
    numel: int


class LazyTensor(NamedTuple):
    """A tensor in the file that has not been read."""

    storage: StoredBytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """Read the tensor from the file, with its own memory."""
        values = self.storage.archive.read_storage(self.storage)
        return torch.as_strided(values, self.shape, self.stride, self.offset).clone()


class _Rebuild:
    """The only callable for files; it has no __dict__, so that a file cannot modify it."""

    __slots__ = ()


class _RebuildTensor(_Rebuild):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_ignored: Any) -> LazyTensor:
        numbers = (offset, *_tuple(shape), *_tuple(stride))
        if not isinstance(storage, StoredBytes) or not all(type(number) is int and number >= 0 for number in numbers):
            raise pickle.UnpicklingError("a tensor is not described by a storage and whole numbers")
        if len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor's shape and stride differ in length")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise pickle.UnpicklingError("a tensor reaches past the end of its storage")
        return LazyTensor(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter(_Rebuild):
    __slots__ = ()

    def __call__(self, tensor: Any, *_ignored: Any) -> LazyTensor:
        if not isinstance(tensor, LazyTensor):
            raise pickle.UnpicklingError("a parameter does not contain a tensor")
        return tensor


class _NewOrderedDict(_Rebuild):
    __slots__ = ()

    def __call__(self, *args: Any) -> OrderedDict[Any, Any]:
        return _PlainOrderedDict(*args)


class _PlainOrderedDict(OrderedDict[Any, Any]):
    """A dictionary that drops attributes (such as torch's _metadata)."""

    def __setstate__(self, _state: Any) -> None:
        """Ignore the state."""


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise pickle.UnpicklingError("a tensor's shape or stride is not a tuple")
    return tuple(value)


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _NewOrderedDict(),
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): StorageKind(dtype) for name, dtype in STORAGE_DTYPES.items()},
}
"""All names that a file can access."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves names in ALLOWED only."""

    def __init__(self, file: Any, archive: Any) -> None:
        """Initialise with a file and the archive that provides storages."""
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        self._stand_ins: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name in the table; create a stub class for other names."""
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if (module, name) not in self._stand_ins:
            self._stand_ins[module, name] = type("StandIn", (Inert,), {})
        return self._stand_ins[module, name]

    def persistent_load(self, pid: Any) -> StoredBytes:
        """Convert a storage's description to StoredBytes."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageKind):
            raise pickle.UnpicklingError("the file refers to something that is no storage")
        _, kind, key, _, numel = pid[:5]
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage's key or size is malformed")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("the file contains views of storages, the format of torch before 0.4")
        return StoredBytes(self._archive, key, kind.dtype, numel)


class ZipArchive:
    """torch's layout since 1.6: a zip of data.pkl and one uncompressed record per storage."""

    def __init__(self, path: Path, scripted: bool = False) -> None:
        """Read from a file; `scripted`: one that torch.jit.save wrote, which also holds code and constants."""
        self.path = path
        self.scripted = scripted

    def load(self) -> Any:
        """Unpickle data.pkl; tensors come as LazyTensor."""
        with zipfile.ZipFile(self.path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1 or self.scripted != any(name.endswith("/constants.pkl") for name in names):
                raise pickle.UnpicklingError("it is a zip, but not one that torch.save wrote")
            self.prefix = pickles[0][: -len("data.pkl")]
            byteorder = f"{self.prefix}byteorder"
            if byteorder in names and archive.read(byteorder).strip().decode("ascii", "replace") != sys.byteorder:
                raise pickle.UnpicklingError("it was written on a machine of another byte order")
            return self.unpickle(archive.read(pickles[0]))

    def unpickle(self, data: bytes) -> Any:
        """The content of data.pkl."""
        return RestrictedUnpickler(io.BytesIO(data), self).load()

    def read_storage(self, storage: StoredBytes) -> Tensor:
        """A storage's values."""
        wanted = storage.numel * storage.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive:
            record = archive.getinfo(f"{self.prefix}data/{storage.key}")
            if record.compress_type != zipfile.ZIP_STORED or record.file_size < wanted:
                raise pickle.UnpicklingError(f"storage {storage.key} is compressed or too short")
            return _as_tensor(archive.read(record), storage)


class _LegacyArchive:
    """torch's layout before 1.6: pickles of magic, version, system, content and keys, then the storages in a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.positions: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def load(self) -> Any:
        with self.path.open("rb") as file:
            if self._next(file) != LEGACY_MAGIC:
                raise pickle.UnpicklingError("it does not start as a file that torch.save wrote")
            version, system = self._next(file), self._next(file)
            little = system.get("little_endian") if isinstance(system, dict) else None
            if version != 1001 or little is not (sys.byteorder == "little"):
                raise pickle.UnpicklingError("its version or byte order is not one that this machine reads")
            content, keys = self._next(file), self._next(file)
            self._find_storages(file, keys)
            return content

    def _next(self, file: BinaryIO) -> Any:
        unpickler = _LegacyUnpickler(file, self)
        return unpickler.load()

    def note(self, storage: StoredBytes) -> None:
        """Remember a storage's dtype, which tells how many bytes to skip to the next."""
        self._dtypes[storage.key] = storage.dtype

    def _find_storages(self, file: BinaryIO, keys: Any) -> None:
        if not isinstance(keys, list) or not all(type(key) is str and key in self._dtypes for key in keys):
            raise pickle.UnpicklingError("its list of storages is malformed")
        for key in keys:
            header = file.read(8)
            if len(header) != 8:
                raise pickle.UnpicklingError("it ends before its storages do")
            (numel,) = struct.unpack("=q", header)
            self.positions[key] = file.tell()
            if numel < 0:
                raise pickle.UnpicklingError("a storage has a negative size")
            file.seek(numel * self._dtypes[key].itemsize, io.SEEK_CUR)
        if file.tell() > self.path.stat().st_size:
            raise pickle.UnpicklingError("it ends before its storages do")

    def read_storage(self, storage: StoredBytes) -> Tensor:
        if storage.key not in self.positions:
            raise pickle.UnpicklingError(f"storage {storage.key} is missing")
        with self.path.open("rb") as file:
            file.seek(self.positions[storage.key])
            return _as_tensor(file.read(storage.numel * storage.dtype.itemsize), storage)


class _LegacyUnpickler(RestrictedUnpickler):
    """Tells its archive of each storage."""

    def persistent_load(self, pid: Any) -> StoredBytes:
        """Convert a storage's description to StoredBytes."""
        storage = super().persistent_load(pid)
        self._archive.note(storage)
        return storage


def _as_tensor(data: bytes, storage: StoredBytes) -> Tensor:
    wanted = storage.numel * storage.dtype.itemsize
    if len(data) < wanted:
        raise pickle.UnpicklingError(f"storage {storage.key} is cut short")
    if not wanted:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(data[:wanted]), dtype=storage.dtype)


def load_torch_pickle(path: Path) -> Any:
    """Read a file that torch.save wrote; its tensors come as LazyTensor, unknown objects as Inert.

    Raises:
        UserError: where the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"checkpoint: got {path}; no such file")
    archive = ZipArchive(path) if zipfile.is_zipfile(path) else _LegacyArchive(path)
    try:
        return archive.load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"checkpoint: got {path}, which is not a readable torch checkpoint ({reason(error)})"
        ) from error


def read_tensors(path: Path, tensors: dict[str, LazyTensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """Read the wanted tensors of a file.

    Raises:
        UserError: where one of them is cut short.
    """
    try:
        return {name: tensors[name].read() for name in wanted}
    except Exception as error:  # zip and struct errors of a damaged file
        raise UserError(f"checkpoint: got {path}, which is damaged ({reason(error)})") from error
