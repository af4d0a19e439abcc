"""A projection of a training step's time on a GPU from the bytes it moves and the FLOPs it does; nothing is measured.

    python benchmarks/traffic_model.py --output benchmarks/results/traffic_model.json

The video tower's forward and backward pass and fused AdamW run on tensors without data, and every operator that runs
is counted: its tensors' bytes, read and written once, and its matrix products. An operator takes the longer of bytes
over bandwidth and FLOPs over peak, both times a share that is assumed (ASSUMPTIONS); the step is their sum, so host
time, launch gaps and overlap are not in it. Left out: the text tower, the loss and the exchange of gradients. MFU is
that of the FLOPs a step executes, against the datasheet's peak and against the fastest matrix product measured on such
a device (MEASURED_PRODUCT).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frozen_fast.common.files import write_json
from frozen_fast.models import VIDEO_SIZES, SpaceTimeTransformer
from frozen_fast.models.video import blocks
from frozen_fast.models.video.space_time import ResidualDtype
from frozen_fast.models.video.space_time_flops import space_time_flops
from frozen_fast.profiling.flops import TRAINING_OVER_FORWARD
from frozen_fast.profiling.peak import device_peak
from frozen_kernels.attention import api, qkv_layout
from frozen_kernels.fused import forms

NOTE = "A projection from counted bytes and FLOPs under assumed shares of the peaks; not measured."
ASSUMPTIONS = {
    "measured_share": 0.80,
    "product_share": 0.80,
    "memory_share": 0.85,
    "attention_product_share": 0.35,
    "attention_memory_share": 0.40,
}
"""What is reached: measured_share of the datasheet's FLOP/s by the largest product, where none was measured; of that,
product_share by the products of a step; of the datasheet's bytes/s memory_share by memory-bound operators; and of both
datasheet figures the attention shares by attention kernels."""
MEASURED_PRODUCT = {"NVIDIA H200": 790e12}
"""FLOP/s of a bf16 matrix product of 8192 x 8192 by 8192 x 8192."""
DEVICES = ("NVIDIA H100", "NVIDIA H200", "NVIDIA B200")
STAGES = ((1, 512), (4, 128), (8, 64))
SIZE = "base_patch16_224"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
FREE = ("_unsafe_view", "empty", "empty_like", "new_empty", "detach", "device", "promote_types")
COPIES = (
    "cat",
    "clone",
    "copy_",
    "zeros",
    "zeros_like",
    "new_zeros",
    "fill_",
    "constant_pad_nd",
    "slice_backward",
    "select_backward",
    "stack",
    "add_positions",
)
PASSES = {"triton_attention": {"time": 1.0, "space": 1.5}, "triton_attention_backward": {"time": 1.0, "space": 1.5}}
"""How many times our attention kernels read and write their tensors: on the space axis CLS has a pass of its own, and
the backward pass is one kernel for queries and one for keys."""
PRODUCTS_OF = {"triton_attention": 2, "triton_attention_backward": {"time": 5, "space": 7}}
"""Matrix products of a score's size, recomputation included."""


@dataclass(frozen=True)
class Variant:
    """A step with one thing changed."""

    name: str
    attention: str = "triton"
    fused: bool = True
    full_last_block: bool = False
    residual_dtype: ResidualDtype = "fp32"


BUILT = Variant("as built: triton attention, fused ops, CLS only in the last block")
VARIANTS = (
    BUILT,
    replace(BUILT, name="attention through SDPA", attention="sdpa"),
    replace(BUILT, name="PyTorch's own norms and GELU", fused=False),
    replace(BUILT, name="last block in full", full_last_block=True),
    replace(BUILT, name="residual stream in bf16", residual_dtype="bf16"),
)


@dataclass
class Count:
    """What one class of operators does in a step."""

    operators: int = 0
    bytes: float = 0.0
    flops: float = 0.0


