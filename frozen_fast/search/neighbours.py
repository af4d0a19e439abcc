"""Nearest neighbours by inner product with FAISS: exact, HNSW graphs, and inverted lists of product codes.

Axis letters: Q queries, N rows, D width, K results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from frozen_fast.errors import UserError

Kind = Literal["flat", "hnsw", "ivfpq"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivfpq")

FLAT_UP_TO_ROWS = 50_000
HNSW_UP_TO_ROWS = 2_000_000
"""Beyond it the graph and its fp32 vectors take more memory than a search machine should need."""

TARGET_RECALL = 0.95
RECALL_AT = 10
RECALL_QUERIES = 200
BLOCK_ROWS = 131_072

HNSW_LINKS = 16
HNSW_CONSTRUCTION = 64
HNSW_SEARCH = (32, 64, 128, 256, 512, 1024)

PQ_BITS = 8
PROBES = (8, 16, 32, 64, 128, 256, 512)
TRAINING_ROWS_PER_LIST = 64
REFINED = 16
"""Candidates of product codes per result, compared again by their stored vectors."""

Blocks = Callable[[], Iterator[tuple[int, np.ndarray]]]
"""Gives (first row, vectors [n, D]) of all rows in order, a block at a time."""

Take = Callable[[np.ndarray], np.ndarray]
"""Vectors of some rows, fp32 [n, D]."""

Result = tuple[np.ndarray, np.ndarray]
"""(scores [Q, K] fp32, rows [Q, K] int64); places without a result have row -1 and score -inf."""


@dataclass(frozen=True)
class Neighbours:
    """An approximate index and how it is searched.

    Attributes:
        kind: "hnsw" or "ivfpq".
        index: FAISS's object.
        effort: efSearch of HNSW, nprobe of inverted lists.
    """

    kind: Kind
    index: Any
    effort: int

    def search(self, queries_QD: np.ndarray, k: int, allowed_N: np.ndarray | None, take: Take) -> Result:
        """The K best rows of each query, with exact scores.

        Args:
            queries_QD: fp32.
            k: results of a query.
            allowed_N: which rows may be found; None: all.
            take: reads stored vectors.
        """
        candidates = min(self.index.ntotal, k if self.kind == "hnsw" else k * REFINED)
        _, rows = self.index.search(queries_QD, candidates, params=self._parameters(candidates, allowed_N))
        return rescore(queries_QD, rows, k, take)

    def _parameters(self, candidates: int, allowed_N: np.ndarray | None) -> Any:
        options: dict[str, Any] = {}
        if allowed_N is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed_N[: self.index.ntotal], bitorder="little"))
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.effort, candidates), **options)
        return faiss.SearchParametersIVF(nprobe=self.effort, **options)

    def write(self, path: Path) -> None:
        """Write FAISS's file, whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        faiss.write_index(self.index, str(temporary))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path, kind: Kind, effort: int) -> Neighbours:
        """Open FAISS's file, memory-mapped.

        Raises:
            UserError: it is missing or damaged.
        """
        flag = faiss.IO_FLAG_MMAP_IFC if kind == "hnsw" else faiss.IO_FLAG_MMAP
        try:
            return cls(kind, faiss.read_index(str(path), flag), effort)
        except RuntimeError as error:
            raise UserError(f"index: {path} cannot be read ({str(error).splitlines()[0]}); build it again") from None


def choose_kind(rows: int) -> Kind:
    """The kind for a number of rows: exact search while it is fast, then HNSW, then compressed codes."""
    if rows <= FLAT_UP_TO_ROWS:
        return "flat"
    return "hnsw" if rows <= HNSW_UP_TO_ROWS else "ivfpq"


def flat_search(queries_QD: np.ndarray, k: int, blocks: Blocks, allowed_N: np.ndarray | None = None) -> Result:
    """Exact search over all blocks; equal scores keep the order of rows.

    Args:
        queries_QD: fp32.
        k: results of a query.
        blocks: all rows; one block at a time is in memory as fp32.
        allowed_N: which rows may be found; None: all.
    """
    best_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
    rows_QK = np.full((len(queries_QD), k), -1, np.int64)
    for first, block_ND in blocks():
        if allowed_N is None:
            numbers, vectors_ND = np.arange(first, first + len(block_ND)), block_ND
        else:
            places = np.flatnonzero(allowed_N[first : first + len(block_ND)])
            numbers, vectors_ND = first + places, block_ND[places]
        if not len(numbers):
            continue
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
        scores, found = faiss.knn(queries_QD, vectors_ND, min(k, len(numbers)), faiss.METRIC_INNER_PRODUCT)
        best_QK, rows_QK = merge((best_QK, rows_QK), (scores, numbers[found]), k)
    return best_QK, rows_QK


