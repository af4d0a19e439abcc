"""The tables and figures of the pages from benchmarks/results, so that no figure there is written by hand.

docs/reliability.md holds kill_table.json, docs/performance.md all others.

python benchmarks/results_tables.py            rewrite what is between each page's two markers
python benchmarks/results_tables.py --check    1 where a page differs from the files
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention import table as attention_table
from curriculum import markdown as curriculum_table
from model_step import table as model_step_table
from parameter_counts import as_text as parameter_table
from pretrained_start import table as pretrained_table
from throughput_agreement import table as agreement_table
from throughput_report import markdown, projected_rows, row_table, stage_table
from traffic_model import table as traffic_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/performance.md"
RELIABILITY = ROOT / "docs/reliability.md"
RESULTS = ROOT / "benchmarks/results"
FIGURES = {RESULTS / "curriculum.svg": ROOT / "docs/images/curriculum.svg"}
KILLS = "kill_table.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def attention_text(result: dict[str, Any]) -> str:
    """benchmarks/attention.py's result; its own heading is left out."""
    device = torch.device(result["machine"]["device_type"])
    return attention_table(result["rows"], device, result["peaks"], result["machine"]).split("\n", 2)[2].strip()


def model_step_text(result: dict[str, Any]) -> str:
    """benchmarks/model_step.py's result."""
    device = torch.device(result["machine"]["device_type"])
    return model_step_table(result["rows"], device).strip()


def throughput_text(result: dict[str, Any]) -> str:
    """benchmarks/throughput.py's result: projected rows and measured stages."""
    small = "A tiny model, to exercise the lines: no figure compares with the paper.\n\n" if result["small"] else ""
    rows = row_table(projected_rows(result), comparable=not result["small"])
    return f"{small}{markdown(rows)}\n\n{markdown(stage_table(result['stages']))}"


def input_forms_text(result: dict[str, Any]) -> str:
    """benchmarks/input_forms.py's result."""
    lines = ["| frames | form | clips/s (p20-p80) | clips per CPU second | KB per clip | decoder |", "|" + 6 * "---|"]
    for row in result["rows"]:
        spread = f"{row['clips_per_second_p20']:.1f}-{row['clips_per_second_p80']:.1f}"
        cpu = row["clips_per_cpu_second"]
        lines.append(
            f"| {row['frames']} | {row['form']} | {row['clips_per_second']:.1f} ({spread}) | "
            f"{'n/a' if cpu is None else f'{cpu:.1f}'} | {result['bytes_per_clip'][row['form']] / 1e3:.0f} | "
            f"{', '.join(row['backends'])} |"
        )
    machine = result["machine"]
    note = f"Load average {machine['load_average']:g} on {machine['cores']} cores at the end"
    if machine["load_average"] > machine["cores"] + 1:
        note += ": other processes used the machine, so compare the clips per CPU second only"
    return f"{note}.\n\n" + "\n".join(lines)


