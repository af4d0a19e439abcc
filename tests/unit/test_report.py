"""The report of a made-up run: every figure against the folder's files, unfinished and broken folders, escaping."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt
from torch.autograd import DeviceType

from frozen_fast.config.extensions import report_sections
from frozen_fast.errors import UserError
from frozen_fast.profiling.trace import device_use, most_expensive
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import RunLock
from frozen_fast.report import loss_section, plots, retrieval, stages_section
from frozen_fast.report.document import Section, Text, duration, joules, significant
from frozen_fast.report.run_data import RunData, read_run
from frozen_fast.report.write_report import compare_runs, write_report
from support.run_folder import make_run_folder


def table_after(markdown: str, heading: str, header: str) -> list[list[str]]:
    """Body rows of the first table below a heading whose header holds a word."""
    text = markdown.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and header in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def report_of(folder: Path) -> tuple[str, str]:
    markdown, html = write_report(folder)
    return markdown.read_text(), html.read_text()


@pytest.fixture
def drawn() -> None:
    """Asks for real plots, which take most of a report's time."""


@pytest.fixture(autouse=True)
def blank_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        plots = ((stages_section, "hours_plot"), (loss_section, "loss_plot"), (retrieval, "retrieval_plot"))
        for module, plot in plots:
            monkeypatch.setattr(module, plot, lambda run: None)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def edit_json(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run_folder(tmp_path / "run")


def test_the_stage_table_is_the_sum_of_the_steps(run: Path) -> None:
    markdown, _ = report_of(run)
    rows = table_after(markdown, "Stages", "Clips/s")
    steps = rows_of(run)
    for stage, row in enumerate(rows[:3]):
        own = [step for step in steps if step["stage"] == stage]
        timed = [step for step in own if not step["warmup"]]
        seconds = sum(step["seconds"] for step in timed)
        assert int(row[3]) == len(own)
        assert int(row[4].replace(",", "")) == sum(step["clips"] for step in own)
        assert float(row[7]) == pytest.approx(sum(step["clips"] for step in timed) / seconds, rel=0.005)
        assert float(row[8].split()[0]) == pytest.approx(
            100 * sum(step["stall_seconds"] for step in timed) / seconds, abs=0.06
        )
    stages = json.loads((run / "stages.json").read_text())
    assert [float(row[6]) for row in rows[:3]] == pytest.approx([stage["gpu_hours"] for stage in stages], rel=0.005)
    assert rows[3][0] == "all" and float(rows[3][6]) == pytest.approx(sum(s["gpu_hours"] for s in stages), rel=0.005)
    assert "Checked: steps, clips, seconds and stall" in markdown and "stages.json differs" not in markdown
    parts = table_after(markdown, "Stages", "Warm-up")
    shown = [[float(cell.split()[0]) for cell in row[1:]] for row in parts]
    for row, stage in zip(shown, stages, strict=True):
        assert sum(row[:-1]) == pytest.approx(row[-1], abs=0.4) == pytest.approx(stage["seconds"], abs=0.4)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("clips", lambda v: v + 1, r"stage 2: clips 961 in stages.json, 960 in steps.jsonl"),
        ("steps", lambda v: v - 1, r"stage 2: steps 39 in stages.json, 40 in steps.jsonl"),
        ("training_seconds", lambda v: v * 1.1, r"stage 2: seconds of steps"),
        ("stall_seconds", lambda v: v + 0.5, r"stage 2: stall seconds"),
    ],
)
def test_disagreement_of_the_files_is_said(run: Path, key: str, change: Any, message: str) -> None:
    edit_json(run / "stages.json", lambda stages: stages[1].update({key: change(stages[1][key])}))
    markdown, _ = report_of(run)
    assert "stages.json differs from the sums of steps.jsonl" in markdown and "Checked:" not in markdown
    assert re.search(message, markdown)
    assert "stage 1:" not in markdown and "stage 3:" not in markdown


