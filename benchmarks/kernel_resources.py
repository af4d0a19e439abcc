"""What every Triton kernel takes of a GPU, compiled here for several architectures; no GPU is needed.

    python benchmarks/kernel_resources.py --output benchmarks/results/kernel_resources.json
    python benchmarks/kernel_resources.py --architectures 90 --kernels time     some of them

The launchers of frozen_kernels run on tensors without data, and each launch is compiled for each architecture with
the tile shape, types and constants that it asks for. ptxas tells registers, spills and shared memory; warps that a
multiprocessor can hold follow from its limits; the machine code tells barriers, shuffles, matrix instructions and how
wide its loads are. 1 where a kernel spills or asks for more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from frozen_fast.common.files import write_json
from frozen_kernels.attention import triton as attention
from frozen_kernels.fused import triton_bias_gelu, triton_layer_norm

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
POINTER_BYTES = 16
"""Alignment of a tensor's data, which PyTorch's allocator keeps."""


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor (CUDA C++ programming guide, technical specifications per compute capability)."""

    capability: int
    device: str
    warps: int
    blocks: int
    registers: int
    shared_bytes: int
    shared_bytes_of_a_block: int


ARCHITECTURES = {
    80: Architecture(80, "A100", 64, 32, 65_536, 164 << 10, 163 << 10),
    90: Architecture(90, "H100, H200", 64, 32, 65_536, 228 << 10, 227 << 10),
    100: Architecture(100, "B200", 64, 32, 65_536, 228 << 10, 227 << 10),
}
ROWS = 64 * 785
"""Rows of the fused ops: 64 clips of four frames; the backward passes cut them by their number."""
RESERVED_BYTES = 1024
"""Shared memory that the system takes of every block."""


@dataclass(frozen=True)
class Launch:
    """One kernel with what fixes its machine code."""

    case: str
    function: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def attention_case(axis: str, frames: int, patches: int, head_width: int, dtype: torch.dtype) -> None:
    """Forward and backward of the attention backend triton."""
    qkv = torch.empty(2, 1 + frames * patches, 3, 12, head_width, dtype=dtype, device="meta")
    out, lse, cls_lse = attention.launch_forward(qkv, frames, axis)
    attention.launch_backward(torch.empty_like(out), qkv, out, lse, cls_lse, frames, axis)


def layer_norm_case(width: int, stream: torch.dtype, branch: torch.dtype | None) -> None:
    """Forward and backward of the residual sum and norm; the norm's dtype is bf16."""
    x = torch.empty(ROWS, width, dtype=stream, device="meta")
    other = None if branch is None else x.to(branch)
    weight = torch.empty(width, device="meta")
    bias = None if branch is None else weight
    for keep_sum in (True, False) if branch is not None else (False,):
        _, normed, statistics = triton_layer_norm.launch_forward(
            x, other, bias, weight, weight, 1e-6, torch.bfloat16, keep_sum
        )
        again = (None, None) if keep_sum else (other, bias)  # what the backward pass adds once more
        apart = branch if not keep_sum or branch != stream else None
        triton_layer_norm.launch_backward(
            torch.empty_like(x), normed, x, *again, weight, statistics, apart, branch is not None, not keep_sum
        )


def bias_gelu_case(width: int, dtype: torch.dtype, approximate: str) -> None:
    """Forward and backward of bias and GELU."""
    x, bias = torch.empty(ROWS, width, dtype=dtype, device="meta"), torch.empty(width, device="meta")
    out = triton_bias_gelu.launch_forward(x, bias, approximate)
    triton_bias_gelu.launch_backward(out, x, bias, approximate)


