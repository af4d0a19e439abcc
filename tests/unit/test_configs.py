"""Every file under configs/: it loads, reads its data layout, its stages add up, its model builds at a tiny size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from frozen_fast.config import (
    ExperimentConfig,
    check_for_evaluation,
    check_for_training,
    load_config,
    resolve_stages,
    source_name,
)
from frozen_fast.data.sources import Source, karpathy
from frozen_fast.evaluation.published import published_row, row_names, table_names
from frozen_fast.models.classifier import Classifier
from frozen_fast.profiling.paper import table_4
from frozen_fast.training.parts import build_model, read_evaluation_sources, read_training_sources
from support.config_data import CONFIGS, experiments, small_video_tower, with_data, write_data
from support.towers import make_text_tower

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = experiments()
ACCELERATE = sorted(path.name for path in (CONFIGS / "accelerate").glob("*.yaml"))
FRAMES_TO_BATCH = {1: 96, 4: 24, 8: 16}
CLIPS = 240


def config_of(name: str, *overrides: str) -> ExperimentConfig:
    return load_config(CONFIGS / name, overrides)


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_tower(tmp_path_factory.mktemp("tower"), layers=6)  # as many as a config may freeze


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets that the configs name, in their own layouts, with files that are no clips."""
    root = tmp_path_factory.mktemp("data")
    write_data(root, EXPERIMENTS, CLIPS)
    return root


def test_the_expected_files_are_there() -> None:
    assert {f"pretrain/webvid_{row}.yaml" for row in ("1", "4", "1_4", "8", "1_4_8")} <= set(EXPERIMENTS)
    assert {"pretrain/cc3m_webvid.yaml", "finetune/msrvtt_1kA.yaml"} <= set(EXPERIMENTS)
    assert {f"eval/msrvtt_{cut}.yaml" for cut in ("1kA", "1kB", "full")} <= set(EXPERIMENTS)
    assert {"cpu.yaml", "cpu_2.yaml", "gpu_1.yaml", "gpu_8.yaml"} <= set(ACCELERATE)


NAMES_EIGHT_BLOCKS = ("finetune/own_clips_pretrained.yaml",)  # in its groups; the small tower has two


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads_and_builds(name: str, text_tower: Path) -> None:
    config = config_of(
        name,
        "model.checkpoint=null",
        *(f"model.video.{key}={value}" for key, value in small_video_tower(config_of(name)).items()),
        "model.video.weights=none",
        f"model.text.name={text_tower}",
        "model.text.weights=random",
        "model.text.max_tokens=16",
        "training.device=cpu",
        *(["optimizer.groups=[]"] if name in NAMES_EIGHT_BLOCKS else []),
    )
    if config.model.kind == Classifier.kind:
        sources = {"clips": Source("clips", "manifest", [], classes=("falls", "rises"))}
        config = replace(config, classification=replace(config.classification, head="random"))
        classifier = build_model(config, torch.device("cpu"), sources=sources)
        clips = torch.rand(2, config.curriculum.stages[-1].frames, 3, 32, 32)
        assert classifier.video_features(clips)["logits"].shape == (2, 2)
        return
    model = build_model(config, torch.device("cpu"))
    text = model.text_model.tokenize(["a dog runs", "a cat"])
    for stage in config.curriculum.stages:
        if stage.frames > model.learned_frames:
            model.expand_frames(stage.frames, config.model.expansion)
        captions, clips, _ = model(torch.rand(2, stage.frames, 3, 32, 32), text)
        video_BD, text_BD = clips["embedding"], captions["embedding"]
        assert video_BD.shape == text_BD.shape == (2, config.model.embedding_width)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_is_and_has_its_own_name(name: str) -> None:
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "name" in yaml.safe_load(text), "without a name of its own it would write into another's run folder"
    config = config_of(name)
    if name.startswith("eval/"):
        check_for_evaluation(config)
    else:
        check_for_training(config)
    names = [config_of(other).name for other in EXPERIMENTS]
    assert names.count(config.name) == 1


OTHER_FRAMES = {("Table A.2", "S3D-G")}  # torchvision's S3D takes no fewer than 8
OWN_MODELS = ("CLIP2Video", "Collaborative Experts", "TeachText")  # other models, with configs of their own


