"""Exports both towers of a dual encoder as ONNX or torch.export programs, which run without this library.

Axis letters: B batch, T frames, R resolution, L text tokens, D width.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from frozen_fast.common.files import write_json
from frozen_fast.config.schema import ModelConfig, VideoTowerConfig
from frozen_fast.errors import UserError, reason
from frozen_fast.models import DualEncoder

log = logging.getLogger(__name__)

FORMATS = ("onnx", "torch")
OPSET = 20
MOST_CLIPS = 65_536
MOST_TOKENS = 4096
"""Of text towers that take any number."""
PORTABLE = ModelConfig(video=VideoTowerConfig(attention="reference", fused_ops="plain"))
"""Forms of the video tower's operations that exporters know."""

SETTINGS_FILE = "export.json"


class VideoProgram(nn.Module):
    """video [B, T, 3, R, R], normalised -> embedding [B, D] of L2 norm 1."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        """Embed clips."""
        return self.model.encode_video(video)


class TextProgram(nn.Module):
    """input_ids and attention_mask [B, L] -> embedding [B, D] of L2 norm 1."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions."""
        return self.model.encode_text({"input_ids": input_ids, "attention_mask": attention_mask})


def export_towers(
    checkpoint: str | Path, output: Path, *, frames: int | None = None, expansion: str = "zero", format: str = "onnx"
) -> list[Path]:
    """Write a video and a text program; the batch size is dynamic, the number of frames fixed.

    Args:
        checkpoint: a folder, a released file, or ORG/NAME on the Hub.
        output: folder; also gets the tokenizer and export.json (resolution, frames, mean and std of the pixels).
        frames: T; None: as many as the checkpoint learned.
        expansion: expansion of the temporal embeddings to more frames.
        format: "onnx" or "torch" (torch.export's .pt2).

    Returns:
        The two programs' files.

    Raises:
        UserError: an unknown format, onnxscript is missing, or the checkpoint cannot be read or exported.
    """
    if format not in FORMATS:
        raise UserError(f"--format: got {format!r}; allowed: {', '.join(FORMATS)}")
    model = DualEncoder.from_pretrained(checkpoint, frames, expansion, config=PORTABLE)
    side = model.resolution
    video = torch.zeros(2, model.learned_frames, 3, side, side)
    # Two tensors, one of them with padding: a shared or a full mask would become part of the program.
    tokens, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = torch.export.Dim("batch", min=1, max=MOST_CLIPS)
    length = torch.export.Dim("tokens", min=2, max=model.text_model.max_positions or MOST_TOKENS)
    suffix = ".onnx" if format == "onnx" else ".pt2"
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{tower}{suffix}" for tower in ("video", "text")]
    try:
        with torch.no_grad():
            programs = [
                torch.export.export(VideoProgram(model), (video,), dynamic_shapes=({0: batch},)),
                torch.export.export(
                    TextProgram(model), (tokens, mask), dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length})
                ),
            ]
        for program, path in zip(programs, paths, strict=True):
            _save(program, path, format)
    except ImportError as error:
        raise UserError(
            f"--format: got onnx, but {error.name} is missing; install it: pip install -e '.[export]'"
        ) from None
    except RuntimeError as error:  # torch.export's and the ONNX exporter's errors
        raise UserError(f"checkpoint: got {checkpoint}, which cannot be exported ({reason(error)})") from error
    if model.tokenizer is not None:
        model.tokenizer.save(output)
    settings = {
        "frames": model.learned_frames,
        "resolution": side,
        "mean": list(model.mean),
        "std": list(model.std),
        "width": model.embedding_width,
        "max_tokens": model.architecture()["text"]["max_tokens"],
    }
    write_json(output / SETTINGS_FILE, settings)
    return paths


def _save(program: torch.export.ExportedProgram, path: Path, format: str) -> None:
    if format == "torch":
        torch.export.save(program, path)
        return
    output = f"{path.stem}_embedding"  # PyTorch 2.15 names a value inside the text program "embedding"
    exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, output_names=[output])
    assert exported is not None
    exported.save(path)