class Counter(TorchDispatchMode):
    """Adds up what runs, by (class, operator)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], Count] = {}
        self.optimizing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        foreign = func.namespace not in ("aten", "frozen_kernels") or (self.optimizing and name.startswith("zeros"))
        if foreign or name in FREE or getattr(func, "is_view", False):
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        kind = "optimizer" if self.optimizing else class_of(name, tensors, args)
        count = self.counts.setdefault((kind, name), Count())
        count.operators += 1
        axis = next((value for value in args if value in qkv_layout.AXES), "") if kind == "attention" else ""
        moved = sum(distinct_bytes(tensor) for tensor in {id(t): t for t in (*tensors, *written)}.values())
        if self.optimizing:  # parameters and moments are read and written, gradients read
            moved = sum(distinct_bytes(tensor) for tensor in tensors) * (7 / 4 if "adam" in name else 1)
        count.bytes += moved * PASSES.get(name, {}).get(axis, 1.0)
        count.flops += flops_of(name, args, tensors, written, axis)
        return out


def class_of(name: str, tensors: list[Tensor], args: Any) -> str:
    """Which class an operator belongs to."""
    if name in PRODUCTS:
        return "products"
    if "attention" in name:
        return "attention"
    for word, kind in (("norm", "norms"), ("gelu", "gelu"), ("_to_copy", "casts")):
        if word in name:
            return kind
    if name == "sum" and tensors and tensors[0].dim() == 2 and list(args[1]) == [0]:  # over rows
        return "bias gradients"
    return "copies" if name in COPIES else "elementwise"


def distinct_bytes(tensor: Tensor) -> float:
    """Bytes of a tensor's elements, repeated ones once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.itemsize


def flops_of(name: str, args: Any, tensors: list[Tensor], written: list[Tensor], axis: str) -> float:
    """FLOPs of matrix products, 2 for a multiply-add."""
    if name in PRODUCTS:
        left = tensors[-2]
        return 2.0 * written[0].numel() * left.shape[-1]
    if name in PRODUCTS_OF:
        qkv = next(tensor for tensor in tensors if tensor.dim() == 5)
        frames = next(value for value in args if isinstance(value, int) and not isinstance(value, bool))
        layout = qkv_layout.read_layout(qkv, frames, axis)
        group = frames if axis == "time" else layout.patches
        pairs = (layout.tokens - 1) * (group + 1) + layout.tokens
        products = PRODUCTS_OF[name]
        number = products[axis] if isinstance(products, dict) else products
        return 2.0 * number * layout.batch * layout.width * pairs
    if "scaled_dot_product" in name:
        query, key = tensors[-3:-1] if "backward" not in name else tensors[1:3]
        batch, heads, queries, width = query.shape
        return (5 if "backward" in name else 2) * 2.0 * batch * heads * queries * key.shape[2] * width
    return 0.0


@contextmanager
def as_on_cuda(variant: Variant) -> Iterator[None]:
    """Take the forms that run on a GPU, on tensors without data."""
    form = "triton" if variant.fused else "plain"
    with ExitStack() as stack:
        for module in (api, forms):
            stack.enter_context(mock.patch.object(module, "why_not", lambda *_: ""))
        stack.enter_context(mock.patch.object(blocks, "_form", lambda _: form))
        # PyTorch 2.15 draws again until every value is within the bounds, which needs values.
        stack.enter_context(mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor))
        yield


def count_step(variant: Variant, frames: int, batch: int, size: str = SIZE) -> dict[tuple[str, str], Count]:
    """Operators of one step under bf16 autocast; making the optimizer's states, once in a run, is left out."""
    shape = VIDEO_SIZES[size]
    with as_on_cuda(variant), FakeTensorMode():
        tower = SpaceTimeTransformer(
            shape,
            frames,
            attention=variant.attention,
            residual_dtype=variant.residual_dtype,
            time_init="random",
            full_last_block=variant.full_last_block,
        )
        optimizer = torch.optim.AdamW(tower.parameters(), fused=True)
        video_BTCHW = torch.empty(batch, frames, 3, shape.resolution, shape.resolution, dtype=torch.bfloat16)
        with Counter() as counter:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cls_BD = tower(video_BTCHW)
            cls_BD.backward(torch.empty_like(cls_BD))
            counter.optimizing = True
            optimizer.step()
    return counter.counts


