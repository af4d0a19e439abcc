"""CLIP's transformer with OpenAI's parameter names: `resblocks.0.attn.in_proj_weight`, `ln_1`, `mlp.c_fc`, ...

The image tower, the text tower and the temporal transformers of CLIP2Video and CLIP4Clip use this transformer. A block
takes and returns (stream, branch to be added), so that the sum and the next LayerNorm are one pass (frozen_kernels).

Axis letters: B sequences, S tokens, N heads, D width.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from frozen_fast.common.autocast import without_autocast
from frozen_fast.errors import UserError
from frozen_fast.models.video.attention_plugins import known_attention
from frozen_fast.models.video.blocks import FusedOps, GeluLinear, ResidualNorm
from frozen_fast.models.video.kernel_choice import settle_attention
from frozen_kernels import cls_attention, divided_attention

Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
"""Names of a transformers config.json; OpenAI's weights were trained with quick_gelu."""

GELU_FORMS = {"gelu": "none", "quick_gelu": "sigmoid", "gelu_pytorch_tanh": "tanh"}
"""The activations' names in frozen_kernels.bias_gelu."""

CLIP_NORM_EPS = 1e-5
"""Epsilon of CLIP's LayerNorms."""

HEAD_WIDTH = 64
"""Every published CLIP has heads of this width."""


class PackedAttention(nn.Module):
    """Self-attention with torch.nn.MultiheadAttention's parameter names.

    Without a mask this is divided attention of one frame, so that all backends of frozen_kernels support it.
    """

    def __init__(self, width: int, heads: int, causal: bool, backend: str = "auto") -> None:
        """Initialise the projection to queries, keys and values, and the output projection.

        Args:
            width: D.
            heads: N.
            causal: a token attends to itself and earlier tokens.
            backend: backend of frozen_kernels.divided_attention, used without a mask.
        """
        super().__init__()
        if width % heads:
            raise UserError(f"heads: got {heads} for width {width}; allowed: divisors of the width")
        self.heads = heads
        self.causal = causal
        self.backend = backend
        self.backend_at: dict[tuple[int, int, str, torch.dtype], str] = {}  # B, S, device, dtype -> "auto"'s choice
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None, first_only: bool = False) -> Tensor:
        """Attend.

        Args:
            x_BSD: normalised tokens.
            mask: added to the scores; broadcastable to [B, N, S, S].
            first_only: compute the output of token 0 alone [B, 1, D]; requires no mask and no causality.

        Returns:
            [B, S, D].
        """
        if first_only:
            assert mask is None and not self.causal, "one row is computed without a mask"
            return self.out_proj(self._first_row(x_BSD))
        qkv_BS3ND = F.linear(x_BSD, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        if mask is None and not self.causal and x_BSD.shape[1] > 1:
            backend = self.backend
            if backend == "auto":
                shape = (x_BSD.shape[0], x_BSD.shape[1], qkv_BS3ND.device.type, qkv_BS3ND.dtype)
                backend = self.backend_at.get(shape, backend)
            return self.out_proj(divided_attention(qkv_BS3ND, 1, "space", backend=backend))
        query, key, value = (part.transpose(1, 2) for part in qkv_BS3ND.unbind(2))
        mask = None if mask is None else mask.to(query.dtype)
        with without_autocast(query.device.type):
            out_BNSD = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)
        return self.out_proj(out_BNSD.transpose(1, 2).flatten(2))

    def _first_row(self, x_BSD: Tensor) -> Tensor:
        """Attend from token 0 to all keys and values -> [B, 1, D]."""
        sizes = (x_BSD.shape[-1], 2 * x_BSD.shape[-1])
        query_weight, kv_weight = self.in_proj_weight.split(sizes)
        query_bias, kv_bias = self.in_proj_bias.split(sizes)
        query_B1ND = F.linear(x_BSD[:, :1], query_weight, query_bias).unflatten(-1, (self.heads, -1))
        kv_BS2ND = F.linear(x_BSD, kv_weight, kv_bias).unflatten(-1, (2, self.heads, -1))
        return cls_attention(query_B1ND, kv_BS2ND)