def test_one_frame_and_the_last_stage_stand_side_by_side(run: Path) -> None:
    markdown, _ = report_of(run)
    rows = table_after(markdown, "Retrieval", "Twins")
    assert [(row[0], row[3], row[7], row[-1]) for row in rows] == [
        ("stage 1", "1", "3.0", "50.0"),
        ("stage 2", "4", "12.5", "68.5"),
        ("stage 3", "8", "22.0", "87.0"),
        ("chance", "", "0.8", "50.0"),
        ("one frame at best", "", "50.0", "50.0"),
    ]
    headline = "**Text-to-video R@1, 8 frames: 22.0 %** (chance 0.83 %, 3.0 % at 1 frame, one frame at best 50.0 %)"
    assert headline in markdown


def test_the_best_epoch_stands_beside_the_last_and_every_epoch_below(run: Path) -> None:
    """Stage 3 was evaluated after steps 90, 100 and 120; that after step 100 is the best."""

    def add_epochs(value: dict[str, Any]) -> None:
        last = value["evaluations"].pop()
        for step, loss, recall in ((90, 2.0, 20.0), (100, 1.5, 40.0), (120, 1.75, 22.0)):
            metrics = {**last["metrics"], "t2v/R@1": recall}
            value["evaluations"].append({**last, "step": step, "loss": loss, "metrics": metrics})

    edit_json(run / "metrics.json", add_epochs)
    (run / "checkpoints" / "step_00000100").mkdir(parents=True)
    (run / "checkpoints" / "best").symlink_to("step_00000100")
    markdown, _ = report_of(run)
    rows = [row for row in table_after(markdown, "Retrieval", "R@50") if row[0].startswith("stage")]
    assert [(row[0], row[7]) for row in rows] == [
        ("stage 1, step 40", "3.0"),
        ("stage 2, step 80", "12.5"),
        ("stage 3, step 100 (best)", "40.0"),
        ("stage 3, step 120", "22.0"),
    ]
    epochs = table_after(markdown, "Retrieval", "Loss")
    assert [(row[0], row[3], row[4]) for row in epochs[2:]] == [
        ("stage 3, step 90", "2.000", "20.0"),
        ("stage 3, step 100 (best)", "1.500", "40.0"),
        ("stage 3, step 120", "1.750", "22.0"),
    ]
    head = markdown.split("##")[0]
    assert "40.0 %" in head and "best checkpoint (step 100)" in head and "3.0 % at 1 frame" in head
    (line,) = [line for line in compare_runs([run, run]).splitlines() if "t2v/R@1 " in line]
    assert line.split("|")[2].strip() == "40.0"


def test_several_captions_show_the_second_protocol_for_video_to_text_only(run: Path) -> None:
    def add(value: dict) -> None:
        for row in list(value["evaluations"]):
            row["protocol"] = "several_captions"
            row["num_queries"] = 600
            value["evaluations"].append({**row, "protocol": "v2t_max_over_captions"})

    edit_json(run / "metrics.json", add)
    markdown, _ = report_of(run)
    text_to_video, video_to_text = markdown.split("Video to text:")
    assert "v2t_max_over_captions" not in text_to_video
    assert video_to_text.count("| v2t_max_over_captions") == 3
    assert "| chance" not in video_to_text.split("## Stages")[0]


def test_a_short_run_beside_the_paper_is_a_projection(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path / "run", paper_row="1=>4=>8", device="cuda", num_devices=2, size="base_patch16_224")
    markdown, _ = report_of(run)
    rows = table_after(markdown, "Comparison with the paper", "Hours")
    assert rows[0][1:] == ["PTT, hardware not stated", "2,500,000", "36.0", "27.4", "67.3", "4.0"]
    assert rows[1][1] == "measured, not comparable" and rows[2][1] == "projection"
    steps = [step for step in rows_of(run) if not step["warmup"]]
    # Three stages of equal clips; two devices.
    hours = sum(
        2.5e6 / 3 * sum(s["seconds"] for s in own) / sum(s["clips"] for s in own) * 2 / 3600
        for own in ([s for s in steps if s["stage"] == stage] for stage in range(3))
    )
    assert float(rows[2][3]) == pytest.approx(hours, rel=0.005)
    ratio = re.search(r"The paper's PTT is ([\d.]+) x this run's projected hours", markdown)
    assert ratio and float(ratio[1]) == pytest.approx(36 / hours, rel=0.005)
    assert "does not state its hardware" in markdown and "not comparable" in markdown
    assert "different model" not in markdown and "computed on CPUs" not in markdown


