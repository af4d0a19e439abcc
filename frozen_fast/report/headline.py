"""The numbers at the top of a report."""

from __future__ import annotations

from typing import Any

from frozen_fast.report.document import KeyNumber, count, number, percent, significant
from frozen_fast.report.run_data import RunData
from frozen_fast.report.wording import frames_text, hours_name


def headline(run: RunData) -> list[KeyNumber]:
    """R@1 or top-1, twins told apart, hours and speed, as available."""
    numbers = []
    classified = [row for row in run.stage_evaluations() if "finetuned" in row]
    if classified:
        last = ([row for row in classified if row["step"] == run.best_step] or classified)[-1]
        best = f", best checkpoint (step {count(last['step'])})" if last["step"] == run.best_step else ""
        chance = (
            f"chance {number(100 / len(last['finetuned']['classes']))} %, top-5 {number(last['metrics']['top5'])} %"
        )
        label = f"Top-1 on {last['source']}, {frames_text(last['frames'])}"
        numbers.append(KeyNumber(label, f"{number(last['metrics']['top1'])} %", f"{chance}{best}"))
    plain = [
        row
        for row in run.stage_evaluations()
        if row["protocol"] != "v2t_max_over_captions" and "t2v/R@1" in row["metrics"]
    ]
    if plain:
        chosen = [row for row in plain if row["step"] == run.best_step]
        last = (chosen or plain)[-1]
        first = next(row for row in plain if row["source"] == last["source"])
        first = last if first["stage"] == last["stage"] else first
        before = f", {number(first['metrics']['t2v/R@1'])} % at {frames_text(first['frames'])}"
        earlier = "" if first is last else before
        best = f", best checkpoint (step {count(last['step'])})" if chosen else ""
        numbers.append(
            KeyNumber(
                f"Text-to-video R@1, {frames_text(last['frames'])}",
                f"{number(last['metrics']['t2v/R@1'])} %",
                f"chance {number(100 / last['num_videos'], 2)} %{earlier}{_one_frame_note(last)}{best}",
            )
        )
        if "twin_accuracy" in last["metrics"]:
            before = (
                ""
                if first is last or "twin_accuracy" not in first["metrics"]
                else (f", {number(first['metrics']['twin_accuracy'])} % at {frames_text(first['frames'])}")
            )
            value = f"{number(last['metrics']['twin_accuracy'])} %"
            numbers.append(KeyNumber("Twins told apart", value, f"chance 50 %{before}"))
    if run.stages:
        hours = sum(row["gpu_hours"] for row in run.stages)
        evaluation = sum(row["evaluation_gpu_hours"] for row in run.stages)
        unfinished = len(run.totals()) - len(run.stages)
        notes = [f"evaluation {significant(evaluation)} more"] if evaluation else []
        notes += ["finished stages only"] if unfinished > 0 else []
        numbers.append(KeyNumber(hours_name(run), significant(hours), ", ".join(notes)))
    totals = run.totals()
    if totals and totals[-1].clips_per_second:
        last_total = totals[-1]
        note = f"stall {percent(last_total.stall_share)}"
        numbers.append(
            KeyNumber(f"Clips/s at {frames_text(last_total.frames)}", significant(last_total.clips_per_second), note)
        )
    return numbers


def _one_frame_note(row: dict[str, Any]) -> str:
    ceiling = row["metrics"].get("one_frame_ceiling")
    return "" if ceiling is None else f", one frame at best {number(ceiling)} %"