def cases() -> dict[str, Callable[[], None]]:
    """The shapes in use: base size, and the widest heads and largest number of frames that the kernels take."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for frames in (1, 4, 8, 16):
            name = f"time T={frames} D=64 {TYPES[dtype]}"
            found[name] = partial(attention_case, "time", frames, 196, 64, dtype)
        found[f"space P=196 D=64 {TYPES[dtype]}"] = partial(attention_case, "space", 4, 196, 64, dtype)
    found["time T=4 D=128 bf16"] = partial(attention_case, "time", 4, 196, 128, torch.bfloat16)
    found["space P=196 D=128 bf16"] = partial(attention_case, "space", 4, 196, 128, torch.bfloat16)
    found["space P=16 D=64 bf16"] = partial(attention_case, "space", 4, 16, 64, torch.bfloat16)
    found["norm D=768 fp32 + bf16"] = partial(layer_norm_case, 768, torch.float32, torch.bfloat16)
    found["norm D=768 bf16 + bf16"] = partial(layer_norm_case, 768, torch.bfloat16, torch.bfloat16)
    found["norm D=768 fp32, no branch"] = partial(layer_norm_case, 768, torch.float32, None)
    found["gelu D=3072 bf16"] = partial(bias_gelu_case, 3072, torch.bfloat16, "none")
    found["gelu sigmoid D=3072 bf16"] = partial(bias_gelu_case, 3072, torch.bfloat16, "sigmoid")
    return found


@contextmanager
def captured(case: str, launches: dict[tuple[Any, ...], Launch]) -> Iterator[None]:
    """Record kernels instead of launching them."""
    real = JITFunction.run

    def record(function: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        launch = read_launch(case, function, arguments, options)
        key = (function.__name__, launch.signature, launch.constants, launch.aligned, launch.options)
        launches.setdefault(key, launch)

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = real  # type: ignore[method-assign]


def read_launch(case: str, function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Launch:
    """Sort a launch's arguments as Triton does: types, constants (annotated ones, and the integer 1), alignment."""
    values = dict(zip(function.arg_names, arguments, strict=False))
    values |= {name: options[name] for name in function.arg_names if name in options}
    launch_options = tuple(sorted((key, value) for key, value in options.items() if key not in values))
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, f"*{TYPES[value.dtype]}"))
            aligned.append(index)
        elif isinstance(value, int):
            signature.append((parameter.name, "i32" if abs(value) < 2**31 else "i64"))
            aligned += [index] if value % POINTER_BYTES == 0 else []
        else:
            signature.append((parameter.name, "fp32"))
    return Launch(case, function, tuple(signature), tuple(constants), tuple(aligned), launch_options)


def compile_launch(launch: Launch, architecture: Architecture) -> dict[str, Any]:
    """The row of one kernel on one architecture."""
    source = ASTSource(
        launch.function,
        dict(launch.signature),
        dict(launch.constants),
        {(index,): [["tt.divisibility", POINTER_BYTES]] for index in launch.aligned},
    )
    target = GPUTarget("cuda", architecture.capability, 32)
    kernel = triton.compile(source, target=target, options=dict(launch.options))
    warps = dict(launch.options).get("num_warps", 4)
    assembled = read_ptxas(ptxas_report(kernel.asm["ptx"], architecture))
    row = {
        "kernel": launch.function.__name__,
        "case": launch.case,
        "capability": architecture.capability,
        "constants": {name: value for name, value in launch.constants if name.isupper()},
        "warps_of_a_block": warps,
        "shared_bytes": kernel.metadata.shared,
        **assembled,
        **read_machine_code(machine_code(kernel.asm["cubin"])),
    }
    return {**row, "warps_resident": resident_warps(row["registers"], warps, row["shared_bytes"], architecture)}