def merge(one: Result, other: Result, k: int) -> Result:
    """The K best of two results."""
    scores = np.concatenate([one[0], other[0]], axis=1)
    rows = np.concatenate([one[1], other[1]], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def rescore(queries_QD: np.ndarray, rows_QC: np.ndarray, k: int, take: Take) -> Result:
    """The K best of each query's candidates by their stored vectors; -1 stands for none."""
    distinct = np.unique(rows_QC[rows_QC >= 0])
    scores_QC = np.full(rows_QC.shape, -np.inf, np.float32)
    if len(distinct):
        vectors_MD = take(distinct)
        places = np.searchsorted(distinct, rows_QC.clip(min=0)).clip(max=len(distinct) - 1)
        scores_QC = np.einsum("qd,qcd->qc", queries_QD, vectors_MD[places])
        scores_QC = np.where(rows_QC >= 0, scores_QC, -np.inf).astype(np.float32)
    empty = (np.full((len(queries_QD), k), -np.inf, np.float32), np.full((len(queries_QD), k), -1, np.int64))
    return merge(empty, (scores_QC, rows_QC), k)


def build(
    kind: Kind, rows: int, width: int, blocks: Blocks, take: Take, queries_QD: np.ndarray
) -> tuple[Neighbours, dict[str, Any]]:
    """Build an approximate index and choose the least effort that reaches TARGET_RECALL against exact search.

    Args:
        kind: "hnsw" or "ivfpq".
        rows: N.
        width: D.
        blocks: all rows.
        take: vectors of some rows.
        queries_QD: fp32; recall is measured with them.

    Returns:
        (the index, what was measured: effort, recall_at_10 and the number of queries).
    """
    make = {"hnsw": _hnsw, "ivfpq": _ivfpq}[kind]
    index = make(rows, width, blocks, take)
    exact = flat_search(queries_QD, RECALL_AT, blocks)[1]
    found, recall = Neighbours(kind, index, 0), 0.0
    for effort in HNSW_SEARCH if kind == "hnsw" else PROBES:
        found = Neighbours(kind, index, effort)
        recall = recall_of(found.search(queries_QD, RECALL_AT, None, take)[1], exact)
        if recall >= TARGET_RECALL:
            break
    return found, {"effort": found.effort, "recall_at_10": recall, "recall_queries": len(queries_QD)}


def recall_of(found_QK: np.ndarray, exact_QK: np.ndarray) -> float:
    """The share of exact results that were found."""
    hits = [len(np.intersect1d(found[found >= 0], exact)) for found, exact in zip(found_QK, exact_QK, strict=True)]
    return float(sum(hits) / max(1, int((exact_QK >= 0).sum())))


def _hnsw(rows: int, width: int, blocks: Blocks, take: Take) -> Any:
    index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_CONSTRUCTION
    for _, block_ND in blocks():
        index.add(np.ascontiguousarray(block_ND, np.float32))
    return index


def _ivfpq(rows: int, width: int, blocks: Blocks, take: Take) -> Any:
    """Inverted lists, about 2 sqrt(N) of them, with one byte for every four values."""
    lists = max(1, min(int(2 * math.sqrt(rows)), rows // 40))
    codes = next(size for size in range(max(1, width // 4), 0, -1) if width % size == 0)
    sample = np.random.default_rng(0).permutation(rows)[: max(lists * TRAINING_ROWS_PER_LIST, 2**PQ_BITS * 40)]
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFPQ(quantizer, width, lists, codes, PQ_BITS, faiss.METRIC_INNER_PRODUCT)
    index.train(take(np.sort(sample)))
    for _, block_ND in blocks():
        index.add(np.ascontiguousarray(block_ND, np.float32))
    return index
