"""What a launch says beside the experiment: filled in, repeated or contradicted, never both in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.config.schema import TrainingConfig
from frozen_fast.errors import UserError
from frozen_fast.parallel import deepspeed
from frozen_fast.parallel.launch_settings import (
    check_precision,
    clips_per_pass,
    deepspeed_settings,
    fsdp_settings,
    read_deepspeed,
    requested_strategy,
)
from frozen_fast.parallel.start import check_gpus_are_there

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}
ZERO_2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def experiment(batch_sizes: tuple[int, int] = (16, 16), **optimizer: Any) -> ExperimentConfig:
    """Two stages, three passes a step, clipping at 0.5."""
    return config_from_mapping(
        {
            "data": {"sources": [{"name": "videos", "path": "a"}, {"name": "stills", "path": "b"}]},
            "curriculum": {
                "stages": [{"global_batch_size": size, "steps": 4, "frames": 1} for size in batch_sizes],
                "gradient_accumulation_steps": 3,
            },
            "optimizer": {"gradient_clip_norm": 0.5, **optimizer},
        }
    )


def settings(given: dict[str, Any], precision: str = "fp32", config: ExperimentConfig | None = None) -> dict[str, Any]:
    return deepspeed_settings(
        given, "DeepSpeed config z.json", config or experiment(), world_size=2, precision=precision
    )


def test_the_experiment_fills_what_the_launch_leaves_out() -> None:
    automatic = dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"),
        "auto",
    )
    for given in (ZERO_2, {**ZERO_2, **automatic, "bf16": {"enabled": "auto"}}):
        filled = settings(given)
        assert filled["gradient_accumulation_steps"] == 3
        assert filled["gradient_clipping"] == 0.5
        assert (filled["train_micro_batch_size_per_gpu"], filled["train_batch_size"]) == (8, 48)
        assert filled["torch_autocast"]["enabled"] is False
        assert '"auto"' not in json.dumps(filled) and "bf16" not in filled
    assert settings(ZERO_2, "bf16")["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }


def test_no_clipping_is_written_down_since_silence_means_one() -> None:
    assert settings(ZERO_2, config=experiment(gradient_clip_norm=0.0))["gradient_clipping"] == 0.0


def test_what_the_launch_repeats_is_taken() -> None:
    repeated = {"gradient_accumulation_steps": 3, "gradient_clipping": 0.5, "train_batch_size": 48}
    assert settings({**ZERO_2, **repeated, "train_micro_batch_size_per_gpu": 8}) == settings(ZERO_2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"gradient_accumulation_steps": 2},
            r"z\.json: gradient_accumulation_steps: got 2, but the experiment's curriculum.* is 3",
        ),
        ({"gradient_clipping": 1.0}, r"z\.json: gradient_clipping: got 1.0, .*optimizer.gradient_clip_norm is 0.5"),
        (
            {"train_micro_batch_size_per_gpu": 16},
            r"per_gpu: got 16, but curriculum.stages\[0\].global_batch_size is 16, over 2 process\(es\) 8",
        ),
        ({"train_batch_size": 32}, r"train_batch_size: got 32, .* is 16, over 2 process\(es\) and 3 passes a step 48"),
        ({"bf16": {"enabled": True}}, r"bf16: got .*true.*; allowed: nothing, .*training.precision decides"),
        ({"fp16": {"enabled": True}}, r"fp16: got .*training.precision decides"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast.enabled: got true, .*training.precision is fp32"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer: got .*; allowed: nothing, the experiment's optimizer section"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: got .*optimizer.schedule"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage: got 0; allowed: 1, 2, 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            r"offload_param: got stage 2; allowed: stage 3 only",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer.device: got 'nvme'; allowed: none, cpu",
        ),
    ],
)
def test_a_contradiction_names_both_places(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings({**ZERO_2, **given})


def test_a_batch_size_must_hold_in_every_stage() -> None:
    given = {**ZERO_2, "train_micro_batch_size_per_gpu": 8}
    with pytest.raises(UserError, match=r"got 8, but curriculum.stages\[1\].global_batch_size is 4, .* 2; make them"):
        settings(given, config=experiment((16, 4)))


def test_clips_per_pass_knows_which_sizes_are_used() -> None:
    config = config_from_mapping(
        {
            "data": {"sources": [{"name": "videos", "path": "a"}, {"name": "stills", "path": "b"}]},
            "curriculum": {
                "stages": [
                    {"steps": 1, "batch_sizes": {"videos": 4, "stills": 8}},
                    {"steps": 1, "batch_sizes": {"videos": 2}, "global_batch_size": 6},
                ]
            },
        }
    )
    assert clips_per_pass(config) == {
        "curriculum.stages[0].batch_sizes.videos": 4,
        "curriculum.stages[0].batch_sizes.stills": 8,
        "curriculum.stages[1].batch_sizes.videos": 2,
        "curriculum.stages[1].global_batch_size": 6,
    }


def test_use_cpu_beside_deepspeed_is_refused() -> None:
    with pytest.raises(UserError, match="use_cpu: got true .ACCELERATE_USE_CPU. .*ACCELERATE_USE_DEEPSPEED"):
        requested_strategy({**LAUNCHED, "ACCELERATE_USE_CPU": "True"})
    with pytest.raises(UserError, match="ACCELERATE_USE_DEEPSPEED: got true without a launcher"):
        requested_strategy({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert requested_strategy({**LAUNCHED, "ACCELERATE_USE_CPU": "false"}) == "deepspeed"
    assert requested_strategy({"ACCELERATE_USE_FSDP": "true"}) == "fsdp2"
    assert requested_strategy({}) == "ddp"


def test_precision_of_the_launch() -> None:
    check_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, TrainingConfig(precision="auto"))
    with pytest.raises(UserError, match="training.precision: got 'fp32', but accelerate .* bf16; make them agree"):
        check_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, TrainingConfig(precision="fp32"))
    with pytest.raises(UserError, match="mixed_precision: got 'fp16'; allowed: no, bf16"):
        check_precision({"ACCELERATE_MIXED_PRECISION": "fp16"}, TrainingConfig())


def test_keys_of_an_accelerate_file_arrive() -> None:
    given, where = read_deepspeed(
        {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_GRADIENT_CLIPPING": "0.25",
        }
    )
    assert given["zero_optimization"]["stage"] == 3
    assert (given["gradient_accumulation_steps"], given["gradient_clipping"]) == (4, 0.25)
    assert where == "accelerate config, deepspeed_config"
    with pytest.raises(UserError, match="zero3_init_flag: got true; allowed: false"):
        read_deepspeed({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"})


def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    for name, message in (
        ("absent.json", "absent.json', which cannot be read"),
        ("list.json", "with zero_optimization"),
    ):
        with pytest.raises(UserError, match=message):
            read_deepspeed({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("VERSION", "1", "fsdp_version: got 1; allowed: 2"),
        ("OFFLOAD_PARAMS", "true", "fsdp_offload_params: got true"),
        ("ACTIVATION_CHECKPOINTING", "true", "allowed: false .model.video.checkpointed_blocks decides"),
        ("CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: got true"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy: got SIZE_BASED_WRAP"),
        ("RESHARD_AFTER_FORWARD", "FULL_SHARD", "got FULL_SHARD; allowed: true, false"),
    ],
)
def test_fsdp_settings_without_a_meaning_are_refused(key: str, value: str, message: str) -> None:
    environ = {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert not fsdp_settings(environ).reshard_after_forward
    with pytest.raises(UserError, match=message):
        fsdp_settings({**environ, f"FSDP_{key}": value})


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_two_kinds_of_deepspeed_files_mean_the_same(name: str) -> None:
    """configs/deepspeed/NAME.json and the keys of configs/accelerate/gpu_8_NAME.yaml."""
    values = yaml.safe_load((CONFIGS / "accelerate" / f"gpu_8_{name}.yaml").read_text(encoding="utf-8"))
    keys = values["deepspeed_config"]
    environ = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(keys["zero_stage"])}
    for part in ("optimizer", "param"):
        environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE"] = keys[f"offload_{part}_device"]
    path = CONFIGS / "deepspeed" / f"{name}.json"
    from_file, _ = read_deepspeed({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    filled = settings(read_deepspeed(environ)[0])
    assert {**filled["zero_optimization"], **settings(from_file)["zero_optimization"]} == filled["zero_optimization"]
    assert settings(from_file).keys() == filled.keys()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_names_of_accelerate_files_say_what_they_start(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    place, _, strategy = path.stem.partition("_zero") if "_zero" in path.stem else path.stem.partition("_fsdp2")
    processes = {"cpu": 1, "cpu_2": 2, "gpu_1": 1, "gpu_8": 8, "gpu_2x8": 16}[place]
    assert values["num_processes"] == processes
    assert values["num_machines"] == (2 if place == "gpu_2x8" else 1)
    assert values["mixed_precision"] == "no"
    if "_zero" in path.stem:
        given = values["deepspeed_config"]
        assert values["distributed_type"] == "DEEPSPEED" and values["use_cpu"] is False
        assert given["zero_stage"] == int(strategy[0]) and given["zero3_init_flag"] is False
        offload = strategy.endswith("_offload")
        assert given["offload_optimizer_device"] == ("cpu" if offload else "none")
        assert given["offload_param_device"] == ("cpu" if offload and given["zero_stage"] == 3 else "none")
    elif "_fsdp2" in path.stem:
        assert values["distributed_type"] == "FSDP"
        environ = {f"{key.upper()}": str(value).lower() for key, value in values["fsdp_config"].items()}
        assert fsdp_settings(environ).reshard_after_forward
    else:
        assert values["distributed_type"] == ("MULTI_GPU" if processes > 1 else "NO")


@pytest.mark.parametrize(
    ("stage", "section", "message"),
    [
        ("2", {}, "got DeepSpeed, which is not installed .pip install 'frozen-fast.deepspeed"),
        ("3", {"training": {"compile": True}}, "training.compile: got true with ZeRO stage 3; allowed: false"),
        (
            "3",
            {"model": {"video": {"skip_time_attention_at_one_frame": True}}},
            "skip_time_attention_at_one_frame: got true with ZeRO stage 3",
        ),
    ],
)
def test_what_deepspeed_cannot_do_here(
    monkeypatch: pytest.MonkeyPatch, stage: str, section: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with pytest.raises(UserError, match=message):
        deepspeed.DeepSpeedParallel.accelerator_for(config_from_mapping(section), True, "fp32")


def test_a_config_for_gpus_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/accelerate/gpu_8.yaml would train on eight CPU processes."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpus = {"ACCELERATE_USE_CPU": "False", "WORLD_SIZE": "8"}
    with pytest.raises(UserError, match="use_cpu false and 8 processes, .*; allowed: configs/accelerate/cpu_2.yaml"):
        check_gpus_are_there(gpus, "auto", "ddp")
    check_gpus_are_there(gpus, "cpu", "ddp")
    check_gpus_are_there({**gpus, "ACCELERATE_USE_CPU": "true"}, "auto", "ddp")
    check_gpus_are_there({**gpus, "WORLD_SIZE": "1"}, "auto", "ddp")
    check_gpus_are_there({}, "auto", "ddp")
