"""The space-time transformer of Frozen in Time (section 3.2 of the paper), with the released parameter names.

Axis letters: B batch, T frames, C channels, H and W pixels, P patches per frame, S = 1 + T*P tokens (CLS first,
then frame by frame), N heads, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.config.video_sizes import VIDEO_SIZES, VideoSize, named_size
from frozen_fast.errors import UserError
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.models.video.attention_plugins import known_attention
from frozen_fast.models.video.blocks import (
    LAYER_NORM_EPS,
    Attention,
    Block,
    FusedOps,
    PatchEmbedding,
    SpaceTimeBlock,
    add_branch,
)
from frozen_fast.models.video.kernel_choice import AUTO_ATTENTION, kernels_of, settle_attention
from frozen_fast.models.video.space_time_flops import embedding_flops, space_time_flops
from frozen_fast.models.video.video_tower import VideoTower
from frozen_fast.models.video.vit_weights import load_vit_weights
from frozen_kernels import BACKEND_NAMES, add_positions, unavailable_backends

TimeInit = Literal["zero_output", "released", "random"]
ResidualDtype = Literal["fp32", "bf16"]

INIT_STD = 0.02
"""Standard deviation of the truncated normal distribution of linear weights in ViT and the released code."""


class SpaceTimeTransformer(VideoTower):
    """The space-time transformer: frames -> the CLS token after the last LayerNorm."""

    name = "space_time"
    keys: ClassVar[tuple[str, ...]] = (
        "size",
        "weights",
        "heads",
        "block",
        "attention",
        "fused_ops",
        "time_init",
        "position_init_std",
        "temporal_init_std",
        "skip_time_attention_at_one_frame",
        "full_last_block",
    )
    described_by: ClassVar[tuple[str, ...]] = ("block", "skip_time_attention_at_one_frame")
    frame_embeddings = ("temporal_embed",)
    folds_normalisation: ClassVar[bool] = True

    def __init__(
        self,
        size: VideoSize,
        max_frames: int,
        *,
        block: Block = "frozen_in_time",
        attention: str = "auto",
        fused_ops: FusedOps = "auto",
        residual_dtype: ResidualDtype = "fp32",
        time_init: TimeInit = "zero_output",
        position_init_std: float = INIT_STD,
        temporal_init_std: float = 0.0,
        skip_time_attention_at_one_frame: bool = False,
        checkpointed_blocks: int = 0,
        full_last_block: bool = False,
    ) -> None:
        """Build the tower with random weights.

        Args:
            size: one of VIDEO_SIZES, or other sizes.
            max_frames: rows of temporal_embed, whose shape never changes, so that the optimizer's state and shards stay
                valid.
            block: the tensor to which the space branch is added (SpaceTimeBlock).
            attention: backend of frozen_kernels.divided_attention.
            fused_ops: compute residual norms and bias + GELU by frozen_kernels' fastest form, or by PyTorch's
                operators.
            residual_dtype: dtype of the residual stream under bf16 autocast.
            time_init: initialisation of time attention (init_weights).
            position_init_std: standard deviation of the initial spatial position embeddings.
            temporal_init_std: standard deviation of the initial temporal embeddings; 0: zeros.
            skip_time_attention_at_one_frame: skip time attention at T=1, unlike the released model.
            checkpointed_blocks: number of first blocks that recompute their activations in the backward pass.
            full_last_block: also compute the last block's patch outputs, as the released code does.
        """
        super().__init__()
        if max_frames < 1:
            raise UserError(f"max_frames: got {max_frames}; allowed: 1 or more")
        if not 0 <= checkpointed_blocks <= size.depth:
            raise UserError(
                f"model.video.checkpointed_blocks: got {checkpointed_blocks}; allowed: 0 to {size.depth}, the depth"
            )
        if block not in ("frozen_in_time", "timesformer"):
            raise UserError(f"model.video.block: got {block!r}; allowed: frozen_in_time, timesformer")
        self.size = size
        self.width, self.resolution = size.width, size.resolution
        self.max_frames = max_frames
        self.block = block
        self.attention = known_attention(attention)
        self.fused_ops = fused_ops
        self.residual_dtype = residual_dtype
        self.skip_time_attention_at_one_frame = skip_time_attention_at_one_frame
        self.checkpointed_blocks = checkpointed_blocks
        self.full_last_block = full_last_block
        self.patch_embed = PatchEmbedding(size.patch, size.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.patches_per_frame, size.width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, size.width))
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(
                size.width,
                size.heads,
                size.width * size.mlp_ratio,
                block,
                attention=attention,
                fused_ops=fused_ops,
                skip_time_at_one_frame=skip_time_attention_at_one_frame,
            )
            for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.init_weights(time_init, position_init_std, temporal_init_std)

    def init_weights(
        self, time_init: TimeInit = "zero_output", position_init_std: float = INIT_STD, temporal_init_std: float = 0.0
    ) -> None:
        """Initialise the weights.

        Linear weights are truncated normals of 0.02 with biases of 0, and patches follow LeCun (std fan_in^-0.5).

        Args:
            time_init: initialisation of time attention.
                zero_output: random qkv, output projection 0. As with "released", the initial output is 0, so that a
                pretrained ViT's function is preserved; unlike with "released", all parameters get gradients.
                released: qkv 0, projection weight 1, bias 0, as in the released code with more than one frame. The
                gradients of queries and keys are then always 0, and all value channels stay equal.
                random: like the other layers, as in the released code with one frame (the start of its curriculum).
            position_init_std: standard deviation of pos_embed. Patch embeddings have entries around 1, so with 0.02
                positions have little effect until they are learned. Training from scratch on little data needs 1.
            temporal_init_std: standard deviation of temporal_embed. Expanding from one frame (VideoSide.expand_frames)
                adds the initial values of the new rows, because all frames would otherwise get the same row.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=self.patch_embed.proj.weight[0].numel() ** -0.5)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.normal_(self.pos_embed, std=position_init_std)
        nn.init.normal_(self.temporal_embed, std=temporal_init_std)
        for block in self.blocks:
            init_time_attention(cast(SpaceTimeBlock, block).timeattn, time_init)

    def forward(self, video_BTCHW: Tensor, normalisation: PixelNormalisation | None = None) -> Tensor:
        """Embed clips.

        Args:
            video_BTCHW: [B, T, 3, resolution, resolution], normalised floats, 1 <= T <= max_frames; uint8 pixels with
                `normalisation`.
            normalisation: normalisation of uint8 pixels, which is folded into the weights of the patch projection.

        Returns:
            [B, D]: the CLS token after the last LayerNorm.

        Raises:
            ValueError: for another shape.
        """
        self.check_video(video_BTCHW)
        num_frames = video_BTCHW.shape[1]
        x = self.embed_tokens(video_BTCHW, normalisation)
        branch: Tensor | None = None
        branch_bias: Tensor | None = None
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            arguments = (x, branch, branch_bias, num_frames, index == last and not self.full_last_block)
            if index < self.checkpointed_blocks and torch.is_grad_enabled():
                x, branch, branch_bias = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch, branch_bias = block(*arguments)
        assert branch is not None, "a tower has at least one block"
        return self.norm(add_branch(x[:, 0], branch[:, 0], branch_bias).to(self.norm.weight.dtype))

    def embed_tokens(self, video_BTCHW: Tensor, normalisation: PixelNormalisation | None = None) -> Tensor:
        """Return CLS and patches with position embeddings, [B, S, D], in the residual stream's dtype."""
        patches = self.patch_embed(video_BTCHW, normalisation)
        x = add_positions(patches, self.cls_token, self.pos_embed, self.temporal_embed)
        narrow = self.residual_dtype == "bf16" and torch.is_autocast_enabled(x.device.type)
        return x.to(torch.bfloat16) if narrow else x

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> SpaceTimeTransformer:
        """Build the tower of a config's model.video, with random weights or, if requested, those of a ViT."""
        tower = cls(
            named_size(section.size),
            max_frames,
            time_init=section.time_init,
            position_init_std=section.position_init_std,
            temporal_init_std=section.temporal_init_std,
            block=section.block or "frozen_in_time",
            skip_time_attention_at_one_frame=bool(section.skip_time_attention_at_one_frame),
            **_settings(section),
        )
        if section.weights != "none":
            load_vit_weights(tower, section.weights)
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> SpaceTimeTransformer:
        """Build the tower that architecture() describes; a released file does not tell its block form, section may."""
        section = section or VideoTowerConfig()
        options = {}
        for key in cls.described_by:
            value = data[key] if key in data else getattr(section, key)
            if value is not None:
                options[key] = value
        with torch.device("meta"):  # skips random initialisation
            tower = cls(VideoSize(**data["size"]), max_frames, **options, **_settings(section))
        return tower.to_empty(device="cpu")

    def architecture(self) -> dict[str, Any]:
        """Return sizes and the block form."""
        return {
            "size": asdict(self.size),
            "block": self.block,
            "skip_time_attention_at_one_frame": self.skip_time_attention_at_one_frame,
        }

    @classmethod
    def frames_taken(cls, section: VideoTowerConfig, max_frames: int) -> range:
        """Return 1 to max_frames, after checking the size and the number of checkpointed blocks."""
        if section.checkpointed_blocks > (depth := named_size(section.size).depth):
            allowed = f"0 to {depth}, the depth"
            raise UserError(f"model.video.checkpointed_blocks: got {section.checkpointed_blocks}; allowed: {allowed}")
        return super().frames_taken(section, max_frames)

    @classmethod
    def check_agreement(cls, section: VideoTowerConfig, data: Mapping[str, Any]) -> None:
        """Refuse a size or a block form other than the checkpoint's."""
        super().check_agreement(section, data)
        if section.size is not None and asdict(named_size(section.size)) != data["size"]:
            same = [name for name, size in VIDEO_SIZES.items() if asdict(size) == data["size"]]
            allowed = " or ".join([*same, "null"])
            raise UserError(f"model.video.size: got {section.size!r}; allowed: {allowed}, that of model.checkpoint")

    def check_kernels(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        """Raise a UserError that names model.video.attention if its backend cannot run."""
        missing = unavailable_backends(device, dtype)
        if self.attention in missing:
            able = ", ".join([AUTO_ATTENTION, *(name for name in BACKEND_NAMES if name not in missing)])
            reason = missing[self.attention]
            raise UserError(f"model.video.attention: got {self.attention!r}: {reason}; allowed here: {able}")

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Let "auto" choose attention for a stage's shapes, and import the chosen backends."""
        for frames, batch in batch_sizes.items():
            tokens = 1 + frames * self.size.patches_per_frame
            shape = (batch, tokens, 3, self.size.heads, self.size.width // self.size.heads)
            like = torch.empty((), device=device, dtype=dtype)
            for attention in self.modules():
                if isinstance(attention, Attention):
                    name = settle_attention(attention.backend, shape, frames, attention.axis, like)
                    attention.backend_at[frames, device.type, dtype] = name

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """Return the attention backends chosen so far, and the form of the fused ops."""
        return kernels_of(self.attention, self.fused_ops, device, compiled=compiled)

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the space-time blocks."""
        return list(self.blocks)

    def pixel_flops(self, frames: int) -> float:
        """Return the share of the patch embedding."""
        return embedding_flops(self.size, frames)

    def forward_flops(self, frames: int, *, executed: bool = True) -> float:
        """Compute FLOPs from the sizes (space_time_flops); executed excludes unused outputs of the last block."""
        return space_time_flops(
            self.size,
            frames,
            executed=executed and not self.full_last_block,
            skip_time_attention_at_one_frame=self.skip_time_attention_at_one_frame,
        )


def _settings(section: VideoTowerConfig) -> dict[str, Any]:
    """Return the keys that select how the tower computes, not its architecture."""
    keys = ("attention", "fused_ops", "residual_dtype", "checkpointed_blocks", "full_last_block")
    return {key: getattr(section, key) for key in keys}


def init_time_attention(attention: Attention, time_init: TimeInit) -> None:
    """Initialise time attention; SpaceTimeTransformer.init_weights describes the choices."""
    if time_init == "released":
        nn.init.zeros_(attention.qkv.weight)
        nn.init.ones_(attention.proj.weight)
    elif time_init == "zero_output":
        nn.init.zeros_(attention.proj.weight)
    elif time_init != "random":
        raise UserError(f"model.video.time_init: got {time_init!r}; allowed: random, released, zero_output")