def settle_sequences(module: nn.Module, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """Choose attention without masks for B sequences of S tokens, for "auto" under torch.compile."""
    for attention in module.modules():
        if isinstance(attention, PackedAttention) and not attention.causal and tokens > 1:
            shape = (batch, tokens, 3, attention.heads, attention.out_proj.in_features // attention.heads)
            like = torch.empty((), device=device, dtype=dtype)
            name = settle_attention(attention.backend, shape, 1, "space", like)
            attention.backend_at[batch, tokens, device.type, dtype] = name


class ClipMlp(nn.Module):
    """c_fc, activation, c_proj."""

    def __init__(self, width: int, hidden: int, activation: Activation, fused_ops: FusedOps) -> None:
        """Initialise both layers."""
        super().__init__()
        self.c_fc = GeluLinear(width, hidden, fused_ops, approximate=GELU_FORMS[activation])
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.c_proj(self.c_fc(x))


class ClipBlock(nn.Module):
    """One pre-norm block: attention, MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        causal: bool,
        activation: Activation,
        eps: float,
        attention: str,
        fused_ops: FusedOps,
    ) -> None:
        """Build the block; see ClipTransformer for the arguments."""
        super().__init__()
        self.attn = PackedAttention(width, heads, causal, attention)
        self.ln_1 = ResidualNorm(width, fused_ops, eps)
        self.mlp = ClipMlp(width, hidden, activation, fused_ops)
        self.ln_2 = ResidualNorm(width, fused_ops, eps)

    def forward(
        self, x_BSD: Tensor, branch: Tensor | None, mask: Tensor | None, first_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(stream, branch) [B, S, D] -> the same, or their first rows [B, 1, D] with first_only."""
        x_BSD, normed = self.ln_1(x_BSD, branch)
        attended = self.attn(normed, mask, first_only)
        y, normed = self.ln_2(x_BSD[:, :1] if first_only else x_BSD, attended)
        return y, self.mlp(normed)


class ClipTransformer(nn.Module):
    """A stack of blocks."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        hidden: int | None = None,
        causal: bool = False,
        activation: Activation = "quick_gelu",
        eps: float = CLIP_NORM_EPS,
        attention: str = "auto",
        fused_ops: FusedOps = "auto",
        checkpointed_blocks: int = 0,
    ) -> None:
        """Build the stack with OpenAI's random initialisation.

        Args:
            width: D.
            depth: number of blocks, 1 or more.
            heads: N.
            hidden: width of the MLP; None: 4 * width.
            causal: a token attends to itself and earlier tokens.
            activation: of the MLP.
            eps: of the LayerNorms.
            attention: backend of frozen_kernels.divided_attention, used without a mask.
            fused_ops: compute residual norms by frozen_kernels' fastest form, or by PyTorch's operators.
            checkpointed_blocks: number of first blocks that recompute their activations in the backward pass.
        """
        super().__init__()
        if depth < 1:
            raise UserError(f"layers: got {depth}; allowed: 1 or more")
        self.checkpointed_blocks = checkpointed_blocks
        backend = known_attention(attention)
        self.resblocks = nn.ModuleList(
            ClipBlock(
                width,
                heads,
                hidden or 4 * width,
                causal=causal,
                activation=activation,
                eps=eps,
                attention=backend,
                fused_ops=fused_ops,
            )
            for _ in range(depth)
        )
        for module in self.resblocks:
            block = cast(ClipBlock, module)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            for layer, std in (
                (block.attn.out_proj, (2 * depth * width) ** -0.5),
                (block.mlp.c_fc, (2 * width) ** -0.5),
                (block.mlp.c_proj, (2 * depth * width) ** -0.5),
            ):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """Run the blocks.

        Args:
            x_BSD: tokens.
            mask: added to the scores of every block; broadcastable to [B, N, S, S].
            first_only: the last block computes token 0's output alone.

        Returns:
            (stream, branch): their sum is the output [B, S, D], or [B, 1, D] with first_only.
        """
        branch: Tensor | None = None
        last = len(self.resblocks) - 1
        for index, block in enumerate(self.resblocks):
            arguments = (x_BSD, branch, mask, first_only and index == last)
            if index < self.checkpointed_blocks and torch.is_grad_enabled():
                x_BSD, branch = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSD, branch = block(*arguments)
        assert branch is not None, "a stack has at least one block"
        return x_BSD, branch
