"""Checks the settings of a launch (DeepSpeed, FSDP2, precision) against the experiment.

`accelerate launch` passes its settings in environment variables. Settings that the experiment also defines (batch
sizes, accumulation, clipping, precision) are filled in from the experiment. The launch may omit them, set them to
"auto" or repeat them. A contradiction is a UserError that names both places and both values.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frozen_fast.config import ExperimentConfig
from frozen_fast.config.schema import TrainingConfig
from frozen_fast.errors import UserError

Strategy = Literal["ddp", "deepspeed", "fsdp2"]

# Elements per bucket. DeepSpeed's default of 5e8 would need more memory than this model's gradients.
_BUCKET = 50_000_000
_ZERO_DEFAULTS: dict[str, Any] = {
    "contiguous_gradients": True,
    "overlap_comm": True,
    "reduce_bucket_size": _BUCKET,
    "allgather_bucket_size": _BUCKET,
    "stage3_prefetch_bucket_size": _BUCKET,
    "stage3_param_persistence_threshold": 100_000,
}
# Settings that only the experiment may define: section or key -> the experiment's key.
_FOREIGN = {
    "optimizer": "the experiment's optimizer section",
    "scheduler": "the experiment's optimizer.schedule and optimizer.warmup_steps",
    "fp16": "the experiment's training.precision",
    "bf16": "the experiment's training.precision",
    "amp": "the experiment's training.precision",
    "activation_checkpointing": "the experiment's model.video.checkpointed_blocks",
}


@dataclass(frozen=True)
class FsdpSettings:
    """The supported settings of Accelerate's fsdp_config.

    Attributes:
        reshard_after_forward: free gathered weights between the forward and the backward pass (less memory, one more
            gather).
    """

    reshard_after_forward: bool


def requested_strategy(environ: Mapping[str, str]) -> Strategy:
    """Return the strategy of the launch; "ddp" for a single process too.

    Raises:
        UserError: Accelerate would ignore DeepSpeed without a message.
    """
    if _flag(environ, "ACCELERATE_USE_DEEPSPEED"):
        if _flag(environ, "ACCELERATE_USE_CPU"):
            raise UserError(
                "accelerate config: use_cpu: got true (ACCELERATE_USE_CPU) beside distributed_type DEEPSPEED "
                "(ACCELERATE_USE_DEEPSPEED), and Accelerate then ignores DeepSpeed; allowed: use_cpu false "
                "(without a GPU, or with training.device=cpu, DeepSpeed itself runs on the CPU)"
            )
        if "LOCAL_RANK" not in environ:
            raise UserError(
                "ACCELERATE_USE_DEEPSPEED: got true without a launcher; allowed: accelerate launch --config_file ..."
            )
        return "deepspeed"
    return "fsdp2" if _flag(environ, "ACCELERATE_USE_FSDP") else "ddp"


def check_precision(environ: Mapping[str, str], training: TrainingConfig) -> None:
    """Check the launch's mixed precision against the experiment.

    Raises:
        UserError: naming both.
    """
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise UserError(
            f"accelerate config: mixed_precision: got {launched!r}; allowed: no, bf16 (training.precision decides)"
        )
    if launched == "bf16" and training.precision == "fp32":
        raise UserError(
            "training.precision: got 'fp32', but accelerate was launched with mixed_precision bf16; make them agree"
        )


def read_deepspeed(environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the launch's DeepSpeed settings: its JSON file, or the keys of Accelerate's deepspeed_config.

    Returns:
        (settings in DeepSpeed's own layout, the name of the place they come from).

    Raises:
        UserError: the JSON file cannot be read, or zero3_init_flag is on.
    """
    if _flag(environ, "ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        raise UserError(
            "accelerate config: deepspeed_config.zero3_init_flag: got true; allowed: false (every process builds the "
            "whole model, which takes 0.7 GB at the base size, and DeepSpeed partitions it afterwards)"
        )
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"deepspeed_config_file: got {path!r}, which cannot be read ({error})") from None
        if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
            raise UserError(f"deepspeed_config_file: got {path!r}; allowed: a JSON object with zero_optimization")
        return settings, f"DeepSpeed config {path}"
    zero: dict[str, Any] = {"stage": _number(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for key in ("offload_optimizer", "offload_param"):
        zero[key] = {"device": environ.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE", "none")}
    settings = {"zero_optimization": zero}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        text = environ.get(f"ACCELERATE_{key.upper()}", "none")
        if text != "none":
            settings[key] = _number(text)
    return settings, "accelerate config, deepspeed_config"


def deepspeed_settings(
    given: Mapping[str, Any], where: str, config: ExperimentConfig, *, world_size: int, precision: str
) -> dict[str, Any]:
    """Return DeepSpeed's whole configuration: the launch's settings, completed from the experiment.

    Args:
        given: settings in DeepSpeed's layout; "auto" counts as omitted.
        where: the place they come from, for messages.
        config: the experiment.
        world_size: number of processes.
        precision: "bf16" (DeepSpeed's torch_autocast over fp32 weights, gradients exchanged in fp32) or "fp32".

    Returns:
        A configuration without "auto".

    Raises:
        UserError: a setting contradicts the experiment (the message names both places), or is not supported.
    """
    settings = _without_auto(copy.deepcopy(dict(given)))
    for section, owner in _FOREIGN.items():
        value = settings.pop(section, None)
        on = value.get("enabled", section not in ("fp16", "bf16", "amp")) if isinstance(value, dict) else value
        if on:
            raise UserError(f"{where}: {section}: got {json.dumps(value)}; allowed: nothing, {owner} decides")
    _check_zero(settings["zero_optimization"], where)
    _check_autocast(settings.get("torch_autocast", {}), where, precision)
    accumulation = config.curriculum.gradient_accumulation_steps
    key = "gradient_accumulation_steps"
    _same(settings, key, accumulation, where, f"curriculum.{key}")
    norm = config.optimizer.gradient_clip_norm
    _same(settings, "gradient_clipping", norm, where, "optimizer.gradient_clip_norm")
    micro = _check_batches(settings, config, where, world_size, accumulation)
    zero = settings["zero_optimization"]
    settings["zero_optimization"] = {**_ZERO_DEFAULTS, **zero}
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # use PyTorch's AdamW on the CPU, without compilation
    settings["torch_autocast"] = {
        "lower_precision_safe_modules": [],
        **settings.get("torch_autocast", {}),
        "enabled": precision == "bf16",
        "dtype": "bfloat16",
    }
    return {
        **settings,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": norm,  # DeepSpeed through Accelerate clips at 1.0 by default
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * accumulation * world_size,
    }


def fsdp_settings(environ: Mapping[str, str]) -> FsdpSettings:
    """Read Accelerate's fsdp_config.

    Raises:
        UserError: FSDP 1, or a setting that would be ignored.
    """
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise _fsdp_error("version", version, "2")
    if _flag(environ, "FSDP_OFFLOAD_PARAMS"):
        raise _fsdp_error("offload_params", "true", "false (configs/accelerate/gpu_8_zero3_offload.yaml offloads)")
    if _flag(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise _fsdp_error("activation_checkpointing", "true", "false (model.video.checkpointed_blocks decides)")
    if _flag(environ, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise _fsdp_error("cpu_ram_efficient_loading", "true", "false (every process builds the whole model)")
    for key in ("AUTO_WRAP_POLICY", "TRANSFORMER_CLS_TO_WRAP", "IGNORED_MODULES"):
        value = environ.get(f"FSDP_{key}")
        if value not in (None, "None"):
            raise _fsdp_error(key.lower(), value, "nothing (each block of either tower is sharded on its own)")
    reshard = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")
    if reshard not in ("true", "false"):
        raise _fsdp_error("reshard_after_forward", reshard, "true, false")
    return FsdpSettings(reshard_after_forward=reshard == "true")


def clips_per_pass(config: ExperimentConfig) -> dict[str, int]:
    """Return the clips of one forward pass over all ranks for every stage and training source, by config key."""
    sizes: dict[str, int] = {}
    for index, stage in enumerate(config.curriculum.stages):
        own = dict(stage.batch_sizes)
        names = [source.name or source.format for source in config.data.sources if source.weight > 0]
        for name in names:
            if name in own:
                sizes[f"curriculum.stages[{index}].batch_sizes.{name}"] = own[name]
        if not names or any(name not in own for name in names):
            sizes[f"curriculum.stages[{index}].global_batch_size"] = stage.global_batch_size
    return sizes


def _check_zero(zero: dict[str, Any], where: str) -> None:
    """Check the stage and offloading."""
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        raise UserError(
            f"{where}: zero_optimization.stage: got {stage!r}; allowed: 1, 2, 3 (for 0 use gpu_8.yaml: plain DDP)"
        )
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"{where}: zero_optimization.{key}.device: got {device!r}; allowed: none, cpu")
        if device == "none":
            zero.pop(key, None)
        else:
            zero[key].setdefault("pin_memory", True)
    if "offload_param" in zero and stage != 3:
        raise UserError(f"{where}: zero_optimization.offload_param: got stage {stage}; allowed: stage 3 only")


def _check_autocast(section: Mapping[str, Any], where: str, precision: str) -> None:
    wanted = {"enabled": precision == "bf16", "dtype": "bfloat16"}
    for key, value in wanted.items():
        if key in section and section[key] != value:
            raise UserError(
                f"{where}: torch_autocast.{key}: got {json.dumps(section[key])}, but the experiment's "
                f"training.precision is {precision}; allowed: {json.dumps(value)}, or nothing"
            )


def _check_batches(
    settings: Mapping[str, Any], config: ExperimentConfig, where: str, world_size: int, accumulation: int
) -> int:
    """Set the clips per forward pass on one rank, which DeepSpeed requires. Training steps do not depend on it."""
    sizes = clips_per_pass(config)
    for key, factor in (("train_micro_batch_size_per_gpu", 1), ("train_batch_size", accumulation * world_size)):
        if key not in settings:
            continue
        for place, clips in sizes.items():
            expected = clips / world_size * factor
            if settings[key] != expected:
                passes = f" and {accumulation} passes a step" if accumulation > 1 and factor > 1 else ""
                raise UserError(
                    f"{where}: {key}: got {settings[key]}, but {place} is {clips}, over {world_size} process(es)"
                    f"{passes} {expected:g}; make them agree, or leave {key} out"
                )
    return max(1, next(iter(sizes.values())) // world_size)


def _same(settings: Mapping[str, Any], key: str, wanted: float, where: str, place: str) -> None:
    if key in settings and settings[key] != wanted:
        raise UserError(
            f"{where}: {key}: got {settings[key]}, but the experiment's {place} is {wanted:g}; make them agree, or "
            f"leave {key} out"
        )


def _fsdp_error(key: str, got: str, allowed: str) -> UserError:
    return UserError(f"accelerate config, fsdp_config.fsdp_{key}: got {got}; allowed: {allowed}")


def _without_auto(value: Any) -> Any:
    """Return the tree without values that are "auto"."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item not in ("auto", None)}
    return value


def _number(text: str) -> Any:
    """Parse an integer or a float; other text is returned unchanged, for a check to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes")
