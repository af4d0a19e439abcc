"""An index of clips, searched by text, by clip or by vector.

Axis letters: Q queries, N rows, D width, K results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.search.checkpoint_settings import EmbedSettings, fingerprint, load_for_search
from frozen_fast.search.embed import one_vector, text_vectors
from frozen_fast.search.filters import matching_rows
from frozen_fast.search.index_folder import IndexFolder, IndexInfo
from frozen_fast.search.neighbours import (
    KINDS,
    RECALL_QUERIES,
    Result,
    build,
    choose_kind,
    flat_search,
    merge,
)
from frozen_fast.search.row_table import SCHEMA, Row, file_of, mark_file, to_table

EXACT_BELOW_SHARE = 0.05
"""Where conditions leave a smaller share of the rows, exact search over these is faster and misses nothing."""

MOST_NEW_SHARE = 0.1
"""New rows are searched exactly beside the others; above this share of all rows, neighbours are built again."""


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        rank: from 1.
        score: cosine similarity.
        id: the clip's.
        path: its file (of a packed clip: SHARD#NUMBER).
        start_seconds: where it begins in the file; None: at the beginning.
        end_seconds: where it ends; None: at the end.
        row: its number in the index.
        caption: its first caption, if it has one.
        kind: "video" or "image".
    """

    rank: int
    score: float
    id: str
    path: str
    start_seconds: float | None
    end_seconds: float | None
    row: int
    caption: str | None
    kind: str

    def to_json(self) -> dict[str, Any]:
        """The result as `frozen-fast search --json` prints it."""
        return {key: getattr(self, key) for key in ("rank", "score", "id", "path", "start_seconds", "end_seconds")}


