"""An index on disk: segments of vectors and rows that are only ever added, removed rows, and what index.json says.

    index.json           written last, atomically: what counts; a file that it does not name is left over from a kill
    segment-00000.npy    vectors [n, D], float16 or float32, L2 norm 1; read through a memory map
    segment-00000.arrow  the rows of these vectors (row_table.SCHEMA)
    removed-00001.npy    numbers of rows that no longer count, int64
    neighbours-00002.faiss   HNSW or IVF-PQ over the first rows
    bad_clips.jsonl      clips that could not be embedded
    work/                parts of an embedding that is not finished

Axis letters: N rows, D width.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from frozen_fast.common.files import fsync_folder, open_lock, write_json
from frozen_fast.errors import UserError
from frozen_fast.search.neighbours import BLOCK_ROWS, Neighbours
from frozen_fast.search.row_table import SCHEMA, read_table, write_table

INFO_FILE = "index.json"
BAD_CLIPS_FILE = "bad_clips.jsonl"
WORK_FOLDER = "work"
LOCK_FILE = ".lock"
FORMAT = "frozen_fast.index"
FORMAT_VERSION = 1
DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """Content of index.json.

    Attributes:
        width: D.
        dtype: of the stored vectors.
        checkpoint: path of the model.
        fingerprint: SHA-256 of its weights file.
        model_kind: of a released file, as frozen_fast.load_model takes it; None: the checkpoint says it.
        tokenizer: name or folder that replaces the checkpoint's own; None: its own.
        settings: EmbedSettings as plain values.
        source_kind: "image" where the clips were embedded as pictures of one frame, otherwise "video".
        segments: (name, rows) in order.
        removed: file of removed rows; None: nothing is removed.
        neighbours: kind, and beyond exact search: file, rows, effort, recall_at_10, recall_queries, bytes, seconds.
        bad_clips: clips that could not be embedded.
        generation: counts changes; names new files.
    """

    width: int
    dtype: str
    checkpoint: str
    fingerprint: str
    settings: dict[str, Any]
    model_kind: str | None = None
    tokenizer: str | None = None
    source_kind: str = "video"
    segments: tuple[tuple[str, int], ...] = ()
    removed: str | None = None
    neighbours: dict[str, Any] = field(default_factory=lambda: {"kind": "flat"})
    bad_clips: int = 0
    generation: int = 0

    @property
    def rows(self) -> int:
        """Rows of all segments, removed ones included."""
        return sum(rows for _, rows in self.segments)


class IndexFolder:
    """The files of an index; one process writes at a time (see lock).

    Attributes:
        path: the folder.
        info: what index.json says.
        table: the rows, memory-mapped.
        alive_N: which rows count.
        alive: how many do.
        neighbours: what finds neighbours approximately; None: exact search.
    """

    def __init__(self, path: Path, info: IndexInfo) -> None:
        """Hold an open index; use open() or create()."""
        self.path = path
        self.info = info
        self._load()

    @classmethod
    def create(cls, path: Path, info: IndexInfo) -> IndexFolder:
        """Create an empty index.

        Raises:
            UserError: another dtype than float16 and float32, or the folder holds other things.
        """
        if info.dtype not in DTYPES:
            raise UserError(f"--dtype: got {info.dtype!r}; allowed: {', '.join(DTYPES)}")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, info)
        folder._write(info)
        return folder

    @classmethod
    def open(cls, path: Path) -> IndexFolder:
        """Open an index.

        Raises:
            UserError: there is none, or it is of another format, or a file of it is missing or has another size.
        """
        try:
            values = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT or values.pop("format_version") != FORMAT_VERSION:
                raise UserError(f"--index: got {str(path)!r} of another format; allowed: {FORMAT} {FORMAT_VERSION}")
            values["segments"] = tuple((str(name), int(rows)) for name, rows in values["segments"])
            return cls(path, IndexInfo(**values))
        except FileNotFoundError as error:
            missing = Path(str(error.filename)).name
            raise UserError(
                f"--index: got {str(path)!r}, which lacks {missing}; allowed: a folder that `frozen-fast embed` wrote"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--index: got {str(path)!r}, which cannot be read ({error})") from None

    def _load(self) -> None:
        info = self.info
        self._vectors = [self._open_vectors(name, rows) for name, rows in info.segments]
        self._ends = np.cumsum([0] + [rows for _, rows in info.segments])
        tables = [read_table(self.path / f"{name}.arrow") for name, _ in info.segments]
        self.table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        if self.table.num_rows != info.rows:
            raise UserError(f"--index: got {str(self.path)!r} with {self.table.num_rows} rows; allowed: {info.rows}")
        self.alive_N = np.ones(info.rows, bool)
        if info.removed is not None:
            self.alive_N[np.load(self.path / info.removed)] = False
        self.alive = int(np.count_nonzero(self.alive_N))
        self.neighbours: Neighbours | None = None
        if info.neighbours["kind"] != "flat":
            about = info.neighbours
            self.neighbours = Neighbours.read(self.path / about["file"], about["kind"], about["effort"])

    def _open_vectors(self, name: str, rows: int) -> np.ndarray:
        vectors = np.load(self.path / f"{name}.npy", mmap_mode="r")
        if vectors.shape != (rows, self.info.width):
            raise UserError(f"--index: {name}.npy has shape {vectors.shape}; allowed: {(rows, self.info.width)}")
        return vectors

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the index against other writers.

        Raises:
            UserError: another process is writing.
        """
        with index_lock(self.path):
            yield

    def blocks(self, first_row: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors from a row on, in order, as (first row, [n, D] memory map)."""
        for start, vectors in zip(self._ends[:-1].tolist(), self._vectors, strict=True):
            for offset in range(max(0, first_row - start), len(vectors), BLOCK_ROWS):
                yield start + offset, vectors[offset : offset + BLOCK_ROWS]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, fp32 [n, D]."""
        taken = np.empty((len(rows), self.info.width), np.float32)
        segment = np.searchsorted(self._ends, rows, side="right") - 1
        for number in np.unique(segment):
            here = segment == number
            taken[here] = self._vectors[number][rows[here] - self._ends[number]]
        return taken

    def append(self, table: pa.Table, vectors: Iterable[np.ndarray]) -> None:
        """Add a segment; index.json names it once it is whole.

        Args:
            table: n rows with SCHEMA's columns.
            vectors: blocks that make [n, D], L2 norm 1.
        """
        if not table.num_rows:
            return
        name = f"segment-{self.info.generation:05d}"
        path = self.path / f"{name}.npy"
        stored = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.dtype(self.info.dtype), shape=(table.num_rows, self.info.width)
        )
        done = 0
        for block_ND in vectors:
            stored[done : done + len(block_ND)] = block_ND
            done += len(block_ND)
        assert done == table.num_rows, "a row without a vector"
        stored.flush()
        del stored
        write_table(self.path / f"{name}.arrow", table.cast(SCHEMA))
        self.update(segments=(*self.info.segments, (name, table.num_rows)))

    def remove(self, rows: np.ndarray) -> None:
        """Mark rows as removed; their vectors stay until compact()."""
        if not len(rows):
            return
        gone = np.union1d(np.flatnonzero(~self.alive_N), rows).astype(np.int64)
        name = f"removed-{self.info.generation:05d}.npy"
        np.save(self.path / name, gone)
        self.update(removed=name)

    def compact(self) -> None:
        """Write all rows that count as one segment and drop the rest; neighbours must be built again after it."""
        alive = np.flatnonzero(self.alive_N)
        table = self.table.take(pa.array(alive))
        old = self.info
        parts = (alive[first : first + BLOCK_ROWS] for first in range(0, len(alive), BLOCK_ROWS))
        self.info = replace(old, segments=(), removed=None, neighbours={"kind": "flat"})
        if len(alive):
            self.append(table, (self.take(part) for part in parts))
        else:
            self.update()

    def update(self, **changes: Any) -> None:
        """Update values of index.json, reload it, and delete files that it no longer names."""
        self._write(replace(self.info, **changes, generation=self.info.generation + 1))
        self._load()
        kept = {name for segment, _ in self.info.segments for name in (f"{segment}.npy", f"{segment}.arrow")}
        kept |= {str(self.info.removed), str(self.info.neighbours.get("file"))}
        for pattern in ("segment-*", "removed-*.npy", "neighbours-*.faiss"):
            for file in self.path.glob(pattern):
                if file.name not in kept:
                    file.unlink(missing_ok=True)

    def _write(self, info: IndexInfo) -> None:
        fsync_folder(self.path)
        write_json(self.path / INFO_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(info)})
        self.info = info


@contextlib.contextmanager
def index_lock(path: Path) -> Iterator[None]:
    """Keep other writers of an index folder out; it need not hold an index yet.

    Raises:
        UserError: another process is writing, or the folder cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open_lock(path / LOCK_FILE)
    except OSError as error:
        raise UserError(f"--output: got {str(path)!r}; allowed: a folder that can be written to ({error})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output: got {str(path)!r}, which another process writes to; allowed: wait") from None
        yield