def test_a_run_of_a_whole_epoch_is_measured(tmp_path: Path) -> None:
    run = make_run_folder(
        tmp_path / "run", frames=(1,), clips_per_step=42_000, paper_row="1", device="cuda", size="base_patch16_224"
    )
    markdown, _ = report_of(run)
    rows = table_after(markdown, "Comparison with the paper", "Hours")
    assert [row[1] for row in rows] == ["PTT, hardware not stated", "measured"]
    (stage,) = json.loads((run / "stages.json").read_text())
    assert float(rows[1][3]) == pytest.approx(stage["gpu_hours"], rel=0.005)
    assert "not comparable. The projection" not in markdown


def test_another_model_on_a_cpu_claims_no_ratio(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path / "run", frames=(1, 4), paper_row="1=>4")
    markdown, _ = report_of(run)
    assert "nano_patch16_64, the paper's is base_patch16_224" in markdown
    assert "wall time x processes, not GPU-hours" in markdown
    assert "The paper's PTT is" not in markdown


def test_an_unfinished_curriculum_has_no_projection(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path / "run", paper_row="1=>4=>8", state="stopped", finished_stages=1)
    lines = (run / "steps.jsonl").read_text().splitlines()
    (run / "steps.jsonl").write_text("\n".join(lines[:50]) + '\n{"step": 51, "sta')  # killed while writing
    markdown, html = report_of(run)
    assert "**Note:** This run is not complete. State: stopped by a signal after a checkpoint" in markdown
    assert "(exit code 75)" in markdown
    rows = table_after(markdown, "Stages", "Clips/s")
    assert [row[0] for row in rows] == ["1", "2 (unfinished)", "all"]
    assert rows[1][3] == "10" and rows[1][6] == "n/a" and rows[2][6] == "n/a"
    assert "no projection: a stage has no speed yet" in markdown
    assert "The stages so far have 1=>4 frames, the row 1=>4=>8" in markdown
    assert 'class="caution"' in html


@pytest.mark.parametrize(
    "name", ["stages.json", "metrics.json", "environment.json", "status.json", "steps.jsonl", "config.yaml"]
)
def test_missing_and_broken_files_are_named(run: Path, name: str) -> None:
    (run / name).write_text('{"cut": [1, 2' if name != "steps.jsonl" else '{"cut\n{"step": 1}\n')
    broken, _ = report_of(run)
    assert f"{name} cannot be read" in broken
    (run / name).unlink()
    missing, html = report_of(run)
    assert f"{name} is missing: " in missing and f"{name} is missing: " in html


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("stages.json", b'{"stage": 1}', "stages.json cannot be read (it holds no list)"),
        ("stages.json", b'[{"stage": 0, "steps": "many"}, 5]', "stages.json cannot be read in full: 2 row(s)"),
        ("metrics.json", b'{"evaluations": 5}', "metrics.json cannot be read in full: 1 row(s)"),
        ("metrics.json", b'{"evaluations": [{"step": 3}]}', "metrics.json cannot be read in full: 1 row(s)"),
        ("metrics.json", b"[" * 50_000, "metrics.json cannot be read"),
        ("status.json", b"[1]", "status.json cannot be read (it holds no object)"),
        ("environment.json", b"\xff\xfe", "environment.json cannot be read"),
        ("steps.jsonl", b"\0" * 300, "steps.jsonl: 1 line(s) cannot be read (line 1"),
        ("steps.jsonl", b'{"step": "a", "stage": 0}\n', "steps.jsonl cannot be read in full: 1 row(s)"),
        ("config.yaml", b"\xff", "config.yaml cannot be read"),
        ("events.jsonl", b'{"kind": 5, "time": "x"}\n{', "events.jsonl: 1 line(s) cannot be read"),
    ],
)
def test_damaged_files_of_a_run_are_named_in_its_report(run: Path, name: str, content: bytes, told: str) -> None:
    (run / name).write_bytes(content)
    assert told in report_of(run)[0]


@pytest.mark.usefixtures("drawn")
def test_what_happened_to_a_run_is_told(run: Path) -> None:
    rows = [{"time": 1.76e9, "kind": "damage", "message": f"number {index}"} for index in range(25)]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    markdown, _ = report_of(run)
    assert "2025-10-09 08:53 UTC damage: number 24" in markdown and "number 4" not in markdown
    assert "5 earlier ones are in events.jsonl" in markdown


