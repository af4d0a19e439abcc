"""The parts of a space-time transformer: patch projection, residual norm, divided attention, MLP, block.

A parameter is read inside its own module's forward (but for _skipped_time, inside its block's), so that sharded
training, which fetches parameters when a module is called, finds them. Axis letters: see space_time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.common.autocast import autocast_dtype
from frozen_fast.models.pixels import PixelNormalisation
from frozen_kernels import add_layer_norm, bias_gelu, cls_attention, divided_attention, fused_form, gelu_reference

Block = Literal["frozen_in_time", "timesformer"]
FusedOps = Literal["auto", "plain"]

LAYER_NORM_EPS = 1e-6
_CENTRE = 128.0  # of 0 to 255: subtracted before the product, so that rounding errors are relative to the contrast


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product."""

    def __init__(self, patch: int, width: int, bias: bool = True) -> None:
        """RGB patches of patch x patch pixels to width."""
        super().__init__(3, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, video_BTCHW: Tensor, normalisation: PixelNormalisation | None = None) -> Tensor:
        """[B, T, 3, H, W] -> [B, T, P, D], patches row by row; uint8 pixels with their normalisation."""
        batch, frames, channels, height, width = video_BTCHW.shape
        patch = self.kernel_size[0]
        grid = video_BTCHW.reshape(batch, frames, channels, height // patch, patch, width // patch, patch)
        grid = grid.permute(0, 1, 3, 5, 2, 4, 6)
        if normalisation is None:
            patches = grid.reshape(batch, frames, -1, channels * patch * patch)
            return F.linear(patches, self.weight.flatten(1), self.bias)
        weight, bias = self._folded(normalisation)
        return F.linear(self._centred(grid).view(batch, frames, -1, channels * patch * patch), weight, bias)

    def _centred(self, grid: Tensor) -> Tensor:
        """Pixels - 128 in the dtype of the product, in one pass with the copy; bfloat16 holds them exactly."""
        device_type = grid.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.weight.dtype
        return torch.sub(grid, _CENTRE, out=torch.empty(grid.shape, dtype=dtype, device=grid.device))

    def _folded(self, normalisation: PixelNormalisation) -> tuple[Tensor, Tensor]:
        """Weight [D, 3 * patch * patch] and bias [D] whose product with centred pixels is that of normalised ones."""
        scale_C, shift_C = normalisation.scale_and_shift()
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = (self.weight.float() * scale_C[:, None, None]).flatten(1)
            bias = self.weight.float().sum((2, 3)) @ (shift_C + _CENTRE * scale_C)
            bias = bias if self.bias is None else self.bias + bias
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)


class PatchEmbedding(nn.Module):
    """Frames -> one token per patch; it gives the projection its released name, patch_embed.proj."""

    def __init__(self, patch: int, width: int) -> None:
        """Hold the projection."""
        super().__init__()
        self.proj = PatchProjection(patch, width)

    def forward(self, video_BTCHW: Tensor, normalisation: PixelNormalisation | None = None) -> Tensor:
        """[B, T, 3, H, W] -> [B, T, P, D]; see PatchProjection."""
        return self.proj(video_BTCHW, normalisation)