class Index:
    """An index of clips: vectors and rows.

    Attributes:
        folder: its files.
    """

    def __init__(self, path: str | Path, *, checkpoint: str | Path | None = None, device: str = "cpu") -> None:
        """Open an index; the model is loaded when a text or a clip is first searched for.

        Args:
            path: the index's folder.
            checkpoint: where the model is now; None: where it was when the index was made.
            device: where the model runs.

        Raises:
            UserError: no index there, or damaged.
        """
        self.folder = IndexFolder.open(Path(path))
        self._checkpoint = Path(checkpoint or self.info.checkpoint)
        self._device = device

    @property
    def info(self) -> IndexInfo:
        """What index.json says."""
        return self.folder.info

    @property
    def settings(self) -> EmbedSettings:
        """How the clips were embedded."""
        return EmbedSettings(**self.info.settings)

    @property
    def rows(self) -> pa.Table:
        """All rows in order, memory-mapped; removed ones included (folder.alive_N says which count)."""
        return self.folder.table

    def __len__(self) -> int:
        """How many clips can be found."""
        return self.folder.alive

    @cached_property
    def model(self) -> RetrievalModel:
        """The model that made the vectors, in eval mode.

        Raises:
            UserError: its checkpoint is gone or holds other weights.
        """
        if not self._checkpoint.exists():
            raise UserError(
                f"--checkpoint: got {str(self._checkpoint)!r}, the path of the index's model, which does not "
                "exist; allowed: --checkpoint with its new path"
            )
        found = fingerprint(self._checkpoint)
        if found != self.info.fingerprint:
            raise UserError(
                f"--checkpoint: got {str(self._checkpoint)!r} with fingerprint {found[:12]}; allowed: the model that "
                f"made the index, {self.info.fingerprint[:12]}; `frozen-fast embed --fresh` rebuilds the index"
            )
        return load_for_search(
            self._checkpoint,
            frames=self.settings.frames,
            kind=self.info.model_kind,
            tokenizer=self.info.tokenizer,
            device=self._device,
        )

    def search(self, queries_QD: np.ndarray | torch.Tensor, k: int = 10, where: Sequence[str] = ()) -> Result:
        """The nearest rows of each query vector.

        Args:
            queries_QD: L2 norm 1.
            k: results of a query; fewer where fewer rows are left.
            where: conditions on columns (filters.matching_rows).

        Returns:
            (scores [Q, K] fp32, rows [Q, K] int64), best first.

        Raises:
            UserError: k below 1, another width, or a wrong condition.
        """
        queries = np.ascontiguousarray(np.asarray(queries_QD), np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.info.width:
            raise UserError(f"queries: got shape {list(queries.shape)}; allowed: [Q, {self.info.width}]")
        if k < 1:
            raise UserError(f"-k: got {k}; allowed: a whole number from 1")
        allowed_N, count = self.folder.alive_N, self.folder.alive
        if where:
            allowed_N = allowed_N & matching_rows(self.rows, where)
            count = int(np.count_nonzero(allowed_N))
        k = min(k, count)
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        every = count == len(allowed_N)
        folder = self.folder
        if folder.neighbours is None or count < EXACT_BELOW_SHARE * len(allowed_N):
            return flat_search(queries, k, folder.blocks, None if every else allowed_N)
        best = folder.neighbours.search(queries, k, None if every else allowed_N, folder.take)
        newer = folder.neighbours.index.ntotal
        if newer < len(allowed_N):
            rest = flat_search(queries, k, lambda: folder.blocks(newer), None if every else allowed_N)
            best = merge(best, rest, k)
        return best

    def search_text(self, text: str, k: int = 10, where: Sequence[str] = ()) -> list[Hit]:
        """The clips that match a text best.

        Raises:
            UserError: an empty text, or as search and model.
        """
        if not text.strip():
            raise UserError("text: got an empty text; allowed: a description of the clips")
        return self._hits(self.search(text_vectors(self.model, [text]), k, where))

    def search_like(self, path: str, k: int = 10, where: Sequence[str] = ()) -> list[Hit]:
        """The clips most similar to a file, embedded with the index's settings.

        Raises:
            UserError: it cannot be read, or as search and model.
        """
        return self._hits(self.search(one_vector(self.model, path, self.settings), k, where))

    def search_similar(self, row: int, k: int = 10, where: Sequence[str] = ()) -> list[Hit]:
        """The clips most similar to a clip of the index, without that clip.

        Raises:
            UserError: no such row, or as search.
        """
        self.check_row(row)
        hits = self._hits(self.search(self.folder.take(np.array([row])), k + 1, where))
        others = [hit for hit in hits if hit.row != row][:k]
        return [Hit(**{**asdict(hit), "rank": rank}) for rank, hit in enumerate(others, start=1)]

    def check_row(self, row: int) -> None:
        """Refuse the number of a row that is not there or was removed."""
        if not 0 <= row < len(self.folder.alive_N) or not self.folder.alive_N[row]:
            raise UserError(f"row: got {row}; allowed: a row of the index")

    def row(self, number: int) -> Row:
        """One row of the table.

        Raises:
            UserError: it is not there or was removed.
        """
        self.check_row(number)
        return self.rows.slice(number, 1).to_pylist()[0]

    def _hits(self, result: Result) -> list[Hit]:
        scores, rows = result[0][0], result[1][0]
        found = rows >= 0
        table = self.rows.take(pa.array(rows[found])).to_pylist()
        return [
            Hit(
                rank,
                float(score),
                row["id"],
                row["path"],
                row["start_seconds"],
                row["end_seconds"],
                int(number),
                row["caption"],
                row["kind"],
            )
            for rank, (score, number, row) in enumerate(zip(scores[found], rows[found], table, strict=True), start=1)
        ]

    def add(self, rows: Sequence[Mapping[str, Any]], vectors_ND: np.ndarray | torch.Tensor) -> None:
        """Add clips whose vectors this index's model made; they are searched exactly until build() is called.

        Args:
            rows: for each clip "id" and "path", and what else is known of row_table.SCHEMA's columns.
            vectors_ND: their vectors; divided by their L2 norm here.

        Raises:
            UserError: an id is there already or twice, a file is missing, or the vectors do not fit.
        """
        vectors = np.asarray(vectors_ND, np.float32)
        if vectors.shape != (len(rows), self.info.width):
            raise UserError(f"vectors: got {list(vectors.shape)}; allowed: [{len(rows)}, {self.info.width}]")
        with self.folder.lock():
            known = set(self.rows["id"].filter(pa.array(self.folder.alive_N)).to_pylist())
            whole = [_whole_row(row) for row in rows]
            for row in whole:
                if row["id"] in known:
                    raise UserError(
                        f"id: got {row['id']!r}, which is in the index already; allowed: new ids (remove it first)"
                    )
                known.add(row["id"])
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            self.folder.append(to_table(whole), [vectors / np.maximum(norms, 1e-12)])

    def remove(self, ids: Sequence[str]) -> int:
        """Remove clips by their ids.

        Returns:
            How many rows were removed.

        Raises:
            UserError: an id that the index does not hold.
        """
        with self.folder.lock():
            alive = np.flatnonzero(self.folder.alive_N)
            row_of = dict(zip(self.rows["id"].take(pa.array(alive)).to_pylist(), alive.tolist(), strict=True))
            for name in ids:
                if name not in row_of:
                    raise UserError(f"id: got {name!r}; allowed: an id of the index")
            rows = np.array(sorted({row_of[name] for name in ids}), np.int64)
            self.folder.remove(rows)
            return len(rows)

    def compact(self) -> None:
        """Drop removed rows from disk and write one segment; build() is due after it where the kind is not flat."""
        with self.folder.lock():
            self.folder.compact()

    def neighbours_fit(self, kind: str = "auto") -> bool:
        """Whether build(kind) would change little: the kind is the same, and few rows came after it was built."""
        about, rows = self.info.neighbours, self.info.rows
        chosen = choose_kind(rows) if kind == "auto" else kind
        return about["kind"] == chosen and (chosen == "flat" or rows - about["rows"] <= MOST_NEW_SHARE * rows)

    def build(self, kind: str = "auto", queries_QD: np.ndarray | None = None) -> dict[str, Any]:
        """Build the neighbour search, and measure its recall against exact search.

        Args:
            kind: "flat", "hnsw", "ivfpq", or "auto": by the number of rows (neighbours.choose_kind).
            queries_QD: queries that recall is measured with, such as captions' vectors; None: midpoints of random
                pairs of rows, which are no rows themselves.

        Returns:
            What index.json says of it.
        """
        if kind not in ("auto", *KINDS):
            raise unknown_name("--kind", kind, ("auto", *KINDS))
        folder = self.folder
        chosen = choose_kind(folder.info.rows) if kind == "auto" else kind
        with folder.lock():
            if chosen == "flat" or not folder.info.rows:
                folder.update(neighbours={"kind": "flat"})
                return self.info.neighbours
            began = time.perf_counter()
            queries = self._recall_queries() if queries_QD is None else np.ascontiguousarray(queries_QD, np.float32)
            found, measured = build(
                chosen,  # type: ignore[arg-type]
                folder.info.rows,
                folder.info.width,
                folder.blocks,
                folder.take,
                queries,
            )
            name = f"neighbours-{folder.info.generation:05d}.faiss"
            found.write(folder.path / name)
            about = {
                "kind": chosen,
                "file": name,
                "rows": folder.info.rows,
                **measured,
                "bytes": (folder.path / name).stat().st_size,
                "seconds": time.perf_counter() - began,
            }
            folder.update(neighbours=about)
        return about

    def _recall_queries(self) -> np.ndarray:
        pairs = np.random.default_rng(0).integers(0, self.info.rows, (RECALL_QUERIES, 2))
        middle = self.folder.take(pairs[:, 0]) + self.folder.take(pairs[:, 1])
        return middle / np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-12)

    def facts(self) -> dict[str, Any]:
        """What the index holds and how it was made, as plain values."""
        info = self.info
        return {
            "clips": len(self),
            "removed": info.rows - len(self),
            "bad_clips": info.bad_clips,
            "width": info.width,
            "dtype": info.dtype,
            "model": {"checkpoint": info.checkpoint, "fingerprint": info.fingerprint},
            "settings": info.settings,
            "neighbours": info.neighbours,
        }

    def changed_files(self, rows: Sequence[int] | None = None) -> dict[str, str]:
        """Files that are no longer what was embedded.

        Args:
            rows: look at the files of these rows only; None: at all.

        Returns:
            Path -> "missing" or "changed".
        """
        numbers = np.flatnonzero(self.folder.alive_N) if rows is None else np.asarray(rows, np.int64)
        seen: dict[str, tuple[int, int]] = {}
        for row in self.rows.take(pa.array(numbers)).to_pylist():
            seen.setdefault(file_of(row["path"]), (row["file_bytes"], row["file_mtime_ns"]))
        states: dict[str, str] = {}
        for path, then in seen.items():
            try:
                status = Path(path).stat()
            except OSError:
                states[path] = "missing"
            else:
                if (status.st_size, status.st_mtime_ns) != then:
                    states[path] = "changed"
        return states


def _whole_row(row: Mapping[str, Any]) -> Row:
    """A row with every column, from what the caller knows."""
    for key in ("id", "path"):
        if not isinstance(row.get(key), str):
            raise UserError(f"rows: {key}: got {row.get(key)!r}; allowed: a string")
    for key in row:
        if key not in SCHEMA.names:
            raise unknown_name("rows", key, SCHEMA.names)
    try:
        mark = mark_file(file_of(row["path"]))
    except OSError as error:
        raise UserError(f"rows: path: got {row['path']!r}, which cannot be read ({error.strerror})") from None
    defaults = {"kind": "video", "start_seconds": None, "end_seconds": None, "caption": None}
    marks = {"file_bytes": mark.bytes, "file_mtime_ns": mark.mtime_ns, "file_digest": mark.digest}
    return {**defaults, **row, **marks, "path": str(Path(row["path"]).absolute())}
