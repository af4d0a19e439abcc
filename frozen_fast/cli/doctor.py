"""`frozen-fast doctor`: checks whether this machine can run an experiment, and how to fix each problem.

look_at_machine examines the machine once; the checks are functions of its result, so tests can simulate faults.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from frozen_fast.common.machine import available_cores
from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.errors import UserError, reason

if TYPE_CHECKING:
    from frozen_fast.data.load.load_settings import LoadSettings

Level = Literal["ok", "warning", "fails"]

GIB = 2**30
_CHECKPOINT_GIB = 2.5
"""A checkpoint of the base model: weights and AdamW's two averages, fp32."""
_NEEDED = ("torch", "torchvision", "accelerate", "transformers", "safetensors", "av")


@dataclass(frozen=True)
class Finding:
    """One line of the output: the subject, the finding, and the advice if there is a problem."""

    level: Level
    what: str
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Properties of a machine.

    Attributes:
        broken: package that is needed -> why it cannot be imported.
        gpus_of_driver: GPUs that nvidia-smi lists; None: there is no nvidia-smi.
        gpus_of_torch: GPUs that PyTorch sees.
        cuda_of_torch: CUDA version that PyTorch was built for; empty: none.
        decodes_video: the driver's video decoder (NVDEC) can be loaded.
        attention: attention backend -> why it cannot run here.
        decoders: decoder backend -> why it cannot be used here.
        compiler: path of a C compiler; empty: none.
        deepspeed: version; empty: not installed.
        nccl: PyTorch has NCCL.
        shared_memory_bytes: free in /dev/shm; None: there is no such folder.
        open_files: soft limit of this process.
        cores: CPU cores that this process may use.
        disk_free_bytes: free where the run folder is.
        disk_error: why nothing can be written there; empty: it works.
        disk_bytes_per_second: of a file of 32 MiB, flushed.
        caches: cache folder -> why it cannot be read and written.
    """

    broken: dict[str, str] = field(default_factory=dict)
    gpus_of_driver: int | None = None
    gpus_of_torch: int = 0
    cuda_of_torch: str = ""
    decodes_video: bool = False
    attention: dict[str, str] = field(default_factory=dict)
    decoders: dict[str, str] = field(default_factory=dict)
    compiler: str = ""
    deepspeed: str = ""
    nccl: bool = False
    shared_memory_bytes: int | None = None
    open_files: int = 0
    cores: int = 1
    disk_free_bytes: int = 0
    disk_error: str = ""
    disk_bytes_per_second: float = 0.0
    caches: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is to run: the experiment, and what the accelerate file says of it."""

    config: ExperimentConfig
    processes: int = 1
    machines: int = 1
    use_cpu: bool = False
    deepspeed: bool = False

    @property
    def local_processes(self) -> int:
        """Processes on this machine."""
        return max(1, self.processes // max(1, self.machines))

    @property
    def on_gpu(self) -> bool:
        """Whether the launch means to use GPUs."""
        return not self.use_cpu and self.config.training.device != "cpu"


Check = Callable[[Machine, Launch], Iterator[Finding]]


def check_packages(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """Packages that every run needs."""
    for name, why in machine.broken.items():
        yield Finding("fails", f"package {name}", f"cannot be imported: {why}", "run launch/install.sh again")
    if not machine.broken:
        yield Finding("ok", "packages", f"{', '.join(_NEEDED)} import")


def check_gpus(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """GPUs, driver, and one process for each."""
    if machine.gpus_of_driver and not machine.gpus_of_torch and launch.on_gpu:
        built = f"built for CUDA {machine.cuda_of_torch}" if machine.cuda_of_torch else "built without CUDA"
        yield Finding(
            "fails",
            "GPUs",
            f"nvidia-smi lists {machine.gpus_of_driver}, PyTorch ({built}) sees none",
            "update the driver, or install a PyTorch build for its CUDA version; check CUDA_VISIBLE_DEVICES",
        )
    elif launch.on_gpu and machine.gpus_of_torch and launch.local_processes > machine.gpus_of_torch:
        yield Finding(
            "fails",
            "GPUs",
            f"{launch.local_processes} processes on this machine for {machine.gpus_of_torch} GPU(s)",
            "set --processes (num_processes of the accelerate file) to the number of GPUs",
        )
    elif not machine.gpus_of_torch and launch.config.training.device == "cuda":
        yield Finding("fails", "GPUs", "none, and training.device=cuda", "set training.device=auto or cpu")
    elif not machine.gpus_of_torch and launch.local_processes > 1 and launch.on_gpu and not launch.deepspeed:
        yield Finding(
            "fails",
            "GPUs",
            f"none, for {launch.local_processes} processes that expect one each",
            "use configs/accelerate/cpu_2.yaml, or set training.device=cpu",
        )
    else:
        yield Finding("ok", "GPUs", f"{machine.gpus_of_torch} for {launch.local_processes} process(es)")


def check_world_size(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """training.expected_world_size against the launch."""
    expected = launch.config.training.expected_world_size
    if expected is not None and expected != launch.processes:
        yield Finding(
            "fails",
            "world size",
            f"{launch.processes} process(es), training.expected_world_size={expected}",
            "start that many processes, or change training.expected_world_size",
        )
    if launch.processes % max(1, launch.machines):
        yield Finding(
            "fails",
            "world size",
            f"{launch.processes} processes on {launch.machines} machines",
            "set num_processes to a multiple of num_machines",
        )


def check_attention(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """The experiment's attention backend, and the fast backends for its device."""
    asked = launch.config.model.video.attention
    if asked in machine.attention:
        yield Finding(
            "fails",
            "attention",
            f"model.video.attention={asked}: {machine.attention[asked]}",
            "set model.video.attention=auto",
        )
    elif asked == "auto" and machine.gpus_of_torch and "xformers" in machine.attention:
        why = machine.attention["xformers"]
        yield Finding(
            "warning", "attention", f"xformers has no operator for this machine: {why}", "install the pinned xformers"
        )
    else:
        yield Finding("ok", "attention", f"{asked} runs")


def check_compiler(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """A C compiler: Triton and torch.compile need one; the CPU kernels fall back to PyTorch."""
    if machine.compiler:
        yield Finding("ok", "C compiler", machine.compiler)
    elif launch.config.training.compile:
        yield Finding(
            "fails",
            "C compiler",
            "none, and training.compile=true",
            "install gcc (apt-get install gcc), or set training.compile=false",
        )
    else:
        yield Finding("warning", "C compiler", "none: no Triton kernels, no C kernels", "install gcc")


def check_decoding(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """The experiment's decoder, and decoding on the GPU."""
    asked = launch.config.data.decode.backend
    if asked in machine.decoders:
        usable = [name for name in ("dali", "torchcodec", "decord", "pyav") if name not in machine.decoders]
        yield Finding(
            "fails",
            "decoding",
            f"data.decode.backend={asked}: {machine.decoders[asked]}",
            f"set data.decode.backend to one of: {', '.join(['auto', *usable])}",
        )
    elif machine.gpus_of_torch and launch.on_gpu and not machine.decodes_video:
        yield Finding(
            "warning",
            "decoding",
            "the driver's video decoder (libnvcuvid) cannot be loaded: decoding on the CPU",
            "in a container, start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
        )
    else:
        yield Finding("ok", "decoding", f"{asked} can be used")


def check_sharding(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """DeepSpeed if the launch uses it, NCCL between GPUs."""
    if launch.deepspeed and not machine.deepspeed:
        found = "not installed, and the accelerate file uses it"
        yield Finding("fails", "DeepSpeed", found, "pip install deepspeed")
    if launch.on_gpu and machine.gpus_of_torch and launch.processes > 1 and not machine.nccl:
        yield Finding("fails", "NCCL", "PyTorch was built without it", "install a CUDA build of PyTorch")


def _load_settings(machine: Machine, launch: Launch) -> LoadSettings:
    """Workers and threads of one rank's loader, with what the config leaves open filled in for this machine."""
    import torch

    from frozen_fast.data.load.load_settings import load_settings

    device = torch.device("cuda" if launch.on_gpu and machine.gpus_of_torch else "cpu")
    return load_settings(launch.config.data.decode, device, cores=machine.cores // launch.local_processes)


def check_shared_memory(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """Loader processes pass batches through /dev/shm."""
    workers = _load_settings(machine, launch).workers * launch.local_processes
    free = machine.shared_memory_bytes
    if not workers:
        yield Finding("ok", "shared memory", "not needed: data.decode.workers=0")
    elif free is None or free < GIB // 4:
        found = "no /dev/shm" if free is None else f"{free / GIB:.2f} GiB free in /dev/shm"
        yield Finding(
            "fails",
            "shared memory",
            f"{found} for {workers} loader process(es)",
            "start the container with --shm-size=8g (or --ipc=host), or set data.decode.workers=0",
        )
    else:
        yield Finding("ok", "shared memory", f"{free / GIB:.1f} GiB free")


def check_limits(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """Open files and cores."""
    decode = _load_settings(machine, launch)
    needed = 256 + 64 * (decode.workers + decode.threads)
    if machine.open_files < needed:
        yield Finding(
            "fails", "open files", f"limit {machine.open_files}, needed about {needed}", "run `ulimit -n 65536` first"
        )
    else:
        yield Finding("ok", "open files", f"limit {machine.open_files}")
    asked = launch.local_processes * (1 + decode.workers * decode.threads if decode.workers else decode.threads)
    if asked > 2 * machine.cores:
        yield Finding(
            "warning",
            "cores",
            f"{machine.cores} for {asked} computing and decoding threads",
            "lower data.decode.workers or data.decode.threads",
        )
    else:
        yield Finding("ok", "cores", str(machine.cores))


def check_disk(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """Space and speed of the disk for checkpoints."""
    folder = launch.config.run_folder.format(name=launch.config.name)
    free, kept = machine.disk_free_bytes / GIB, launch.config.checkpoints.keep + 1
    if machine.disk_error:
        found = f"{folder}: {machine.disk_error}"
        yield Finding("fails", "disk", found, "set run_folder to a folder that can be written")
    elif free < 0.5:
        yield Finding(
            "fails", "disk", f"{free:.2f} GiB free at {folder}", "free some space, or set run_folder to another disk"
        )
    elif free < kept * _CHECKPOINT_GIB:
        yield Finding(
            "warning",
            "disk",
            f"{free:.1f} GiB free at {folder}; {kept} checkpoints of the base model take "
            f"{kept * _CHECKPOINT_GIB:.1f} GiB",
            "free some space, or lower checkpoints.keep",
        )
    else:
        speed = machine.disk_bytes_per_second / 1e6
        yield Finding("ok", "disk", f"{free:.1f} GiB free at {folder}, {speed:.0f} MB/s written and flushed")


def check_caches(machine: Machine, launch: Launch) -> Iterator[Finding]:
    """Folders where compiled kernels and measured choices are kept; Triton does not run without its own."""
    needed = launch.config.training.compile or (launch.on_gpu and machine.gpus_of_torch)
    for folder, why in machine.caches.items():
        yield Finding(
            "fails" if needed else "warning",
            "cache",
            f"{folder}: {why}",
            "make the folder readable and writable, or set FROZEN_FAST_CACHE and TRITON_CACHE_DIR to other folders",
        )
    if not machine.caches:
        yield Finding("ok", "caches", "can be read and written")


CHECKS: tuple[Check, ...] = (
    check_packages,
    check_gpus,
    check_world_size,
    check_attention,
    check_compiler,
    check_decoding,
    check_sharding,
    check_shared_memory,
    check_limits,
    check_disk,
    check_caches,
)


def examine(machine: Machine, launch: Launch) -> list[Finding]:
    """Run every check."""
    return [finding for check in CHECKS for finding in check(machine, launch)]


def look_at_machine(run_folder: Path) -> Machine:
    """Examine this machine; takes seconds."""
    broken = {}
    for name in _NEEDED:
        try:
            import_module(name)
        except Exception as error:  # noqa: BLE001  a broken installation raises almost anything
            broken[name] = reason(error)
    if "torch" in broken:
        return Machine(broken=broken)
    import resource

    import torch

    from frozen_fast.data.decode.backends import unavailable_backends as unavailable_decoders
    from frozen_kernels import unavailable_backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    free, refusal, speed = _disk(run_folder)
    shared = Path("/dev/shm")
    return Machine(
        broken=broken,
        gpus_of_driver=_driver_gpus(),
        gpus_of_torch=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        cuda_of_torch=torch.version.cuda or "",
        decodes_video=_can_load("libnvcuvid.so.1"),
        attention=unavailable_backends(device, dtype),
        decoders=unavailable_decoders(),
        compiler=next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), ""),
        deepspeed=metadata.version("deepspeed") if find_spec("deepspeed") else "",
        nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        shared_memory_bytes=shutil.disk_usage(shared).free if shared.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        cores=available_cores(),
        disk_free_bytes=free,
        disk_error=refusal,
        disk_bytes_per_second=speed,
        caches=_broken_caches(),
    )


def read_launch(config: ExperimentConfig, accelerate: Path | None, processes: int | None) -> Launch:
    """Read the accelerate file; processes overrides its number of processes.

    Raises:
        UserError: the file cannot be read.
    """
    if accelerate is None:
        return Launch(config=config, processes=processes or 1)
    import yaml

    try:
        values = yaml.safe_load(accelerate.read_text(encoding="utf-8"))
        return Launch(
            config=config,
            processes=processes or int(values.get("num_processes", 1)),
            machines=int(values.get("num_machines", 1)),
            use_cpu=bool(values.get("use_cpu", False)),
            deepspeed=values.get("distributed_type") == "DEEPSPEED",
        )
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"--accelerate: got {accelerate}, which cannot be read ({reason(error)})") from None


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one config value")
    parser.add_argument("--accelerate", type=Path, metavar="FILE", help="the accelerate file of the launch")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="number of processes of the launch, instead of the file's"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="print problems only")


def doctor(arguments: argparse.Namespace) -> int:
    """Print the findings; return 2 if the run would fail."""
    config = load_config(arguments.config, arguments.overrides)
    launch = read_launch(config, arguments.accelerate, arguments.processes)
    findings = examine(look_at_machine(Path(config.run_folder.format(name=config.name))), launch)
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        sys.stdout.write(_lines(findings, quiet=arguments.quiet))
    return 2 if any(finding.level == "fails" for finding in findings) else 0


def _lines(findings: Sequence[Finding], *, quiet: bool) -> str:
    shown = [finding for finding in findings if not quiet or finding.level != "ok"]
    text = ""
    for finding in shown:
        text += f"{finding.level:<8} {finding.what}: {finding.found}"
        text += f". To do: {finding.advice}\n" if finding.advice else "\n"
    return text


def _broken_caches() -> dict[str, str]:
    """Cache folder -> why a file cannot be made in it, for those that cannot be used."""
    from frozen_kernels.cache import cache_folder

    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    broken = {}
    for folder in (cache_folder(), Path(triton)):
        there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
        try:
            os.listdir(there)
            with tempfile.NamedTemporaryFile(dir=there, prefix=".frozen_fast_doctor_"):
                pass
        except OSError as error:
            broken[str(folder)] = error.strerror or str(error)
    return broken


def _driver_gpus() -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.count("\n") if answer.returncode == 0 else 0


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _disk(run_folder: Path) -> tuple[int, str, float]:
    """(free bytes, why nothing can be written, bytes per second) at the nearest folder that exists."""
    there = next((path for path in (run_folder, *run_folder.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    size = 32 * 2**20
    if free < 2 * size:
        return free, "", 0.0
    try:
        began = time.perf_counter()
        with tempfile.NamedTemporaryFile(dir=there, prefix=".frozen_fast_doctor_") as file:
            file.write(b"\0" * size)
            file.flush()
            os.fsync(file.fileno())
        return free, "", size / (time.perf_counter() - began)
    except OSError as error:
        return free, f"cannot be written to ({error.strerror or error})", 0.0
