"""Every file under configs/experts/: it loads, its model has the released number of parameters, its rows exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozen_fast.config import ExperimentConfig, check_for_training, load_config
from frozen_fast.config.extensions import models
from frozen_fast.evaluation.published import published_row

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "experts"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("_"))
SETS = ("msrvtt_full", "msrvtt_1kA", "msrvtt_1kB", "msvd", "lsmdc", "didemo", "activitynet")
COUNTS = {
    "msrvtt_full_ce": 183_448_607,
    "msrvtt_1kA_ce": 183_448_607,
    "msrvtt_full_ce_no_gating": 181_070_111,
    "msrvtt_full_ce_uniform": 183_448_607 - 193_545,
    "msrvtt_full_moee_uniform": 246_219_775,
    "msrvtt_full_moee": 400_410_129,
    "msrvtt_full_concat": 369_717,
    "msvd_ce": 84_043_645,
    "msvd_moee": 131_374_381,
    "didemo_ce": 79_285_025,
    "lsmdc_ce": 116_857_599,
    "activitynet_ce": 260_678_403,
    "msrvtt_full_ce_plus": 262_731_071,
    "msrvtt_full_teachtext": 262_731_071,
    "msvd_ce_plus": 87_791_645,
    "didemo_ce_plus": 99_513_997,
    "lsmdc_ce_plus": 388_242_661,
    "activitynet_ce_plus": 376_019_529,
}


def config_of(name: str) -> ExperimentConfig:
    return load_config(FOLDER / f"{name}.yaml")


def test_every_model_of_every_data_set_has_a_file() -> None:
    assert {f"{data}_{model}" for data in SETS for model in ("ce", "moee", "ce_plus", "teachtext")} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_builds_its_model(name: str) -> None:
    config = config_of(name)
    check_for_training(config)
    assert config.name == name and (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")
    if config.paper.table:
        published_row(config.paper.table, config.paper.row)
    with torch.device("meta"):
        model = models.load(config.model.kind).from_config(config.model)
    assert list(model.sizes.names) == sorted(model.sizes.names)
    if name in COUNTS:
        assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_settings_are_those_of_the_released_configs() -> None:
    config = config_of("msrvtt_full_ce")
    assert (config.optimizer.name, config.optimizer.betas, config.optimizer.eps) == ("ranger", (0.95, 0.999), 1e-5)
    assert config.optimizer.schedule == "epoch_decay" and config.optimizer.epoch_factor == 0.95
    assert config.loss.name == "max_margin" and config.evaluation.keep_best == "t2v/Geom"
    for name, batch, epochs, margin, rate, decay in (
        ("msrvtt_full_ce", 64, 100, 0.09381161988446174, 0.1, 1e-3),
        ("msvd_ce", 16, 300, 0.30764700456522676, 0.01, 5e-5),
        ("lsmdc_ce", 256, 15, 0.12132983763957966, 0.01, 1e-3),
        ("didemo_ce", 64, 30, 0.16642835966287484, 0.1, 1e-3),
        ("activitynet_ce", 32, 150, 0.060496613740311816, 0.1, 1e-3),
        ("msrvtt_full_moee", 64, 100, 0.12638433919050676, 0.1, 1e-3),
    ):
        config = config_of(name)
        stage = config.curriculum.stages[0]
        assert (stage.global_batch_size, config.curriculum.budget_epochs) == (batch, epochs)
        assert (config.loss.margin, config.optimizer.learning_rate) == (margin, rate)
        assert config.optimizer.weight_decay == decay
    assert config_of("didemo_ce").data.sources[0].captions == "paragraph"
    assert len(config_of("msvd_teachtext").distillation.teachers) == 3
    assert config_of("msvd_teachtext").optimizer.name == "radam"