def test_every_row_of_the_paper_has_a_config() -> None:
    """Each row of each table is followed by a file, and what follows a row has its frames."""
    followed: dict[tuple[str, str], list[str]] = {}
    for name in EXPERIMENTS:
        config = config_of(name)
        if not config.paper.table:
            continue
        row = published_row(config.paper.table, config.paper.row)
        followed.setdefault((row.table, row.name), []).append(name)
        frames = config.evaluation.frames or config.curriculum.stages[-1].frames
        if name.startswith("eval/") and config.evaluation.frames is None:
            continue  # as many as the checkpoint has learned
        if (row.table, row.name) in OTHER_FRAMES:
            continue
        assert row.frames in (None, frames), f"{name}: {frames} frames, the row has {row.frames}"
    for table in table_names():
        if table not in OWN_MODELS:
            assert {(table, row) for row in row_names(table)} <= followed.keys(), table
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for names in followed.values():
        for name in names:
            assert name in readme, f"configs/README.md does not name {name}"


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "/" in name])
def test_sources_are_read_from_their_layouts_and_stages_resolve(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(karpathy, "FOLD", CLIPS // 5)
    config = with_data(name, data)
    evaluated = read_evaluation_sources(config)
    assert evaluated and all(source.clips for source in evaluated.values())
    if name.startswith("eval/"):
        return
    sources = read_training_sources(config)
    sizes = {name: len(source.clips) for name, source in sources.items()}
    assert list(sizes) == [source_name(source) for source in config.data.sources] and min(sizes.values()) >= 96
    for world_size in (1, 2, 8):
        plans = resolve_stages(config, sizes, world_size)
        assert len(plans) == len(config.curriculum.stages)


@pytest.mark.parametrize("name", [f"pretrain/webvid_{row}.yaml" for row in ("1", "4", "1_4", "8", "1_4_8")])
def test_a_row_of_table_4_follows_the_paper(name: str) -> None:
    config = config_of(name)
    stages = config.curriculum.stages
    assert config.paper_row == "=>".join(str(stage.frames) for stage in stages)
    assert config.curriculum.budget_epochs == 1 and config.optimizer.learning_rate == 1e-5
    assert config.optimizer.weight_decay == 0 and config.loss.temperature == 0.05
    assert [stage.global_batch_size for stage in stages] == [FRAMES_TO_BATCH[stage.frames] for stage in stages]
    table = table_4()
    hours = 0.0
    for stage in stages:
        speed = table.hours_per_million_clips(stage.frames)
        assert stage.share is not None and speed is not None
        hours += stage.share * table.clips / 1e6 * speed
    assert hours == pytest.approx(table.row(config.paper_row).ptt_hours, abs=0.1), "the shares imply the printed hours"


def test_images_and_videos_take_turns() -> None:
    config = config_of("pretrain/cc3m_webvid.yaml")
    assert {source.format for source in config.data.sources} == {"webvid", "cc3m"}
    for stage in config.curriculum.stages:
        sizes = dict(stage.batch_sizes)
        assert sizes["webvid"] == FRAMES_TO_BATCH[stage.frames] and sizes["cc3m"] == 96


def test_own_clips_take_as_many_steps_whatever_their_number() -> None:
    config = config_of("finetune/own_clips.yaml")
    steps = [
        [plan.steps for plan in resolve_stages(config, {"own": clips}, world_size=1)] for clips in (150, 355, 1000)
    ]
    assert steps == [[169, 112]] * 3, "docs/finetuning.md gives figures of these steps"


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_files_are_accelerates_own(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = CONFIGS / "accelerate" / name
    assert path.read_text(encoding="utf-8").startswith("# ")
    loaded = load_config_from_file(str(path))
    assert loaded.num_machines >= 1 and loaded.num_processes % loaded.num_machines == 0
    assert loaded.mixed_precision in ("no", "bf16")


@pytest.mark.parametrize(
    ("name", "processes", "cpu"), [("cpu", 1, True), ("cpu_2", 2, True), ("gpu_1", 1, False), ("gpu_8", 8, False)]
)
def test_accelerate_files_start_what_their_names_say(name: str, processes: int, cpu: bool) -> None:
    values = yaml.safe_load((CONFIGS / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert (values["num_processes"], values["use_cpu"]) == (processes, cpu)
    # The only type for which Accelerate's launcher starts several local processes.
    assert (values["distributed_type"] == "MULTI_GPU") == (processes > 1)
