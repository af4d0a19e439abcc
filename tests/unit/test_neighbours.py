"""Nearest neighbours: exact search equals a sort, approximate search reaches its recall, indexes grow and shrink."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frozen_fast.errors import UserError
from frozen_fast.search import Index, neighbours
from frozen_fast.search.filters import matching_rows
from frozen_fast.search.index_folder import IndexFolder, IndexInfo
from frozen_fast.search.row_table import to_table

WIDTH = 32


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 50 centres: neighbours mean something, as they do among clips."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((50, WIDTH))
    rows = centres[rng.integers(0, 50, count)] + 0.5 * rng.standard_normal((count, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows(count: int, first: int = 0) -> list[dict]:
    return [
        {
            "id": f"r{number}",
            "path": f"/clips/{number}.mp4",
            "kind": "video" if number % 2 else "image",
            "start_seconds": float(number) if number % 3 else None,
            "end_seconds": None,
            "caption": f"row {number}",
            "file_bytes": 1,
            "file_mtime_ns": 1,
            "file_digest": "x",
        }
        for number in range(first, first + count)
    ]


def make_index(folder: Path, rows_ND: np.ndarray, dtype: str = "float32") -> Index:
    info = IndexInfo(
        width=WIDTH,
        dtype=dtype,
        checkpoint="/nowhere",
        fingerprint="f",
        settings={"frames": 4, "stride_seconds": 0.0, "max_windows": 0, "resize": 256},
    )
    made = IndexFolder.create(folder, info)
    made.append(to_table(rows(len(rows_ND))), [rows_ND[:100], rows_ND[100:]])
    return Index(folder)


def sorted_rows(queries_QD: np.ndarray, rows_ND: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries_QD @ rows_ND.T), axis=1, kind="stable")[:, :k]


def test_exact_search_equals_a_sort_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frozen_fast.search.index_folder.BLOCK_ROWS", 64)
    rows_ND, queries = vectors(500), vectors(7, seed=1)
    index = make_index(tmp_path, rows_ND)
    scores, found = index.search(queries, 20)
    np.testing.assert_array_equal(found, sorted_rows(queries, rows_ND, 20))
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows_ND.T, found, 1), atol=1e-6)
    assert index.search(queries, 1000)[1].shape == (7, 500)


def test_equal_scores_keep_the_order_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frozen_fast.search.index_folder.BLOCK_ROWS", 3)
    same = np.repeat(vectors(1), 10, axis=0)
    _, found = make_index(tmp_path, same).search(same[:1], 10)
    assert found[0].tolist() == list(range(10))


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_approximate_search_reaches_its_recall_and_states_it(tmp_path: Path, kind: str) -> None:
    rows_ND, queries = vectors(6000), vectors(100, seed=2)
    index = make_index(tmp_path, rows_ND)
    about = index.build(kind, vectors(200, seed=3))
    assert about["recall_at_10"] >= 0.95 and about["recall_queries"] == 200 and about["rows"] == 6000
    assert about["bytes"] == (tmp_path / about["file"]).stat().st_size
    opened = Index(tmp_path)
    exact = sorted_rows(queries, rows_ND, 10)
    scores, found = opened.search(queries, 10)
    assert neighbours.recall_of(found, exact) >= 0.9
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows_ND.T, found, 1), atol=1e-5)
    odd = opened.search(queries, 10, ["kind=video"])[1]
    assert (odd % 2 == 1).all()
    few = opened.search(queries[:1], 10, ["start_seconds<40", "kind=image"])[1][0]
    assert set(few.tolist()) <= {number for number in range(0, 40, 2) if number % 3}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_adding_and_removing(tmp_path: Path, kind: str) -> None:
    rows_ND, more = vectors(3000), vectors(40, seed=5)
    index = make_index(tmp_path / "i", rows_ND)
    index.build(kind)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"x")
    index.add([{"id": f"new{number}", "path": str(clip)} for number in range(40)], 3 * more)
    assert len(index) == 3040 and index.neighbours_fit(kind)
    found = index.search(more, 1)[1][:, 0]
    assert found.tolist() == list(range(3000, 3040))
    with pytest.raises(UserError, match=r"^id: got 'new0', which is in the index already; allowed: new ids"):
        index.add([{"id": "new0", "path": str(clip)}], more[:1])
    assert index.remove(["new3", "r7"]) == 2
    assert 3003 not in index.search(more, 3038)[1] and 7 not in index.search(rows_ND[7:8], 50)[1]
    with pytest.raises(UserError, match=r"^id: got 'new3'; allowed: an id of the index"):
        index.remove(["new3"])
    reopened = Index(tmp_path / "i")
    assert len(reopened) == 3038
    expected = [reopened.row(int(row))["id"] for row in reopened.search(more[:1], 5)[1][0]]
    reopened.compact()
    assert reopened.info.rows == 3038 and len(list((tmp_path / "i").glob("segment-*.npy"))) == 1
    compacted = [reopened.row(int(row))["id"] for row in reopened.search(more[:1], 5)[1][0]]
    assert compacted == expected or kind == "hnsw"
    with pytest.raises(UserError, match="row: got 3038"):
        reopened.row(3038)


def test_half_precision_takes_half_the_space(tmp_path: Path) -> None:
    rows_ND = vectors(2000)
    whole, half = make_index(tmp_path / "w", rows_ND), make_index(tmp_path / "h", rows_ND, "float16")
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).glob("*.npy")) for name in "wh"}
    assert size["h"] == pytest.approx(size["w"] / 2, abs=128)
    queries = vectors(20, seed=4)
    np.testing.assert_allclose(half.search(queries, 5)[0], whole.search(queries, 5)[0], atol=1e-3)
    with pytest.raises(UserError, match="--dtype: got 'int8'; allowed: float16, float32"):
        make_index(tmp_path / "x", rows_ND, "int8")


def test_an_index_that_lacks_a_file_or_rows_is_refused(tmp_path: Path) -> None:
    make_index(tmp_path, vectors(200))
    (segment,) = tmp_path.glob("segment-*.npy")
    np.save(segment, vectors(199))
    with pytest.raises(UserError, match=r"shape \(199, 32\); allowed: \(200, 32\)"):
        Index(tmp_path)
    segment.unlink()
    with pytest.raises(UserError, match="which lacks segment-00000.npy"):
        Index(tmp_path)


def test_the_kind_follows_from_the_number_of_rows() -> None:
    assert [neighbours.choose_kind(rows) for rows in (10, 50_000, 50_001, 2_000_000, 10_000_000)] == [
        "flat",
        "flat",
        "hnsw",
        "hnsw",
        "ivfpq",
    ]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("id=r4", {4}),
        ("caption~ROW 1", {1, 10, 11}),
        ("start_seconds>=8", {8, 10, 11}),
        ("start_seconds < 3", {1, 2}),
        ("kind!=video", {0, 2, 4, 6, 8, 10}),
    ],
)
def test_conditions(condition: str, expected: set[int]) -> None:
    mask = matching_rows(to_table(rows(12)), [condition])
    assert set(np.flatnonzero(mask).tolist()) == expected


@pytest.mark.parametrize("condition", ["id", "=3", "start_seconds=x", "start_seconds~3", "nothing=1"])
def test_wrong_conditions_are_refused(condition: str) -> None:
    with pytest.raises(UserError, match="^--where: got"):
        matching_rows(to_table(rows(3)), [condition])
