"""The report's section on re-ranked retrieval numbers."""

from __future__ import annotations

from frozen_fast.report.document import Section, Table, Text, number
from frozen_fast.report.run_data import RunData

_SHOWN = tuple(f"{side}/{name}" for side in ("t2v", "v2t") for name in ("R@1", "R@5", "R@10", "MdR"))
_MEANING = {
    "dual_softmax": "dual_softmax weighs each similarity by a softmax over the other test queries or videos",
    "qb_norm": "qb_norm (QB-Norm's dynamic inverted softmax) normalises by a querybank of training captions",
}


def reranked_section(run: RunData) -> Section | None:
    """Each re-ranking of the last evaluation of each stage; None without evaluation.rerank."""
    rows, names = [], []
    for entry in run.stage_evaluations():
        for name, metrics in (entry.get("reranked") or {}).items():
            names.append(name)
            cells = [name, f"stage {entry['stage'] + 1}", entry["source"], entry["protocol"]]
            rows.append(cells + [number(metrics.get(metric)) for metric in _SHOWN])
    if not rows:
        return None
    told = "; ".join(_MEANING[name] for name in dict.fromkeys(names))
    text = f"{told}. These numbers use several queries and are not comparable with those of plain retrieval."
    header = ["Re-ranking", "After", "Set", "Protocol", *_SHOWN]
    return Section("Re-ranked retrieval", [Text(text[0].upper() + text[1:]), Table(header, rows, words=4)])
