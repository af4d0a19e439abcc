"""The report's machine and versions."""

from __future__ import annotations

from typing import Any

from frozen_fast.report.document import Block, Section, Table, Text, count, significant
from frozen_fast.report.run_data import RunData
from frozen_fast.report.wording import devices


def _model(run: RunData) -> str:
    """The model with its number of parameters in millions."""
    model = run.environment.get("model") or {}
    if "parameters" not in model:
        return ""
    whole = f"{model['parameters'] / 1e6:.1f} million weights"
    if "text_parameters" not in model:
        return f"{model['kind']}, {whole}"
    video, text = model["video"], model["text"]
    parts = [
        f"{video['tower']} {run.video_size} ({model['video_parameters'] / 1e6:.1f})",
        f"{text['tower']} {text.get('name') or ''} ({model['text_parameters'] / 1e6:.1f})".replace("  ", " "),
    ]
    return f"{' + '.join(parts)}, {whole}"


def machine_section(run: RunData) -> Section | None:
    """Devices, backends, versions and command; None without environment.json."""
    environment = run.environment
    if not environment:
        return None
    dirty = " with local changes" if environment.get("git_dirty") else ""
    command = environment.get("command")
    strategy = environment.get("strategy", environment.get("distributed_type"))
    attention = environment.get("attention_backends") or []
    facts = {
        "Devices": devices(run),
        "Processes": f"{environment.get('world_size')} ({strategy})",
        "Precision": " ".join(
            str(environment[key]) for key in ("precision", "precision_reason") if environment.get(key)
        ),
        "Model": _model(run),
        "Decoding": _backends(environment.get("decode_backends") or {}),
        "Attention": ", ".join(dict.fromkeys(str(row["backend"]) for row in attention)),
        "Residual norms, GELU": environment.get("fused_ops") or "",
        "Commit": f"{environment.get('git_commit') or 'not a checkout'}{dirty}",
        "Command": " ".join(command) if isinstance(command, list) else str(command or ""),
        "Python": str(environment.get("python", "")),
        "Packages": ", ".join(f"{name} {value}" for name, value in (environment.get("versions") or {}).items()),
    }
    rows = [[name, value or "not recorded"] for name, value in facts.items()]
    blocks: list[Block] = [Table(["What", "Value"], rows, words=2)]
    if any("axis" in row for row in attention):
        blocks.append(Text("Attention backend of each shape; ms of one forward and backward pass:"))
        blocks.append(_attention(attention))
    return Section("Machine and versions", blocks)


def _backends(backends: dict[str, Any]) -> str:
    parts = []
    for source, used in backends.items():
        if isinstance(used, dict):
            used = ", ".join(f"{name} {count(clips)} clips" for name, clips in used.items())
        parts.append(f"{source}: {used}")
    return "; ".join(parts)


def _attention(choices: list[dict[str, Any]]) -> Table:
    """The backend of each shape, and the measured times; `-`: not measured."""
    backends = list(dict.fromkeys(name for row in choices for name in row.get("milliseconds") or {}))
    rows = []
    for row in choices:
        times = [(row.get("milliseconds") or {}).get(name) for name in backends]
        failed = row.get("failed") or {}
        cells = [str(row.get(key, "")) for key in ("axis", "backend", "how", "frames", "batch")]
        cells += [
            "failed" if name in failed else "-" if time is None else significant(time)
            for name, time in zip(backends, times, strict=True)
        ]
        rows.append(cells)
    return Table(["Axis", "Backend", "Chosen by", "Frames", "Batch", *backends], rows, words=3)
