"""What a machine has for gpu_bench.py: GPU, packages, what is missing; and a text tower that needs no hub."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_json
from frozen_fast.sweep.outcome import telling_line
from frozen_fast.sweep.process import run_limited

LIMIT_SECONDS = 60.0
OPTIONAL_PACKAGES = {
    "xformers": "attention by xformers",
    "deepspeed": "ZeRO strategies",
    "nvidia.dali": "decoding by DALI",
    "av": "reading and rendering videos",
    "decord": "decoding by decord",
    "torchcodec": "decoding by torchcodec",
    "matplotlib": "plots",
}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def describe_machine(root: Path, log: Path) -> dict[str, Any]:
    """Ask a process of its own what is here, so that a broken installation is an answer and not the end.

    Returns:
        What _describe() says; {"failed": the line that tells most} where it could not be found out.
    """
    target = log.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).resolve()), str(target)]
    result = run_limited(command, folder=root, environment={}, log=log, seconds=LIMIT_SECONDS, memory_bytes=None)
    if result.exit_code != 0 or not target.is_file():
        return {"failed": telling_line(log.read_text(encoding="utf-8", errors="replace")) or "no answer in time"}
    return json.loads(target.read_text(encoding="utf-8"))


def _describe() -> dict[str, Any]:
    """Versions, devices, and why what is missing cannot be used."""
    import importlib.util

    import torch

    from frozen_fast.data.decode import unavailable_backends as missing_decoders
    from frozen_fast.records.environment import cpu_name, git_state, package_versions
    from frozen_kernels import unavailable_backends as missing_attention

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    absent = []
    for name in OPTIONAL_PACKAGES:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package around it is missing
            found = False
        if not found:
            absent.append(name)
    commit, dirty = git_state()
    return {
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "cuda_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        "driver": _nvidia_smi(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "absent": absent,
        "missing_attention": missing_attention(device, torch.bfloat16 if cuda else torch.float32),
        "missing_decoders": missing_decoders(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _nvidia_smi() -> str | None:
    """Driver, clocks and power limit in nvidia-smi's words; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def left_out(machine: dict[str, Any], *, reads_videos: bool) -> dict[str, str]:
    """What the results lack for want of a package, and why."""
    if "failed" in machine:
        return {"environment": machine["failed"]}
    missing = {name: f"not installed: no {OPTIONAL_PACKAGES[name]}" for name in machine["absent"]}
    missing.update({f"attention {name}": reason for name, reason in machine["missing_attention"].items()})
    missing.update({f"decoder {name}": reason for name, reason in machine["missing_decoders"].items()})
    if not reads_videos:
        missing["throughput with input"] = "no video encoder: the model alone was measured"
        missing["training on videos"] = "no video encoder: still pictures, one frame in every stage"
    return missing


def write_text_tower(folder: Path) -> Path:
    """Write a character tokenizer and the sizes of a tiny DistilBERT, so that nothing asks a hub.

    Where only the tokenizer is used (model.text.tokenizer), the tower keeps its own sizes.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = [*CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tower = {"model_type": "distilbert", "vocab_size": len(vocabulary), "dim": 32, "hidden_dim": 64, "n_layers": 2}
    write_json(folder / "config.json", {**tower, "n_heads": 2, "max_position_embeddings": 128})
    write_json(folder / "tokenizer_config.json", {"pad_token": "[PAD]", "model_max_length": 128})
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    write_json(parser.parse_args().target, _describe())
