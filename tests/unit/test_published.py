"""Printed numbers, and the report's sections that stand them beside a run's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from frozen_fast.errors import UserError
from frozen_fast.evaluation.metric_table import RETRIEVAL
from frozen_fast.evaluation.protocols import PROTOCOLS
from frozen_fast.evaluation.published import published_row, row_names, table_names
from frozen_fast.profiling.paper import table_4
from frozen_fast.report.mean_over_sources import mean_over_sources_section
from frozen_fast.report.published_comparison import published_section
from frozen_fast.report.reranked import reranked_section
from frozen_fast.report.run_data import RunData, read_run
from support.run_folder import make_run_folder


@pytest.fixture
def run(tmp_path: Any) -> RunData:
    return read_run(make_run_folder(tmp_path / "run", frames=(4,)))


def evaluation(**fields: Any) -> dict[str, Any]:
    metrics = {"t2v/R@1": 20.0, "t2v/R@10": 60.0, "t2v/MdR": 6.0, "v2t/R@1": 21.0}
    row = {"step": 8, "stage": 0, "source": "test", "protocol": "plain", "frames": 4, "metrics": metrics}
    return {**row, "windows": 10, "num_queries": 10, "num_videos": 10, **fields}


def with_config(run: RunData, evaluations: list[dict[str, Any]], **config: Any) -> RunData:
    return replace(run, config={**run.config, **config}, evaluations=evaluations)


def test_every_printed_row_is_well_formed() -> None:
    protocols = {*PROTOCOLS, "v2t_max_over_captions"}
    for table in table_names():
        for name in row_names(table):
            row = published_row(table, name)
            assert set(row.numbers) <= set(RETRIEVAL.higher_is_better) and row.protocol in protocols
            for metric, value in row.numbers.items():
                assert value >= 1 if "R@" not in metric else 0 < value <= 100, f"{table}, {name}: {metric}"
            recalls = [row.numbers[f"t2v/R@{k}"] for k in (1, 5, 10) if f"t2v/R@{k}" in row.numbers]
            assert recalls == sorted(recalls), f"{table}, {name}"


def test_table_4_is_the_same_in_both_files() -> None:
    """profiling/paper_table4.yaml has its hours, published.yaml its retrieval numbers."""
    assert len(row_names("Table 4")) == len(table_4().rows)
    for row in table_4().rows:
        numbers = published_row("Table 4", f"{row.pretraining_frames} then {row.finetuning_frames}").numbers
        assert list(numbers.values()) == [row.recall_at_1, row.recall_at_10, row.median_rank]


@pytest.mark.parametrize(
    ("table", "row", "protocol"),
    [
        ("Collaborative Experts", "MSR-VTT full", "several_captions"),
        ("Collaborative Experts", "MSR-VTT 1k-A", "plain"),
        ("Collaborative Experts", "LSMDC", "plain"),
        ("Collaborative Experts", "DiDeMo", "paragraph"),
        ("Collaborative Experts", "ActivityNet", "paragraph"),
        ("TeachText", "DiDeMo, TeachText-CE+", "paragraph"),
        ("TeachText", "ActivityNet, CE+", "paragraph"),
        ("TeachText", "MSVD, CE+", "several_captions"),
    ],
)
def test_a_row_may_have_a_protocol_of_its_own(table: str, row: str, protocol: str) -> None:
    assert published_row(table, row).protocol == protocol


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ("Table 9", "x", "paper.table: got 'Table 9'"),
        ("Table 2", "CC4M", r"paper.row: got 'CC4M' \(did you mean 'CC3M'"),
    ],
)
def test_unknown_rows_are_told(table: str, row: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        published_row(table, row)


def test_the_report_shows_both(run: RunData) -> None:
    paper = {"table": "Table 2", "row": "CC3M"}
    reranked = {"dual_softmax": {"t2v/R@1": 99.0}}
    section = published_section(with_config(run, [evaluation(reranked=reranked)], paper=paper))
    assert section is not None
    table, notes = section.blocks
    assert table.header[4:] == ["t2v/R@1", "t2v/R@10", "t2v/MdR"]
    assert table.rows[0][0] == "Frozen in Time, Table 2, CC3M" and table.rows[0][3:] == ["4", "24.5", "62.7", "5.0"]
    assert [row[1:] for row in table.rows[1:]] == [["test", "plain", "4", "20.0", "60.0", "6.0"]], "no re-ranked number"
    assert any("base_patch16_224" in note for note in notes.items), "the tower of the test's run is another"
    assert published_section(with_config(run, [evaluation()], paper={"table": "", "row": ""})) is None


def test_differences_from_the_row_are_named(run: RunData) -> None:
    paper = {"table": "Table 7", "row": "finetuned"}
    section = published_section(with_config(run, [evaluation()], paper=paper))
    assert section is not None
    told = " ".join(section.blocks[1].items)
    assert "Protocol of this run: plain; that of the paper's numbers: paragraph." in told
    assert "Frames per window in this run: 4; the paper's model has 8." in told
    empty = published_section(with_config(run, [], paper=paper))
    assert empty is not None and "No evaluation of this run has finished." in empty.blocks[1].items


def test_the_mean_over_sources(run: RunData) -> None:
    folds = [evaluation(source=f"fold{n}", metrics={"t2v/R@1": value}) for n, value in enumerate((10.0, 20.0, 60.0))]
    earlier = evaluation(source="fold0", step=4, metrics={"t2v/R@1": 1.0})
    config = {"average_sources": True}
    section = mean_over_sources_section(with_config(run, [earlier, *folds], evaluation=config))
    assert section is not None
    assert section.blocks[1].rows == [["plain", "t2v/R@1", "3", "30.0", "26.5", "10.0 to 60.0"]]
    assert mean_over_sources_section(with_config(run, folds, evaluation={"average_sources": False})) is None


def test_reranked_numbers_have_a_section_of_their_own(run: RunData) -> None:
    reranked = {"dual_softmax": {"t2v/R@1": 30.0, "v2t/R@1": 31.0}, "qb_norm": {"t2v/R@1": 32.0}}
    section = reranked_section(with_config(run, [evaluation(reranked=reranked)]))
    assert section is not None
    table = section.blocks[1]
    assert [row[0] for row in table.rows] == ["dual_softmax", "qb_norm"]
    assert [row[4] for row in table.rows] == ["30.0", "32.0"] and table.rows[1][8] == "n/a"
    assert reranked_section(with_config(run, [evaluation()])) is None
