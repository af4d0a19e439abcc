"""A model card (README.md of a Hub folder) from a run folder: data, training, results, licence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError

SHOWN_METRICS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MdR", "v2t/R@1", "v2t/R@5", "v2t/R@10", "v2t/MdR")


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in (RUN/checkpoints/step_..); None for a folder of its own."""
    run = checkpoint.resolve().parent.parent
    return run if (run / "config.yaml").is_file() and (run / "stages.json").is_file() else None


def model_card(checkpoint: Path, name: str, licence: str) -> str:
    """Return the card's text; information without a run is "unknown".

    Args:
        checkpoint: a checkpoint folder.
        name: the model's name.
        licence: an identifier that the Hub knows, such as mit, cc-by-nc-4.0 or other.

    Raises:
        UserError: a file of the run cannot be read.
    """
    run = run_of(checkpoint)
    architecture = _read(checkpoint / "config.json")
    parts = [_header(licence), f"# {name}\n", _model(architecture)]
    if run is None:
        parts.append("## Training\n\nUnknown: the checkpoint does not lie in a run folder.\n")
    else:
        environment, stages = _read(run / "environment.json"), _read(run / "stages.json")
        parts += [_data(environment), _training(stages, environment), _results(run / "metrics.json")]
    parts.append(_use(name))
    return "\n".join(parts)


def _header(licence: str) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("frozen_fast", "video-text-retrieval"))
    return f"---\nlibrary_name: frozen_fast\nlicense: {licence}\ntags:\n{tags}\n---\n"


def _model(architecture: dict[str, Any]) -> str:
    if "video" not in architecture:
        return f"A video-text retrieval model of kind {architecture.get('kind')!r}.\n"
    video, text = architecture["video"], architecture["text"].get("config", {}).get("model_type", "a transformer")
    size = video.get("size")
    if not isinstance(size, dict):
        return f"A dual encoder of video and text with the video tower {video.get('tower', 'of its kind')!r}.\n"
    return (
        "A dual encoder of video and text in the manner of Frozen in Time (Bain et al., 2021): a space-time "
        f"transformer of {size['depth']} blocks and width {size['width']} over {architecture['learned_frames']} "
        f"frame(s) of {size['resolution']} x {size['resolution']} pixels, and {text} for captions, into a space of "
        f"{architecture['embedding_width']} dimensions.\n"
    )


def _data(environment: dict[str, Any]) -> str:
    rows = [
        [name, use, str(about["clips"]), about["kind"]]
        for use, key in (("training", "sources"), ("evaluation", "evaluation_sources"))
        for name, about in environment.get(key, {}).items()
    ]
    return "## Data\n\n" + _table(["source", "use", "clips", "kind"], rows)


def _training(stages: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    rows = [[str(row["frames"]), str(row["steps"]), str(row["clips"]), f"{row['gpu_hours']:.3g}"] for row in stages]
    total = sum(row["gpu_hours"] for row in stages)
    devices = ", ".join(environment.get("devices", [])) or "unknown devices"
    said = f"\n{total:.3g} device-hours in all, on {environment.get('world_size', 1)} x {devices}.\n"
    return "## Training\n\n" + _table(["frames", "steps", "clips", "device-hours"], rows) + said


def _results(path: Path) -> str:
    if not path.is_file():
        return "## Results\n\nThe run was not evaluated.\n"
    evaluations = _read(path)["evaluations"]
    last: dict[tuple[str, str], dict[str, Any]] = {(row["source"], row["protocol"]): row for row in evaluations}
    rows = [
        [row["source"], row["protocol"], str(row["frames"]), str(row["num_queries"]), str(row["num_videos"])]
        + [f"{row['metrics'][metric]:.1f}" if metric in row["metrics"] else "-" for metric in SHOWN_METRICS]
        for row in last.values()
    ]
    header = ["source", "protocol", "frames", "queries", "videos", *SHOWN_METRICS]
    return "## Results\n\nThe run's last evaluation of each source; R@k in percent.\n\n" + _table(header, rows)


def _use(name: str) -> str:
    return (
        "## Use\n\n```python\nimport frozen_fast\n\n"
        f'model = frozen_fast.load_model("{name}")\n'
        'sim_QV = model.similarity(["a dog runs along a beach"], video_VTCHW)  # uint8 or normalised frames\n'
        "```\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: {path} cannot be read ({error}); allowed: one of a finished run") from None