@pytest.mark.usefixtures("drawn")
def test_a_run_that_was_killed_is_told_from_one_that_runs(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running", "exit_code": None}))
    assert "State: killed: status.json says running, but no process writes to the folder" in report_of(run)[0]
    lock = RunLock(RunFolder(run))
    lock.acquire()
    assert "State: running" in report_of(run)[0]
    lock.release()


@pytest.mark.usefixtures("drawn")
def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: young\npaper_row: '8'\n")
    markdown, html = report_of(tmp_path)
    assert markdown.startswith("# young\n") and "No optimizer step has finished." in markdown
    assert "No evaluation has finished." in markdown and "<svg" not in html
    assert markdown.count("is missing: ") == 5


@pytest.mark.parametrize("evaluation", ["{sources: []}", "{sources: [{path: x}], every: never}"])
def test_a_run_that_does_not_evaluate_misses_no_metrics(run: Path, evaluation: str) -> None:
    (run / "metrics.json").unlink()
    assert "metrics.json is missing" in report_of(run)[0]
    with (run / "config.yaml").open("a") as file:
        file.write(f"evaluation: {evaluation}\n")
    markdown, _ = report_of(run)
    assert "is missing" not in markdown and "## State" not in markdown


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run folder: got .*; allowed: a folder with config.yaml or steps.jsonl"):
        write_report(tmp_path)


class Page(HTMLParser):
    """Collects tags and what would be fetched; checks that tags close."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.usefixtures("drawn")
def test_the_html_is_whole_safe_and_fetches_nothing(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: demo", "name: <script>alert('x')</script>"))
    _, html = report_of(run)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.tags.count("svg") == 3 and "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert "@import" not in html and "url(http" not in html
    assert "&lt;script&gt;alert" in html and "videos/&lt;clip &amp; 0&gt;.webm" in html


def test_bad_clips_are_counted_by_cause_and_named(run: Path) -> None:
    markdown, _ = report_of(run)
    assert table_after(markdown, "Unreadable clips", "Cause") == [
        ["clips", "truncated", "2"],
        ["clips", "missing", "1"],
    ]
    assert "videos/<clip & 1>.webm  truncated: ends after 3 of 60 frames  (replaced by clip_101)" in markdown
    (run / "bad_clips.jsonl").unlink()
    assert "## Unreadable clips\n\nNone." in report_of(run)[0]


def test_what_was_left_out_when_the_sets_were_read_is_counted_by_cause(run: Path) -> None:
    markdown, html = report_of(run)
    assert table_after(markdown, "Clips", "Rows read") == [
        ["training", "clips", "video", "1,000", "40", "960"],
        ["training", "stills", "image", "1,500", "0", "1,500"],
        ["evaluation", "held_out", "video", "122", "2", "120"],
    ]
    assert table_after(markdown, "Clips", "Cause") == [
        ["training", "clips", "file not on disk", "39"],
        ["training", "clips", "no caption", "1"],
        ["evaluation", "held_out", "duplicate id", "2"],
    ]
    assert "file not on disk" in html

    def forget(value: dict[str, Any]) -> None:
        del value["sources"], value["evaluation_sources"]

    edit_json(run / "environment.json", forget)
    assert "## Clips" not in report_of(run)[0]


def test_the_most_expensive_kernels_are_a_table(run: Path) -> None:
    assert "## Profile" not in report_of(run)[0]
    rows = [{"name": "gemm<float>", "calls": 24, "milliseconds": 12.5, "share": 0.25}]
    use = {"host_milliseconds": 40.0, "launches": 1400.0, "busy_milliseconds": 15.0, "copy_milliseconds": 2.0}
    use["idle_share"] = 0.6
    table = {"stage": 1, "what": "kernel", "steps": 2, "total_milliseconds": 50.0, "rows": rows, "use": use}
    (run / "traces").mkdir()
    (run / "traces" / "stage_1.kernels.json").write_text(json.dumps(table))
    (run / "traces" / "stage_2.kernels.json").write_text("{")
    markdown, html = report_of(run)
    assert table_after(markdown, "Profile", "Kernel") == [["gemm\\<float>", "24", "12.5", "25.0 %"]]
    assert "Stage 2, 2 steps traced after warm-up, 50.0 ms of kernels on the device" in markdown
    assert "40.0 ms on the host" in markdown and "the device is idle for 60.0 % of the time" in markdown
    assert "gemm&lt;float&gt;" in html and "traces/stage_2.kernels.json cannot be read" in markdown


def test_kernels_are_the_devices_own_and_operators_count_without_what_they_call() -> None:
    def entry(name: str, kind: DeviceType, cpu: float, device: float, annotation: bool = False) -> Any:
        return SimpleNamespace(
            key=name,
            device_type=kind,
            self_cpu_time_total=cpu,
            self_device_time_total=device,
            count=2,
            is_user_annotation=annotation,
        )

    entries = [
        entry("aten::mm", DeviceType.CPU, 3000.0, 9000.0),
        entry("aten::add", DeviceType.CPU, 1000.0, 0.0),
        entry("gemm", DeviceType.CUDA, 0.0, 6000.0),
        entry("copy", DeviceType.CUDA, 0.0, 2000.0),
        entry("step", DeviceType.CUDA, 0.0, 9000.0, annotation=True),
    ]
    rows, total = most_expensive(entries, on_cuda=True)
    assert [(row["name"], row["milliseconds"], row["share"]) for row in rows] == [("gemm", 6, 0.75), ("copy", 2, 0.25)]
    assert total == 8.0
    rows, total = most_expensive(entries, on_cuda=False)
    assert [(row["name"], row["share"]) for row in rows] == [("aten::mm", 0.75), ("aten::add", 0.25)]


def test_idle_time_copies_and_launches_are_told_apart() -> None:
    def event(name: str, kind: DeviceType, start: float, end: float) -> Any:
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("cudaLaunchKernel", DeviceType.CPU, 0, 5),
        event("cudaLaunchKernelExC", DeviceType.CPU, 5, 10),
        event("cudaGraphLaunch", DeviceType.CPU, 10, 12),
        event("cudaDeviceSynchronize", DeviceType.CPU, 12, 4012),
        event("aten::mm", DeviceType.CPU, 0, 9),
        event("gemm", DeviceType.CUDA, 1000, 4000),
        event("norm", DeviceType.CUDA, 3000, 5000),
        event("Memcpy HtoD", DeviceType.CUDA, 4500, 6000),
        event("gemm", DeviceType.CUDA, 9000, 11000),
    ]
    use = device_use(events, steps=2, seconds=0.020)
    assert use["launches"] == 1.5 and use["host_milliseconds"] == pytest.approx((20 - 4) / 2)
    assert use["busy_milliseconds"] == pytest.approx((4 + 2) / 2), "overlapping kernels count once"
    assert use["copy_milliseconds"] == pytest.approx(1.5 / 2)
    assert use["idle_share"] == pytest.approx(3 / 10)
    on_cpu = device_use([events[4]], steps=1, seconds=0.5)
    assert on_cpu["host_milliseconds"] == 500 and on_cpu["idle_share"] is None and on_cpu["launches"] is None


def test_backends_versions_and_config_are_shown(run: Path) -> None:
    markdown, _ = report_of(run)
    facts = dict(tuple(row) for row in table_after(markdown, "Machine and versions", "Value"))
    assert facts["Decoding"] == "clips: dali 700 clips, pyav 20 clips; stills: pyav"
    assert facts["Attention"] == "sdpa"
    assert facts["Commit"].endswith("with local changes")
    assert "torch 2.10.0" in facts["Packages"]
    assert "patch16_64" in markdown.split("## Config")[1]


def test_the_attention_choices_are_a_table_of_figures(run: Path) -> None:
    def choice(axis: str, frames: int, backend: str, **more: Any) -> dict[str, Any]:
        case = {"device": "H100", "dtype": "bfloat16", "patches": 196, "heads": 12, "head_width": 64, "threads": 0}
        return {**case, "axis": axis, "frames": frames, "batch": 24, "backend": backend, "failed": {}, **more}

    choices = [
        choice("time", 1, "sdpa", milliseconds={"sdpa": 0.5, "xformers": 1.25}, how="measured"),
        choice("space", 4, "xformers", milliseconds={"xformers": 2.0}, failed={"sdpa": "no kernel"}, how="cached"),
        choice("space", 8, "xformers", milliseconds={}, how="default"),
    ]
    edit_json(run / "environment.json", lambda value: value.update(attention_backends=choices))
    markdown, html = report_of(run)
    assert table_after(markdown, "Machine and versions", "Chosen by") == [
        ["time", "sdpa", "measured", "1", "24", "0.500", "1.25"],
        ["space", "xformers", "cached", "4", "24", "failed", "2.00"],
        ["space", "xformers", "default", "8", "24", "-", "-"],
    ]
    facts = dict(tuple(row) for row in table_after(markdown, "Machine and versions", "Value"))
    assert facts["Attention"] == "sdpa, xformers"
    assert "{'" not in markdown and "{&#39;" not in html


def test_notes_explain_columns_that_are_there(run: Path) -> None:
    markdown, _ = report_of(run)
    assert "Twins:" in markdown and "One frame at best:" in markdown
    assert "Loss: the training loss" not in markdown and "Energy:" not in markdown and "MFU, datasheet:" not in markdown

    def plain(value: dict[str, Any]) -> None:
        for row in value["evaluations"]:
            row["loss"] = 1.0
            row["metrics"] = {key: number for key, number in row["metrics"].items() if "/" in key}

    edit_json(run / "metrics.json", plain)
    edit_json(
        run / "stages.json", lambda stages: stages[0].update(joules=5.0, mfu_datasheet=0.5, peak_source="a table")
    )
    markdown, _ = report_of(run)
    assert "R@k in percent" in markdown and "win" not in markdown.split("## Stages")[0].lower().replace("windows", "")
    assert (
        "Energy: of the devices only" in markdown
        and "MFU, datasheet: executed FLOPs per second after the warm-up over a table." in markdown
    )
    assert "Loss: the training loss" not in markdown, "no table of this report has the column"


def lines_of(plot: str) -> list[list[tuple[float, float]]]:
    """Points of every line of matplotlib's SVG that has a colour of a series."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke: #0072b2', plot)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)] for path in paths]