def project(counts: dict[tuple[str, str], Count], flops: float, device: str) -> dict[str, Any]:
    """Milliseconds by class on a device, their sum, and the MFU that follows."""
    peak = device_peak(device, "bf16")
    assert peak is not None and peak.bytes_per_second is not None
    largest_product = MEASURED_PRODUCT.get(device, ASSUMPTIONS["measured_share"] * peak.flops_per_second)
    products_reach = ASSUMPTIONS["product_share"] * largest_product
    attention_reaches = ASSUMPTIONS["attention_product_share"] * peak.flops_per_second
    milliseconds: dict[str, float] = {}
    for (kind, _), count in counts.items():
        prefix = "attention_" if kind == "attention" else ""
        computing = count.flops / (attention_reaches if prefix else products_reach)
        moving = count.bytes / (peak.bytes_per_second * ASSUMPTIONS[f"{prefix}memory_share"])
        milliseconds[kind] = milliseconds.get(kind, 0.0) + 1e3 * max(computing, moving)
    total = sum(milliseconds.values())
    return {
        "device": device,
        "peak": peak.source,
        "milliseconds": milliseconds,
        "projected_milliseconds": total,
        "projected_mfu_datasheet": flops / (1e-3 * total * peak.flops_per_second),
        "largest_product": "measured" if device in MEASURED_PRODUCT else "assumed",
        "projected_mfu_measured_peak": flops / (1e-3 * total * largest_product),
    }


def row_of(variant: Variant, frames: int, batch: int, size: str) -> dict[str, Any]:
    """One variant at one stage."""
    counts = count_step(variant, frames, batch, size)
    executed = space_time_flops(VIDEO_SIZES[size], frames, executed=not variant.full_last_block)
    flops = TRAINING_OVER_FORWARD * executed * batch
    classes: dict[str, Count] = {}
    for (kind, _), count in counts.items():
        held = classes.setdefault(kind, Count())
        held.operators += count.operators
        held.bytes += count.bytes
        held.flops += count.flops
    return {
        "variant": variant.name,
        "frames": frames,
        "batch": batch,
        "operators": sum(count.operators for count in classes.values()),
        "executed_flops": flops,
        "classes": {kind: vars(count) for kind, count in classes.items()},
        "projection": [project(counts, flops, device) for device in DEVICES],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    devices = ", ".join(DEVICES)
    header = f"projected ms, MFU of the largest product measured (H200) or assumed, MFU of the datasheet: {devices}"
    lines = [NOTE, "", f"| T | B | variant | operators | GB | {header} |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        moved = sum(entry["bytes"] for entry in row["classes"].values()) / 1e9
        cells = ", ".join(
            f"{one['projected_milliseconds']:.0f} ({100 * one['projected_mfu_measured_peak']:.0f} %, "
            f"{100 * one['projected_mfu_datasheet']:.0f} %)"
            for one in row["projection"]
        )
        lines.append(
            f"| {row['frames']} | {row['batch']} | {row['variant']} | {row['operators']} | {moved:.0f} | {cells} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=SIZE, choices=sorted(VIDEO_SIZES), help="video tower")
    parser.add_argument("--output", type=Path, default=Path("traffic_model.json"), help="result file")
    options = parser.parse_args(arguments)
    rows = [row_of(variant, frames, batch, options.size) for frames, batch in STAGES for variant in VARIANTS]
    command = ["python", "benchmarks/traffic_model.py", *(sys.argv[1:] if arguments is None else arguments)]
    write_json(options.output, {"note": NOTE, "command": command, "assumptions": ASSUMPTIONS, "projections": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
