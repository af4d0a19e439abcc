"""Initial ViT weights for the video tower, by timm name or from a local file.

They initialise patch_embed, cls_token, pos_embed, the blocks' attn, mlp, norm1 and norm2, and norm (section 3.2 of the
paper). Time attention and its norm3 keep their initial values.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from frozen_fast.config.video_sizes import VideoSize
from frozen_fast.errors import UserError, reason, some
from frozen_fast.models.video.onnx_vit import PACKAGE_PREFIX, onnx_vit_state, package_file
from frozen_fast.models.video.weight_files import FIELD, read_state_dict

TIMM_PREFIX = "timm:"
OWN_PARTS = ("temporal_embed",)
"""Parameters that a ViT does not have."""

OWN_BLOCK_PARTS = ("timeattn.", "norm3.")
"""Parts of a block that a ViT does not have."""

HEAD_PREFIXES = ("head.", "head_dist.", "pre_logits.", "fc_norm.")
"""Parts of a ViT file that the tower does not use."""


def load_vit_weights(model: nn.Module, weights: str) -> None:
    """Copy ViT weights into a space-time transformer.

    Args:
        model: a SpaceTimeTransformer, changed in place.
        weights: timm:NAME; a local .pth, .pt, .bin, .safetensors or .npz (the original JAX files, read by timm); a
            local .onnx of DINOv2's form, or package:MODULE/FILE.onnx inside an installed package.

    Raises:
        UserError: naming model.video.weights, if they cannot be read, or a weight is missing or has another shape.
    """
    if weights.startswith(TIMM_PREFIX):
        state = _timm_state(weights[len(TIMM_PREFIX) :])
    elif weights.startswith(PACKAGE_PREFIX) or weights.endswith(".onnx"):
        path = package_file(weights) if weights.startswith(PACKAGE_PREFIX) else Path(weights).expanduser()
        state = onnx_vit_state(path, cast(VideoSize, model.size).patches_per_frame)
    else:
        state = _file_state(weights, model)
    wanted = {name: value for name, value in model.state_dict().items() if not _is_own(name)}
    missing = set(wanted) - set(state)
    if missing:
        raise UserError(f"{FIELD}: got {weights!r}, which lacks {some(missing)}")
    unknown = [name for name in state if name not in wanted and not name.startswith(HEAD_PREFIXES)]
    if unknown:
        raise UserError(f"{FIELD}: got {weights!r}, with {some(unknown)}; allowed: a plain ViT of this size")
    for name, target in wanted.items():
        got = list(state[name].shape)
        if got != list(target.shape):
            raise UserError(f"{FIELD}: got {weights!r}, whose {name} has shape {got}; allowed: {list(target.shape)}")
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(state[name])


def _is_own(name: str) -> bool:
    """Return whether a parameter belongs to the space-time transformer only, not to a ViT."""
    if name in OWN_PARTS:
        return True
    return name.startswith("blocks.") and name.split(".", 2)[2].startswith(OWN_BLOCK_PARTS)


def _timm_state(name: str) -> dict[str, Tensor]:
    """Load the pretrained weights of a timm model from timm's cache or by download."""
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models("vit_base_patch16_224*", pretrained=True)[:3])
        raise UserError(f"{FIELD}: got {TIMM_PREFIX + name!r}; allowed: a timm model such as {near}")
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # the download raises many types
        raise UserError(
            f"{FIELD}: got {TIMM_PREFIX + name!r}, which could not be loaded ({reason(error)}); "
            "allowed: timm:NAME with a network or a filled cache, a local file, none"
        ) from error


def _file_state(weights: str, model: nn.Module) -> dict[str, Tensor]:
    """Read the state dict of a local file, with timm's names."""
    path = Path(weights).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        return read_state_dict(weights, "none, timm:NAME, or an existing local file")
    try:
        return _jax_state(path, model)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{FIELD}: got {weights!r}, which cannot be read ({reason(error)})") from error


def _jax_state(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read an original ViT .npz through timm's conversion."""
    from timm.models.vision_transformer import VisionTransformer

    size = cast(VideoSize, model.size)
    vit = VisionTransformer(
        img_size=size.resolution,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.mlp_ratio,
        num_classes=0,
    )
    vit.load_pretrained(str(path))
    return dict(vit.state_dict())