def kernel_resources_text(result: dict[str, Any]) -> str:
    """benchmarks/kernel_resources.py's result: compiled, not measured."""
    columns = ("registers", "shared_bytes", "warps_resident", "barriers", "shuffles", "matrix_instructions")
    architectures = sorted(result["architectures"], key=int)
    devices = ", ".join(f"sm_{name}: {result['architectures'][name]['device']}" for name in architectures)
    order = "The figures in a cell are in this order. The last three columns count instructions in the machine code."
    head = "| case | kernel | registers | shared bytes | warps resident of 64 | barriers | shuffles | matrix products |"
    lines = [f"Compiled without a GPU; {devices}. {order}", "", head, "|" + 8 * "---|"]
    by_kernel: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in result["kernels"]:
        key = (row["case"], row["kernel"], json.dumps(row["constants"]))
        by_kernel.setdefault(key, {})[row["capability"]] = row
    for (case, kernel, _), found in by_kernel.items():
        cells = (" / ".join(str(found[int(name)][column]) for name in architectures) for column in columns)
        lines.append(f"| {case} | {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kill_text(result: dict[str, Any]) -> str:
    """benchmarks/kill_table.py's result: one row for each kind of launch, then the damaged checkpoints."""
    names = ("finished", "bit_identical", "clips_exact", "within_interval")
    head = ("launch", "runs", "faults", *(name.replace("_", " ") for name in names), "most steps repeated")
    lines = ["| " + " | ".join(head) + " |", "|" + len(head) * "---|"]
    for launch in dict.fromkeys(row["launch"] for row in result["runs"]):
        rows = [row for row in result["runs"] if row["launch"] == launch]
        repeated = [fault["lost_steps"] or 0 for row in rows for fault in row["faults"]]
        counts = [str(sum(row[name] for row in rows)) for name in names]
        lines.append(
            f"| {launch} | {len(rows)} | {len(repeated)} | {' | '.join(counts)} | {max(repeated, default=0)} |"
        )
    faults = [fault for row in result["runs"] for fault in row["faults"]]
    kinds = _counted(f"{fault['signal']} of {fault['target']}" for fault in faults)
    places = _counted(fault["place"].replace("_", " ") for fault in faults)
    text = f"{sum(row['good'] for row in result['runs'])} of {len(result['runs'])} runs ended as they should. "
    text += f"Faults by kind: {kinds}; by place: {places}.\n\n" + "\n".join(lines)
    if "damage" not in result:
        return text
    damage = result["damage"]
    harms = ", ".join(f"{name} {count}" for name, count in damage["harms"].items())
    text += (
        f"\n\nThe newest checkpoint was damaged {damage['trials']} times ({harms}): {damage['detected']} times it was "
    )
    text += (
        f"detected, {damage['older_used']} times the checkpoint before was used. {damage['full_runs']} of these were "
    )
    text += f"whole runs, of which {damage['full_runs_equal']} ended as the undisturbed run did."
    return text


def _counted(words: Iterable[str]) -> str:
    """Each word with its number."""
    return ", ".join(f"{word} {count}" for word, count in sorted(Counter(words).items()))


def feature_memory_text(result: dict[str, Any]) -> str:
    """benchmarks/feature_store_memory.py's result."""
    own = result["own_mebibytes"]
    return (
        f"A released set of {result['videos']:,} videos, {result['released_mebibytes']:.0f} MiB: converting it takes "
        f"{own['converted'] - own['before']:.0f} MiB of the process's own memory, and reading training batches of the "
        f"store of {result['store_mebibytes']:.0f} MiB {own['read'] - own['converted']:.0f} MiB more."
    )


def expert_step_text(result: dict[str, Any]) -> str:
    """benchmarks/expert_step.py's result."""
    lines = [
        "| form | precision | data | forward, backward | optimizer | step (p20-p80) | epoch, seconds |",
        "|" + 7 * "---|",
    ]
    for name in ("plain", "frozen_fast"):
        own = result[name]
        data, compute, optimizer, step = (own[f"{part}_seconds"] for part in ("data", "compute", "optimizer", "step"))
        lines.append(
            f"| {name} | {result['precision'][name]} | {data['median']:.3f} | {compute['median']:.3f} | "
            f"{optimizer['median']:.3f} | {step['median']:.3f} ({step['p20']:.3f}-{step['p80']:.3f}) | "
            f"{own['epoch_seconds']:.0f} |"
        )
    return f"Batch {result['batch_size']}; the plain step takes {result['ratio']:.2f} x the time.\n\n" + "\n".join(
        lines
    )


def student_text(result: dict[str, Any]) -> str:
    """benchmarks/student.py's result."""
    metrics = list(result["rows"][0]["metrics"])
    lines = [f"| model | frames | seeds | hours | {' | '.join(metrics)} |", "|" + (4 + len(metrics)) * "---|"]
    for row in result["rows"]:
        cells = " | ".join(f"{row['metrics'][name][0]:.1f} ({row['metrics'][name][1]:.1f})" for name in metrics)
        lines.append(f"| {row['kind']} | {row['frames']} | {row['seeds']} | {row['hours'][0]:.4f} | {cells} |")
    machine = result["machine"]
    busy = machine["load_average"] > machine["cores"] + 1
    note = " Other work shared the machine, so the hours cannot be compared." if busy else ""
    return f"Means over seeds, with the sample's standard deviation.{note}\n\n" + "\n".join(lines)


def pretrained_text(result: dict[str, Any]) -> str:
    """benchmarks/pretrained_start.py's result."""
    return pretrained_table(result["runs"]).strip()


def rows_table(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as a table; `columns` gives each heading the format of its cells, over the row's values."""
    lines = ["| " + " | ".join(columns) + " |", "|" + len(columns) * "---|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.format(**row) for cell in columns.values())} |" for row in rows)])


