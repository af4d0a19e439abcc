"""The engine's parts on their own: agreement, precision, stage changes, the journal, evaluation's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import config_from_mapping
from frozen_fast.data import LoaderEndedError
from frozen_fast.data.load.bad_clips import BadClip
from frozen_fast.data.sources import CaptionRule, Clip, Source
from frozen_fast.errors import UserError
from frozen_fast.evaluation import retrieval_metrics, similarity
from frozen_fast.evaluation.metric_table import directions, is_better
from frozen_fast.losses import InfoNCE, contrastive_loss
from frozen_fast.models.retrieval_model import Features, RetrievalModel
from frozen_fast.models.video.temporal import expand_temporal_embedding
from frozen_fast.optimizers import build_optimizer
from frozen_fast.parallel import precision
from frozen_fast.parallel.base import Parallel, seed_step
from frozen_fast.parallel.precision import choose_precision
from frozen_fast.parallel.start import check_world, start_parallel
from frozen_fast.profiling.meter import StageMeter
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.tracking import Trackers
from frozen_fast.training import journal as journal_module
from frozen_fast.training import signals
from frozen_fast.training.checkpoint_keeper import selection_value
from frozen_fast.training.evaluate import evaluate_source, validation_loss
from frozen_fast.training.journal import Journal, StepResult
from frozen_fast.training.non_finite import NonFiniteSteps, NotFiniteError
from frozen_fast.training.stages import expand_frames, warm_up_steps


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    made = start_parallel(config_from_mapping({"training": {"device": "cpu", "precision": "fp32"}}))
    yield made
    made.close()


# Agreement and precision


def test_alone_an_error_is_raised_as_it_is_and_counts_come_back(parallel: Parallel) -> None:
    assert parallel.agree(stop=True, counts=(2, 3)) == (True, [2, 3])
    with pytest.raises(KeyError), parallel.together():
        raise KeyError("mine")
    assert parallel.gather_objects("x") == ["x"]


@pytest.mark.parametrize(
    ("variables", "training", "message"),
    [
        ({}, {"expected_world_size": 4}, r"training.expected_world_size: got 1 process\(es\); allowed: 4"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "fp32"}, "precision"),
        ({"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed"),
    ],
)
def test_a_launch_that_contradicts_the_config_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], training: dict[str, Any], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = config_from_mapping({"training": {"device": "cpu", "precision": "fp32", **training}})
    with pytest.raises(UserError, match=message):
        start_parallel(config)


def test_a_world_of_one_under_a_launcher_of_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed on a CPU makes of it where the backend is not named."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^number of processes: got 1 where the launcher started 2"):
        check_world(1, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_named() -> None:
    with pytest.raises(UserError, match="^training.device: got 'cuda', but PyTorch finds no CUDA device"):
        start_parallel(config_from_mapping({"training": {"device": "cuda"}}))


@pytest.mark.parametrize(
    ("requested", "hardware", "expected"),
    [("auto", None, "fp32"), ("auto", "AMX", "bf16"), ("bf16", None, "bf16"), ("fp32", "AMX", "fp32")],
)
def test_auto_precision_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, requested: str, hardware: str | None, expected: str
) -> None:
    monkeypatch.setattr(precision, "bf16_hardware", lambda device: hardware)
    warnings: list[str] = []
    monkeypatch.setattr(precision.logger, "warning", lambda message, *values: warnings.append(message % values))
    chosen, reason = choose_precision(requested, torch.device("cpu"))
    assert chosen == expected and reason
    slow = requested == "bf16" and hardware is None
    assert [text for text in warnings if "no bf16 hardware" in text] == warnings and len(warnings) == slow
    assert ("slower than fp32" in reason) == slow


def test_a_steps_random_draws_depend_on_seed_step_and_rank_alone() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        torch.rand(step % 3)  # whatever was drawn before
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    keys = [(seed, step, rank) for seed in (0, 1) for step in (1, 2, 3) for rank in (0, 1)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len(set(draws)) == len(draws)


# Stage changes


TEMPORAL_EMBEDDING = "video_model.temporal_embed"


class FramesModel(nn.Module):
    """The part of a dual encoder that a stage change touches."""

    def __init__(self, max_frames: int, learned: int) -> None:
        super().__init__()
        self.video_model = nn.Module()
        self.video_model.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, 4))
        self.other = nn.Parameter(torch.ones(3))
        self.learned_frames = learned

    def frame_embeddings(self) -> list[str]:
        return [TEMPORAL_EMBEDDING]

    def expand_frames(self, num_frames: int, method: str) -> None:
        embed = self.video_model.temporal_embed
        with torch.no_grad():
            embed[:, :num_frames] = expand_temporal_embedding(embed[:, : self.learned_frames], num_frames, method)
        self.learned_frames = num_frames

    def forward(self, frames: int) -> Tensor:
        return (self.video_model.temporal_embed[:, :frames] * torch.arange(1.0, 5.0)).sum() ** 2 + self.other.sum()


def trained(parallel: Parallel, frames: int) -> FramesModel:
    """A model after two steps at so many frames, with room for eight."""
    model = FramesModel(8, frames)
    torch.manual_seed(0)
    nn.init.normal_(model.video_model.temporal_embed.data[:, :frames])
    config = config_from_mapping({}).optimizer
    parallel.prepare(model, build_optimizer(model, config))
    for _ in range(2):
        parallel.backward(parallel.forward(frames))
        parallel.update(0.0)
    return model


@pytest.mark.parametrize("method", ["zero", "nearest", "bilinear"])
def test_the_optimizers_state_takes_the_embeddings_map(parallel: Parallel, method: str) -> None:
    model = trained(parallel, 2)
    embed = model.video_model.temporal_embed
    before = embed.detach().clone()
    state = {key: value.clone() for key, value in parallel.state.optimizer_state()[TEMPORAL_EMBEDDING].items()}
    other = {key: value.clone() for key, value in parallel.state.optimizer_state()["other"].items()}
    assert state["exp_avg"][:, :2].abs().min() > 0 and not state["exp_avg"][:, 2:].any()
    expand_frames(parallel, model, 5, method)  # type: ignore[arg-type]
    after = parallel.state.optimizer_state()[TEMPORAL_EMBEDDING]
    assert torch.equal(embed[:, :5], expand_temporal_embedding(before[:, :2], 5, method))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][:, :5], expand_temporal_embedding(state[key][:, :2], 5, method))
        assert not after[key][:, 5:].any()
    assert torch.equal(after["step"], state["step"])
    assert all(torch.equal(parallel.state.optimizer_state()["other"][key], value) for key, value in other.items())
    parallel.backward(parallel.forward(5))
    parallel.update(0.0)
    assert model.learned_frames == 5 and bool(embed.isfinite().all())


@pytest.mark.parametrize("frames", [1, 4])
def test_frames_that_are_learned_already_are_not_destroyed(parallel: Parallel, frames: int) -> None:
    model = trained(parallel, 4)
    before = model.video_model.temporal_embed.detach().clone()
    state = {key: value.clone() for key, value in parallel.state.optimizer_state()[TEMPORAL_EMBEDDING].items()}
    expand_frames(parallel, model, frames, "bilinear")  # type: ignore[arg-type]
    assert model.learned_frames == 4 and torch.equal(model.video_model.temporal_embed, before)
    assert all(
        torch.equal(parallel.state.optimizer_state()[TEMPORAL_EMBEDDING][key], value) for key, value in state.items()
    )


def test_optimizer_state_goes_out_and_back_by_name(parallel: Parallel) -> None:
    model = trained(parallel, 2)
    saved = {
        name: {key: value.clone() for key, value in tensors.items()}
        for name, tensors in parallel.state.optimizer_state().items()
    }
    parallel.backward(parallel.forward(2))
    parallel.update(0.0)
    parallel.state.load_optimizer_state(saved)
    for name, tensors in parallel.state.optimizer_state().items():
        assert all(torch.equal(saved[name][key], value) for key, value in tensors.items())
    with pytest.raises(UserError, match="optimizer state for 'nobody'"):
        parallel.state.load_optimizer_state({"nobody": {}})
    with pytest.raises(UserError, match=r"exp_avg of shape \[2\] for other; allowed: \[3\]"):
        parallel.state.load_optimizer_state({"other": {"exp_avg": torch.zeros(2)}})
    assert model.learned_frames == 2


def test_warm_up_is_at_most_a_quarter_of_a_stage() -> None:
    assert [warm_up_steps(steps, 1) for steps in (1, 4, 8, 12, 1000)] == [0, 1, 2, 3, 3]
    assert warm_up_steps(1000, 2) == 6


def test_weights_that_overflow_a_norm_are_still_finite(parallel: Parallel) -> None:
    model = FramesModel(2, 1)
    parallel.prepare(model, build_optimizer(model, config_from_mapping({}).optimizer))
    model.other.data.fill_(3e30)
    assert parallel.state.weights_are_finite()
    model.other.data[1] = float("nan")
    assert not parallel.state.weights_are_finite()


# The journal


def journal(folder: RunFolder, parallel: Parallel, log_every_steps: int = 10, **training: Any) -> Journal:
    folder.create()
    policy = config_from_mapping({"training": training}).training
    return Journal(
        folder,
        parallel,
        Trackers(),
        total_steps=9,
        num_stages=2,
        log_every_steps=log_every_steps,
        non_finite=NonFiniteSteps(policy, folder, parallel, "lower it"),
    )


def record(made: Journal, meter: StageMeter, step: int, loss: float, norm: float = 0.5) -> None:
    with meter.step(warmup=step == 1) as timing:
        with timing.stall():
            pass
        timing.count(4, 2, None)
    result = StepResult(
        step=step,
        stage=0,
        frames=2,
        source="a",
        loss=torch.tensor(loss),
        gradient_norm=torch.tensor(norm),
        learning_rate=1e-3,
        bad_clips=1,
        clip_ids=[f"clip {step}"],
    )
    made.add(result, meter)


def test_on_a_cpu_a_row_is_there_when_its_step_is_over(parallel: Parallel, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    made, meter = journal(folder, parallel), StageMeter(stage=0, frames=2, batch_sizes={"a": 4})
    record(made, meter, 1, 2.5)
    record(made, meter, 2, 2.25, norm=3.0)
    first, second = read_json_lines(folder.steps)
    assert (first["loss"], first["gradient_norm"], first["warmup"], first["clips"]) == (2.5, 0.5, True, 4)
    assert (second["loss"], second["gradient_norm"], second["warmup"], second["bad_clips"]) == (2.25, 3.0, False, 1)


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (float("nan"), 1.0, r"^loss: got nan at step 3 \(stage 0, 2 frames, source a\); .*; lower it$"),
        (1.0, float("inf"), "^gradient norm: got inf at step 3 "),
    ],
)
def test_a_step_that_is_not_finite_ends_the_record_before_it(
    parallel: Parallel, tmp_path: Path, loss: float, norm: float, message: str
) -> None:
    folder = RunFolder(tmp_path)
    made, meter = journal(folder, parallel), StageMeter(stage=0, frames=2, batch_sizes={"a": 4})
    record(made, meter, 1, 2.5)
    record(made, meter, 2, 2.5)
    with pytest.raises(NotFiniteError, match=message):
        record(made, meter, 3, loss, norm)
    assert [row["step"] for row in read_json_lines(folder.steps)] == [1, 2]
    assert all(json.loads(line) for line in folder.steps.read_text(encoding="utf-8").splitlines())
    (row,) = read_json_lines(folder.non_finite)
    assert (row["step"], row["stage"], row["source"], row["action"]) == (3, 0, "a", "stop")
    assert (row["loss"], row["gradient_norm"], row["clip_ids"]) == (repr(loss), repr(norm), ["clip 3"])


def test_skipped_steps_are_recorded_until_there_are_too_many_in_a_row(parallel: Parallel, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    made = journal(folder, parallel, on_non_finite="skip", max_skips=2)
    meter = StageMeter(stage=0, frames=2, batch_sizes={"a": 4})
    nan = float("nan")
    for step, loss in enumerate((1.0, nan, nan, 1.0, nan, nan), start=1):
        record(made, meter, step, loss, nan if loss != loss else 2.0)
    rows = read_json_lines(folder.steps)
    assert [row["skipped"] for row in rows] == [False, True, True, False, True, True]
    assert [(row["loss"], row["gradient_norm"]) for row in rows[:2]] == [(1.0, 2.0), (None, None)]
    with pytest.raises(
        NotFiniteError, match=r"^loss: got nan at step 7 .*, after 2 skipped steps in a row .training.max"
    ):
        record(made, meter, 7, nan)
    assert [row["step"] for row in read_json_lines(folder.non_finite)] == [2, 3, 5, 6, 7]


def test_on_a_device_with_a_queue_rows_wait_for_their_window(parallel: Parallel, tmp_path: Path) -> None:
    """A window of three: nothing is read back before; flush() brings the rest."""
    folder = RunFolder(tmp_path)
    made, meter = journal(folder, parallel), StageMeter(stage=0, frames=2, batch_sizes={"a": 4})
    made._window = 3
    record(made, meter, 1, 1.0)
    record(made, meter, 2, 2.0)
    assert not folder.steps.exists()
    record(made, meter, 3, 3.0)
    record(made, meter, 4, 4.0)
    assert [row["loss"] for row in read_json_lines(folder.steps)] == [1.0, 2.0, 3.0]
    made.flush(meter)
    assert [row["loss"] for row in read_json_lines(folder.steps)] == [1.0, 2.0, 3.0, 4.0]


def test_without_a_terminal_there_are_plain_lines(
    parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(journal_module.log, "info", lambda message, *values: told.append(message % values))
    made = journal(RunFolder(tmp_path), parallel, log_every_steps=2)
    meter = StageMeter(stage=0, frames=2, batch_sizes={"a": 4})
    for step in range(1, 6):
        record(made, meter, step, 1.0)
    assert [line.split()[1] for line in told] == ["1/9", "2/9", "4/9"]


# Evaluation


class TableModel(RetrievalModel):
    """Encodes a window as its first pixel values and a caption as the row of a table; a model outside the tree."""

    tokenizer = None
    device = torch.device("cpu")

    def __init__(self, captions: dict[str, Tensor]) -> None:
        super().__init__()
        self.captions = captions
        self.modes: list[bool] = []

    def video_features(self, video: Any) -> Features:
        self.modes.append(self.training)
        return {"embedding": video[:, 0, 0, 0]}

    def text_features(self, text: Any) -> Features:
        return {"embedding": torch.stack([self.captions[caption] for caption in text])}

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        return similarity(text["embedding"], video["embedding"])[None]

    def architecture(self) -> dict[str, Any]:
        return {}

    def save_pretrained(self, folder: Any, state: Any = None) -> None:
        raise NotImplementedError


class WindowLoader:
    """Hands out windows that carry their embedding in the first row of pixels."""

    def __init__(self, batches: list[tuple[list[int], Tensor]], dropped: dict[int, BadClip]) -> None:
        self.dropped = dropped
        self._batches = batches
        self.clip_indices = sorted({index for indices, _ in batches for index in indices})
        self.closed = False

    def batches(self) -> Iterator[Any]:
        for indices, rows_ND in self._batches:
            windows = torch.zeros(len(indices), 2, 3, 4, rows_ND.shape[1])
            windows[:, 0, 0, 0] = rows_ND
            yield SimpleNamespace(windows=windows, clip_indices=indices)

    def close(self) -> None:
        self.closed = True


def evaluation(parallel: Parallel, protocol: str = "auto", mode: str = "all", stop: bool = False) -> tuple[Any, Any]:
    """Four clips: 0 has three windows over two batches, 2 cannot be read, 1 and 3 are twins, 3 has two captions."""
    torch.manual_seed(3)
    rows = torch.randn(6, 5)
    captions = {name: torch.randn(5) for name in ("a", "b", "c", "d", "d2", "d d2")}
    bad = BadClip("s", "k2", "k2.avi", "empty", "no bytes")
    loader = WindowLoader([([0, 0, 1], rows[:3]), ([0, 3], rows[3:5])], {2: bad})
    clips = [
        Clip("k0", "k0.avi", ("a",)),
        Clip("k1", "k1.avi", ("b",), twin="k3"),
        Clip("k2", "k2.avi", ("c",)),
        Clip("k3", "k3.avi", ("d", "d2"), twin="k1"),
    ]
    source = Source("s", "manifest", clips, "video", CaptionRule(mode, 0))  # type: ignore[arg-type]
    model = TableModel(captions)
    found = evaluate_source(
        model,
        source,
        loader,
        parallel,
        frames=2,
        protocol=protocol,
        batch_size=2,
        stop_asked=lambda: stop,  # type: ignore[arg-type]
    )
    assert loader.closed and model.training and not any(model.modes)
    video = torch.stack([(rows[0] + rows[1] + rows[3]) / 3, rows[2], rows[4]])
    return found, SimpleNamespace(video=video, captions=captions)


def test_window_embeddings_are_averaged_as_they_are_and_dropped_clips_leave_the_gallery(parallel: Parallel) -> None:
    found, given = evaluation(parallel)
    plain, second = found.rows
    text = torch.stack([given.captions[name] for name in ("a", "b", "d", "d2")])
    sim = similarity(text, given.video)
    expected = retrieval_metrics(sim, [0, 1, 2, 2])
    assert {name: plain["metrics"][name] for name in expected} == pytest.approx(expected)
    own_over_twin = [sim[1, 1] > sim[1, 2], sim[2, 2] > sim[2, 1], sim[3, 2] > sim[3, 1]]
    assert plain["metrics"]["twin_accuracy"] == pytest.approx(100 * sum(map(bool, own_over_twin)) / 3)
    assert (plain["protocol"], second["protocol"]) == ("several_captions", "v2t_max_over_captions")
    assert (plain["num_queries"], plain["num_videos"], plain["windows"], plain["bad_clips"]) == (4, 3, 5, 1)
    assert [bad.clip_id for bad in found.bad_clips] == ["k2"]


def test_the_validation_loss_is_the_training_loss_of_equal_batches() -> None:
    """Seven clips, the last with two captions, in batches of about three: 4 + 3, each clip once."""
    torch.manual_seed(5)
    video, text = torch.randn(7, 5), torch.randn(8, 5)
    video_of_query = [0, 1, 2, 3, 4, 5, 6, 6]
    model, loss = TableModel({}), InfoNCE(0.1)

    def over(batch_size: int) -> float:
        features = ({"embedding": text}, {"embedding": video})
        return validation_loss(model, loss, *features, video_of_query, batch_size)

    whole = over(7)
    assert whole == pytest.approx(float(contrastive_loss(video, text[:7], 0.1)), rel=1e-6)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    expected = (
        sum(len(part) * float(contrastive_loss(video[part], text[part], 0.1)) for part in (order[:4], order[4:])) / 7
    )
    assert over(3) == pytest.approx(expected, rel=1e-6) != whole
    assert over(100) == whole


@pytest.mark.parametrize(
    ("metric", "value", "best", "better"),
    [
        ("validation_loss", 5.0, None, True),
        ("validation_loss", 0.9, 1.0, True),
        ("validation_loss", 1.0, 1.0, False),
        ("validation_loss", float("nan"), 1.0, False),
        ("t2v/R@1", 9.0, 8.0, True),
        ("t2v/R@1", 8.0, 8.0, False),
        ("t2v/R@1", 7.0, 8.0, False),
        ("t2v/MdR", 7.0, 8.0, True),
        ("v2t/Geom", 7.0, 8.0, False),
    ],
)
def test_a_lower_loss_and_a_higher_recall_are_better(
    metric: str, value: float, best: float | None, better: bool
) -> None:
    row = {"loss": value, "metrics": {metric: value}}
    found = selection_value(metric, row)
    assert found is not None and is_better(metric, found, best, directions(["retrieval"])) is better
    assert selection_value("none", row) is None


def test_paragraphs_and_first_captions_are_protocols_of_their_own(parallel: Parallel) -> None:
    found, given = evaluation(parallel, mode="paragraph")
    (row,) = found.rows
    text = torch.stack([given.captions[name] for name in ("a", "b", "d d2")])
    expected = retrieval_metrics(similarity(text, given.video))
    assert row["protocol"] == "paragraph"
    assert {name: row["metrics"][name] for name in expected} == pytest.approx(expected)
    (row,) = evaluation(parallel, protocol="plain")[0].rows
    assert (row["protocol"], row["num_queries"]) == ("plain", 3)


@pytest.mark.parametrize("stop", [True, False])
def test_a_loader_that_ends_with_the_run_is_no_failure_of_the_evaluation(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    """A signal to the whole process group ends the loader processes, maybe in the middle of an evaluation."""

    def batches(self: WindowLoader) -> Iterator[Any]:
        raise LoaderEndedError("it ended")
        yield

    monkeypatch.setattr(WindowLoader, "batches", batches)
    monkeypatch.setattr(signals, "_SIGNAL_SPREAD_SECONDS", 0.1)
    if stop:
        assert evaluation(parallel, stop=True)[0] is None
    else:
        with pytest.raises(LoaderEndedError):
            evaluation(parallel)


def test_told_to_stop_there_is_no_result(parallel: Parallel) -> None:
    assert evaluation(parallel, stop=True)[0] is None