def test_the_loss_average_ends_with_its_stage(tmp_path: Path) -> None:
    run = read_run(make_run_folder(tmp_path / "run", frames=(1, 4)))
    for row in run.steps:
        row.update(source="clips", loss=4.0 if row["stage"] == 0 else 1.0)
    plot = plots.loss_plot(run)
    assert plot is not None
    heights = [{round(y, 3) for _, y in line} for line in lines_of(plot)]
    assert len(heights) == 4, "the losses and their average of each stage"
    assert all(len(found) == 1 for found in heights), "constant in a stage, so constant when averaged"
    assert len(set.union(*heights)) == 2


def ticks_of(plot: str, axis: str) -> list[float]:
    group = plot.split(f'id="matplotlib.axis_{axis}"', 1)[1].split('id="matplotlib.axis', 1)[0]
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", group)
    return [float(text.replace("\u2212", "-")) for text in texts if re.fullmatch(r"[-\u2212]?[\d.]+", text)]


def test_plots_of_zeros_start_at_zero(tmp_path: Path) -> None:
    run = read_run(make_run_folder(tmp_path / "run"))
    for row in run.steps:
        row["loss"] = 0.0
    for row in run.evaluations:
        row["metrics"] = {"t2v/R@1": 0.0}
    for row in run.stages:
        row.update({key: 0.0 for key in row if key.endswith("_seconds")} | {"seconds": 0.0})
    for plot, axis in ((plots.loss_plot(run), "2"), (plots.retrieval_plot(run), "2"), (plots.hours_plot(run), "1")):
        assert plot is not None
        ticks = ticks_of(plot, axis)
        assert min(ticks) == 0 and max(ticks) == 1, ticks