class ResidualNorm(nn.LayerNorm):
    """Adds a branch to the residual stream and normalises the sum, in one pass where there is a kernel for it."""

    def __init__(self, width: int, fused_ops: FusedOps, eps: float = LAYER_NORM_EPS) -> None:
        """Weights as LayerNorm's."""
        super().__init__(width, eps=eps)
        self.fused_ops = fused_ops

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None, branch_bias: Tensor | None = None, keep_sum: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(x + branch + branch_bias, its norm), both [..., D]; the norm in the dtype that matrix products take here.

        Without keep_sum the first is x, and the sum is not written to memory.
        """
        return add_layer_norm(
            x,
            branch,
            self.weight,
            self.bias,
            branch_bias_D=branch_bias,
            keep_sum=keep_sum,
            eps=self.eps,
            out_dtype=autocast_dtype(x.device.type),
            backend=_form(self.fused_ops),
        )


class _QueryBiasLinear(torch.autograd.Function):
    """A linear layer whose first outputs have a bias; its gradient is reduced from theirs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, query_bias: Tensor) -> Tensor:
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        x, cast_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, cast_weight)
        ctx.dtypes = (weight.dtype, query_bias.dtype)
        ctx.query_width = query_bias.shape[0]
        bias = F.pad(query_bias.to(dtype), (0, weight.shape[0] - query_bias.shape[0]))
        return F.linear(x, cast_weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        rows = grad.flatten(0, -2)
        grad_weight = (rows.mT @ x.flatten(0, -2)).to(weight_dtype)
        grad_bias = rows[:, : ctx.query_width].sum(dim=0, dtype=torch.float32).to(bias_dtype)
        return grad @ weight, grad_weight, grad_bias


class QkvLinear(nn.Linear):
    """Queries, keys and values in one matrix product.

    Where kernels add biases, only the queries get theirs here. A bias of all keys moves a query's scores by one number,
    which softmax leaves out. A bias of all values comes out of the attention as it is, because probabilities add up to
    1: the output projection takes it (BranchLinear).
    """

    def __init__(self, width: int, fused_ops: FusedOps) -> None:
        """Weights as nn.Linear's."""
        super().__init__(width, 3 * width)
        self.fused_ops = fused_ops

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, cls_only: bool = False
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        """[B, S, D] -> [B, S, 3*D]; with cls_only the CLS query [B, 1, D] and all keys and values [B, S, 2*D].

        The second result is the bias of the values [D], a copy, where the values are without it.
        """
        width = self.in_features
        plain = fused_form(_form(self.fused_ops), x_BSD.device, x_BSD.dtype) == "plain"
        if plain and not cls_only:
            return super().forward(x_BSD), None
        query_bias, key_bias, value_bias = self.bias.split(width)
        later = None if plain else value_bias.clone()
        if not cls_only:
            return _QueryBiasLinear.apply(x_BSD, self.weight, query_bias), later  # type: ignore[no-untyped-call]
        query_weight, kv_weight = self.weight.split((width, 2 * width))  # a slice's backward pass would fill zeros
        kv_bias = torch.cat([key_bias, value_bias]) if plain else None
        return (F.linear(x_BSD[:, :1], query_weight, query_bias), F.linear(x_BSD, kv_weight, kv_bias)), later


class BranchLinear(nn.Linear):
    """The linear layer at the end of a branch; the residual norm that comes next adds its bias."""

    def __init__(self, width: int, branch_width: int, fused_ops: FusedOps) -> None:
        """Weights as nn.Linear's."""
        super().__init__(width, branch_width)
        self.fused_ops = fused_ops

    def forward(  # type: ignore[override]
        self, x: Tensor, x_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> ([..., D] without the bias, the bias [D]); ([..., D], None) where no kernel would add it.

        x_bias [K] is still to be added to x: its product goes into the bias. The bias is a copy: under sharding the
        parameter's own memory is free again when the norm reads it.
        """
        if fused_form(_form(self.fused_ops), x.device, x.dtype) == "plain":
            return super().forward(x), None
        bias = self.bias.clone() if x_bias is None else torch.addmv(self.bias, self.weight, x_bias)
        return F.linear(x, self.weight), bias


class Attention(nn.Module):
    """Divided attention over one axis: qkv, attention of frozen_kernels, output projection."""

    def __init__(
        self, width: int, heads: int, axis: Literal["time", "space"], backend: str, fused_ops: FusedOps
    ) -> None:
        """Hold the two linear layers under their released names."""
        super().__init__()
        self.heads = heads
        self.axis = axis
        self.backend = backend
        self.backend_at: dict[tuple[int, str, torch.dtype], str] = {}  # frames, device, dtype -> what "auto" chose
        self.qkv = QkvLinear(width, fused_ops)
        self.proj = BranchLinear(width, width, fused_ops)

    def forward(self, x_BSD: Tensor, num_frames: int, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> BranchLinear's [B, S, D] and bias; [B, 1, D] with cls_only, the query of CLS on all tokens."""
        if not cls_only:
            qkv_BSE, value_bias = self.qkv(x_BSD)
            backend = self.backend
            if backend == "auto":
                backend = self.backend_at.get((num_frames, qkv_BSE.device.type, qkv_BSE.dtype), backend)
            qkv_BS3ND = qkv_BSE.unflatten(-1, (3, self.heads, -1))
            return self.proj(divided_attention(qkv_BS3ND, num_frames, self.axis, backend=backend), value_bias)
        (query_B1D, kv_BSD), value_bias = self.qkv(x_BSD, cls_only=True)
        query_B1ND, kv_BS2ND = query_B1D.unflatten(-1, (self.heads, -1)), kv_BSD.unflatten(-1, (2, self.heads, -1))
        return self.proj(cls_attention(query_B1ND, kv_BS2ND), value_bias)


class GeluLinear(nn.Linear):
    """A linear layer and GELU."""

    def __init__(self, width: int, hidden: int, fused_ops: FusedOps, *, approximate: str = "none") -> None:
        """Weights as nn.Linear's; approximate: which GELU, as in frozen_kernels.bias_gelu."""
        super().__init__(width, hidden)
        self.fused_ops = fused_ops
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., hidden]. Where there is a kernel, it adds the bias too, and reduces its gradient."""
        if fused_form(_form(self.fused_ops), x.device, x.dtype) != "plain":
            return bias_gelu(F.linear(x, self.weight), self.bias, approximate=self.approximate)
        return gelu_reference(super().forward(x), self.approximate)


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, width: int, hidden: int, fused_ops: FusedOps) -> None:
        """Hold the two linear layers under their released names."""
        super().__init__()
        self.fc1 = GeluLinear(width, hidden, fused_ops)
        self.fc2 = BranchLinear(hidden, width, fused_ops)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., D] -> BranchLinear's [..., D] and bias."""
        return self.fc2(self.fc1(x))


class SpaceTimeBlock(nn.Module):
    """One block: time attention, space attention, MLP, each on a normalised input.

    time = timeattn(norm3(x)); space = attn(norm1(x + time)); then Frozen in Time adds space to the block's INPUT,
    y = x + space, and TimeSformer's divided block adds it to x + time; out = y + mlp(norm2(y)). The last sum is left
    to the next block's norm, which adds and normalises in one pass: a block takes and returns the stream, the branch
    that is still to be added, and the branch's bias where its linear layer has not added it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        block: Block,
        *,
        attention: str,
        fused_ops: FusedOps,
        skip_time_at_one_frame: bool,
    ) -> None:
        """Build the block; see SpaceTimeTransformer for the arguments."""
        super().__init__()
        self.residual_from_input = block == "frozen_in_time"
        self.skip_time_at_one_frame = skip_time_at_one_frame
        self.norm1 = ResidualNorm(width, fused_ops)
        self.attn = Attention(width, heads, "space", attention, fused_ops)
        self.timeattn = Attention(width, heads, "time", attention, fused_ops)
        self.norm2 = ResidualNorm(width, fused_ops)
        self.mlp = Mlp(width, hidden, fused_ops)
        self.norm3 = ResidualNorm(width, fused_ops)

    def forward(
        self,
        x_BSD: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        num_frames: int,
        cls_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(stream, branch [B, S, D], bias [D]) -> the same; with cls_only the CLS rows of stream and branch."""
        if num_frames == 1 and self.skip_time_at_one_frame:
            x_BSD = add_branch(x_BSD, branch, branch_bias)
            time, time_bias = self._skipped_time(x_BSD), None
        else:
            x_BSD, normed = self.norm3(x_BSD, branch, branch_bias)
            time, time_bias = self.timeattn(normed, num_frames)
        residual, normed = self.norm1(x_BSD, time, time_bias, keep_sum=not self.residual_from_input)
        space, space_bias = self.attn(normed, num_frames, cls_only=cls_only)
        y, normed = self.norm2(residual[:, :1] if cls_only else residual, space, space_bias)
        return y, *self.mlp(normed)

    def _skipped_time(self, x_BSD: Tensor) -> Tensor:
        """Zeros that keep the branch's parameters in the graph.

        DDP refuses parameters without a gradient, and ZeRO-3 applies the gradient of an earlier step to them.
        """
        branch = (*self.norm3.parameters(), *self.timeattn.parameters())
        return (
            (0.0 * torch.stack([parameter.flatten()[0] for parameter in branch]).sum()).to(x_BSD.dtype).expand_as(x_BSD)
        )


def add_branch(x: Tensor, branch: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    """The residual sum without a norm, in the stream's dtype."""
    for addend in (branch, branch_bias):
        x = x if addend is None else (x + addend).to(x.dtype)
    return x


def _form(fused_ops: FusedOps) -> str:
    """What the fused ops are asked for; under torch.compile the plain form, which the compiler fuses."""
    return "plain" if torch.compiler.is_compiling() else fused_ops