def tool(name: str) -> str:
    """Path of one of the tools that Triton brings along."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def ptxas_report(ptx: str, architecture: Architecture) -> str:
    """What ptxas -v says."""
    (chip,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assembler = tool("ptxas-blackwell" if architecture.capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [assembler, "-v", f"--gpu-name={chip}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def read_ptxas(report: str) -> dict[str, int]:
    """Registers of a thread, and bytes of a thread that spill."""
    (registers,) = re.findall(r"Used (\d+) registers", report)
    (stores,) = re.findall(r"(\d+) bytes spill stores", report)
    (loads,) = re.findall(r"(\d+) bytes spill loads", report)
    return {"registers": int(registers), "spill_store_bytes": int(stores), "spill_load_bytes": int(loads)}


def machine_code(cubin: bytes) -> str:
    """The disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_machine_code(text: str) -> dict[str, Any]:
    """Instructions by kind, as they stand in the code: a loop's count once."""
    codes = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    heads = Counter(code.split(".")[0] for code in codes)
    loads = Counter(
        int(next((part for part in code.split(".")[1:] if part in ("64", "128")), "32")) // 8
        for code in codes
        if code.startswith(("LDG", "LDGSTS"))
    )
    return {
        "instructions": len(codes),
        "barriers": heads["BAR"],
        "shuffles": heads["SHFL"],
        "matrix_instructions": sum(count for name, count in heads.items() if name.endswith("MMA")),
        "atomics": heads["RED"] + heads["ATOM"] + heads["ATOMG"],
        "loads_by_bytes_of_a_thread": {str(size): loads[size] for size in sorted(loads)},
    }


def resident_warps(registers: int, warps: int, shared_bytes: int, architecture: Architecture) -> int:
    """Warps that a multiprocessor holds; 0 where a block does not fit. Registers are handed out by 256 to a warp."""
    if shared_bytes > architecture.shared_bytes_of_a_block:
        return 0
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        architecture.blocks,
        architecture.warps // warps,
        architecture.registers // (of_a_warp * warps),
        architecture.shared_bytes // (shared_bytes + RESERVED_BYTES),
    )
    return blocks * warps


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Kernels that spill or do not fit, in words."""
    found = []
    for row in rows:
        where = f"{row['kernel']} ({row['case']}) on sm_{row['capability']}"
        spilled = row["spill_store_bytes"] + row["spill_load_bytes"]
        if spilled:
            found.append(f"{where}: spills {spilled} bytes a thread")
        most = ARCHITECTURES[row["capability"]].shared_bytes_of_a_block
        if row["shared_bytes"] > most:
            found.append(f"{where}: {row['shared_bytes']} bytes of shared memory; allowed: {most}")
    return found


def sources_hash(launches: Iterable[Launch]) -> str:
    """Of all that machine code follows from, the kernels' sources and how they are launched."""
    digest = hashlib.sha256()
    for one in launches:
        made_of = (one.function.cache_key, one.signature, one.constants, one.aligned, one.options)
        digest.update(repr(made_of).encode())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print what is wrong, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ",".join(map(str, ARCHITECTURES))
    parser.add_argument("--architectures", default=known, help=f"some of {known}")
    parser.add_argument("--kernels", default="", help="only cases whose name starts so: time, space, norm, gelu")
    parser.add_argument("--output", type=Path, default=Path("kernel_resources.json"), help="result file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.architectures.split(",") if name not in known.split(",")]
    if unknown:
        parser.error(f"--architectures: got {unknown[0]!r}; allowed: {known}")
    launches: dict[tuple[Any, ...], Launch] = {}
    for name, case in cases().items():
        if name.startswith(options.kernels):
            with captured(name, launches):
                case()
    if not launches:
        parser.error(f"--kernels: got {options.kernels!r}; allowed: time, space, norm, gelu")
    chosen = [ARCHITECTURES[int(name)] for name in options.architectures.split(",")]
    rows = []
    for number, launch in enumerate(launches.values(), start=1):
        print(f"[{number}/{len(launches)}] {launch.function.__name__}, {launch.case}", file=sys.stderr, flush=True)
        rows += [compile_launch(launch, architecture) for architecture in chosen]
    result = {
        "command": ["python", "benchmarks/kernel_resources.py", *(sys.argv[1:] if arguments is None else arguments)],
        "triton": triton.__version__,
        "sources": sources_hash(launches.values()),
        "architectures": {str(one.capability): asdict(one) for one in chosen},
        "kernels": rows,
    }
    write_json(options.output, result)
    found = problems(rows)
    print("\n".join(found) or json.dumps({"kernels": len(rows), "problems": 0}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