SEARCH_COLUMNS = {
    "kind": "{kind}",
    "vectors": "{vectors:,}",
    "p50, ms": "{p50_ms:.2f}",
    "p99, ms": "{p99_ms:.2f}",
    "recall@10": "{recall_at_10:.3f}",
    "build, s": "{build_seconds:.0f}",
    "own memory, GiB": "{own_gib:.2f}",
    "pages of mapped files, GiB": "{file_gib:.2f}",
}
EMBED_COLUMNS = {
    "way": "{way}",
    "clips/s": "{clips_per_second:.2f}",
    "x released": "{times_released:.2f}",
    "least cosine to released": "{least_cosine_to_released:.5f}",
}
STALL_COLUMNS = {
    "checkpoints": "{name}",
    "step, s": "{step_seconds:.3f}",
    "stall a checkpoint, s": "{stall_seconds:.3f}",
    "of a step, %": "{step_percent:.1f}",
    "of the time at the default interval, %": "{interval_percent:.3f}",
    "peak memory, GiB": "{peak_gib:.2f}",
}


def search_text(result: dict[str, Any]) -> str:
    """benchmarks/search.py's result."""
    rows = result["rows"]
    memory = [{"own_gib": row["anonymous_bytes"] / 2**30, "file_gib": row["file_bytes"] / 2**30} for row in rows]
    return rows_table([{**row, **own} for row, own in zip(rows, memory, strict=True)], SEARCH_COLUMNS)


def stall_text(result: dict[str, Any]) -> str:
    """benchmarks/checkpoint_stall.py's result."""
    shares = {"step_percent": "stall_over_step", "interval_percent": "stall_share_at_default_interval"}
    rows = [
        {**row, "name": name, "peak_gib": row["peak_memory_bytes"] / 2**30}
        | {percent: 100 * row[share] for percent, share in shares.items()}
        for name, row in result["rows"].items()
    ]
    return rows_table(rows, STALL_COLUMNS)


def form_of(result: dict[str, Any]) -> Callable[[dict[str, Any]], str] | None:
    """What writes a result's table; None for a file that has no table here."""
    if "row_stages" in result:
        return throughput_text
    if "agreement" in result:
        return agreement_table
    if "architectures" in result:
        return kernel_resources_text
    if "finding" in result:
        return lambda trained: curriculum_table(trained["rows"], trained["runs"], trained["unit"]).strip()
    if "runs" in result:
        return pretrained_text if "arm" in result["runs"][0] else kill_text
    if "own_mebibytes" in result:
        return feature_memory_text
    if "frozen_fast" in result and "plain" in result:
        return expert_step_text
    if "projections" in result:
        return lambda projected: traffic_table(projected["projections"])
    rows = result.get("rows") or [{}]
    if isinstance(rows, dict):
        return stall_text
    if not isinstance(rows[0], dict):
        return None
    if "recall_at_10" in rows[0]:
        return search_text
    if "printed" in rows[0]:
        return lambda counted: parameter_table(counted["rows"]).strip()
    if "way" in rows[0]:
        return lambda measured: rows_table(measured["rows"], EMBED_COLUMNS)
    if "clips_per_cpu_second" in rows[0]:
        return input_forms_text
    if "kind" in rows[0] and "hours" in rows[0]:
        return student_text
    if "axis" in rows[0]:
        return attention_text
    return model_step_text if "contender" in rows[0] else None


def section(path: Path) -> str:
    """A file's heading, machine, command and table."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"### {path.name}", ""]
    machine = result.get("machine") or {}
    if machine:
        versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
        lines.append(f"{machine['device']}, {machine['threads']} CPU threads, Python {machine['python']}, {versions}.")
    if result.get("command"):
        command = result["command"]
        lines.append(f"Command: `{command if isinstance(command, str) else ' '.join(command)}`")
    form = form_of(result)
    lines += ["", form(result) if form else "See the file.", ""]
    return "\n".join(lines)


def tables(folder: Path) -> str:
    """Every result file's section, by name."""
    files = sorted(path for path in folder.glob("*.json") if path.name != KILLS)
    return "\n".join(section(path) for path in files) if files else "No result has been committed yet.\n"


def page_with(text: str, generated: str) -> str:
    """The page with new text between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs: got a page without {BEGIN} and {END}; allowed: both, once")
    return f"{before}{BEGIN}\n\n{generated}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where the page is not up to date")
    options = parser.parse_args(arguments)
    kills = section(RESULTS / KILLS) if (RESULTS / KILLS).exists() else "No result has been committed yet.\n"
    stale = not all(copy.is_file() and copy.read_bytes() == figure.read_bytes() for figure, copy in FIGURES.items())
    for page, generated in ((PAGE, tables(RESULTS)), (RELIABILITY, kills)):
        text = page.read_text(encoding="utf-8")
        wanted = page_with(text, generated)
        stale = stale or wanted != text
        if not options.check:
            page.write_text(wanted, encoding="utf-8")
    if options.check:
        return int(stale)
    for figure, copy in FIGURES.items():
        copy.write_bytes(figure.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