def test_hostile_names_stay_text(run: Path) -> None:
    name = "<img src=x onerror=alert(1)> [click](javascript:alert(1)) | ```"
    edit_json(run / "environment.json", lambda value: value["sources"].update({name: value["sources"]["clips"]}))
    rows = (run / "bad_clips.jsonl").read_text().splitlines()
    bad = {**json.loads(rows[0]), "source": name, "path": "```\n<script>alert(1)</script>"}
    (run / "bad_clips.jsonl").write_text("\n".join([json.dumps(bad), *rows[1:]]) + "\n")
    markdown, html = report_of(run)
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    for page in (html, rendered):
        assert "<img" not in page and "<script" not in page and 'href="javascript' not in page
        assert "&lt;img src=x" in page


def test_a_section_is_a_function_in_the_table(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(data: RunData) -> Section:
        return Section("Mine", [Text(f"{len(data.steps)} steps.")])

    monkeypatch.setattr(loss_section, "own", own, raising=False)
    added = {**report_sections._built_in, "mine": "frozen_fast.report.loss_section:own"}
    monkeypatch.setattr(report_sections, "_built_in", added)
    markdown, html = report_of(run)
    assert markdown.endswith("## Mine\n\n120 steps.\n") and "<h2>Mine</h2>" in html


@pytest.mark.usefixtures("drawn")
def test_writing_twice_gives_the_same_report(run: Path) -> None:
    assert report_of(run) == report_of(run)


@pytest.mark.usefixtures("drawn")
def test_a_long_run_keeps_the_plot_small(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path / "run", frames=(1,), steps_per_stage=6000)
    _, html = report_of(run)
    assert len(html) < 250_000


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = make_run_folder(tmp_path / "first", paper_row="1=>4=>8")
    second = make_run_folder(tmp_path / "second", frames=(4,), steps_per_stage=20, seed=1, bad_clips=0)
    text = compare_runs([first, second])
    rows = {row[0]: row[1:] for row in table_after("## all\n" + text, "all", "demo (first)")}
    assert rows["steps"] == ["120", "20"] and rows["unreadable clips"] == ["3", "0"]
    assert rows["stage 1: frames"] == ["1", "4"] and rows["stage 3: frames"] == ["8", "n/a"]
    assert rows["held_out (plain): t2v/R@1"] == ["22.0", "3.0"]
    assert rows["paper's row, hours"][0].endswith("projected; paper 36, hardware not stated")
    hours = [sum(row["gpu_hours"] for row in read_run(folder).stages) for folder in (first, second)]
    assert [float(cell) for cell in rows["device-hours"]] == pytest.approx(hours, rel=0.005)
    different = {row[0]: row[1:] for row in table_after(text, "Settings that differ", "Key")}
    assert different["curriculum.stages[0].frames"] == ["1", "4"]
    assert different["curriculum.stages[2].steps"] == ["40", "(not set)"]
    assert different["paper_row"] == ["1=>4=>8", "none"] and "model.video.size" not in different


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0, "0"),
        (0.012, "0.0120"),
        (36.0, "36.0"),
        (284.4, "284"),
        (12345.6, "12,300"),
        (0.00004, "0.0000400"),
    ],
)
def test_figures_have_three_significant_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "n/a"), (4.25, "4.2 s"), (59.97, "60.0 s"), (205, "3:25 min"), (7405.4, "2:03:25 h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("energy", "text"), [(None, "n/a"), (0.0, "0 J"), (532.4, "532 J"), (12_340.0, "12.3 kJ"), (4.56e6, "4.56 MJ")]
)
def test_energies(energy: float | None, text: str) -> None:
    assert joules(energy) == text


def test_energy_is_shown_per_stage_and_in_sum_only_where_all_of_it_is_known(run: Path) -> None:
    def shown() -> list[str]:
        return [row[12] for row in table_after(report_of(run)[0], "Stages", "Energy")]

    assert shown() == ["n/a"] * 4
    edit_json(run / "stages.json", lambda stages: [stage.update(joules=1500.0) for stage in stages])
    edit_json(run / "environment.json", lambda value: value.update(energy="NVML's counter of GPU-1"))
    assert shown() == ["1.50 kJ"] * 3 + ["4.50 kJ"]
    assert "(NVML's counter of GPU-1)" in report_of(run)[0]
    edit_json(run / "stages.json", lambda stages: stages[1].update(joules=None))
    assert shown() == ["1.50 kJ", "n/a", "1.50 kJ", "n/a"]


def test_comparing_takes_two_runs(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path / "run")
    with pytest.raises(UserError, match="run folders: got 1; allowed: two or more"):
        compare_runs([run])
    with pytest.raises(UserError, match="run folder: got"):
        compare_runs([run, tmp_path / "nothing"])
