"""Devices, precision, processes, compilation and signals: the environment that a script runs in."""

import ctypes
import io
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from neogpt import model

logger = logging.getLogger("neogpt")
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # a run saves and stops


class Runtime(NamedTuple):
    """The rank of this process, the number of processes, and the device and precision of this process."""

    rank: int
    world_size: int
    device: torch.device
    precision: str  # of forward passes: "bf16" or "fp32"

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class Console(logging.StreamHandler):
    """A handler that raises the error if the reader of our output, for example `head`, has stopped."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise  # the error that `emit` caught
        super().handleError(record)


def print0(text: str) -> None:
    """Print on rank 0, and copy the text into log.txt while a run is open. Control characters are replaced."""
    logger.info("\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", line) for line in text.split("\n")))


def setup(device: str, precision: str = "auto", deterministic: bool = False, console: TextIO | None = None) -> Runtime:
    """Select device and precision; join torchrun's process group (nccl on CUDA, gloo on CPU). Raises ValueError."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ and (world_size > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1):
        raise ValueError("several processes without RANK: each would train alone; start them with torchrun")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some consoles cannot show what a model samples
    logger.handlers = [Console(console or sys.stdout)]  # where `print0` prints
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, colon, index = device.partition(":")
    if kind not in ("cuda", "mps", "cpu") or colon and not index.isdecimal() or (kind == "mps" and not has_mps):
        raise ValueError(f"--device={device} is not available: expected auto, cuda, mps or cpu")
    if kind == "mps" and world_size > 1:
        raise ValueError(f"--device={device} with {world_size} processes: use --device=cpu, or one process")
    if kind == "cuda":
        device = f"cuda:{int(index or os.environ.get('LOCAL_RANK', '0'))}"
        setup_cuda(device)
        set_determinism(deterministic)
    if kind == "cpu":
        keep_freed_memory()
    if world_size > 1:
        settings = dict(backend="nccl", device_id=torch.device(device)) if kind == "cuda" else dict(backend="gloo")
        # the others wait while rank 0 checks all shards
        torch.distributed.init_process_group(timeout=timedelta(minutes=30), **settings)
    if precision == "auto":
        fast_on_cuda = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if fast_on_cuda or kind == "cpu" and cpu_has_bf16() else "fp32"
    return Runtime(rank, world_size, torch.device(device), precision)


def cpu_has_bf16() -> bool:
    """Whether the CPU has units for bf16: about twice as fast as fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def residual_dtype(device: torch.device) -> str:
    """The dtype of the residual stream in bf16 runs: on CUDA bf16, which makes a training step of gpt2 4 % faster."""
    return "bf16" if device.type == "cuda" else "fp32"


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors; fetching new pages would take a sixth of a gpt2 step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def setup_cuda(device: str) -> None:
    """Set up PyTorch for this CUDA device. Raises ValueError if it does not exist."""
    n_devices = torch.cuda.device_count()
    if torch.device(device).index >= n_devices:
        found = f"PyTorch {torch.__version__} finds {n_devices} CUDA devices"
        raise ValueError(f"--device={device}, but {found}: use another --device, or at most one process per device")
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    torch.backends.cuda.enable_cudnn_sdp(False)  # which PyTorch prefers on Hopper: see `single_shape_attention`


def set_determinism(enabled: bool) -> None:
    """Set whether CUDA kernels must give the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # only warn, because cumsum has no deterministic kernel on CUDA; training steps use strict_determinism
    torch.use_deterministic_algorithms(enabled, warn_only=enabled)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    torch.utils.deterministic.fill_uninitialized_memory = False  # saves one pass over every new tensor
    # PyTorch 2.13 compiles a lazy backward pass without the deterministic flag: inductor may select kernels by timing
    from torch._functorch import config as functorch

    functorch.force_non_lazy_backward_lowering = enabled


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU according to NVIDIA's data sheets; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"A100": 312e12, "H100 PCIe": 756e12, "NVL": 835e12, "H100": 989e12, "H200": 989e12}
    return next((peak for key, peak in peaks.items() if key in name), None)


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() + " with bf16" * cpu_has_bf16()


def device_memory(device: torch.device) -> float:
    """The bytes of a GPU's memory, or this process's share of the machine's; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return float("inf")
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return n_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def all_reduce_sum(x: Tensor, rt: Runtime) -> Tensor:
    """The sum of x over all ranks, on this rank's device; x itself if there is one rank."""
    if rt.world_size > 1:
        x = x.to(rt.device, copy=True)
        torch.distributed.all_reduce(x)  # SUM: gloo has no AVG
    return x


def all_gather(value: Any, rt: Runtime) -> list:
    """The values of all ranks, by rank."""
    values = [value] * rt.world_size
    if rt.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def cleanup(rt: Runtime) -> None:
    """Leave the process group."""
    if rt.world_size > 1:
        torch.distributed.destroy_process_group()


def is_sharded(x: nn.Module | Tensor) -> bool:
    """Whether `training.wrap` has divided this model, or this tensor of a model, among the ranks."""
    return hasattr(x, "unshard") or hasattr(x, "full_tensor")  # the classes of FSDP2 take a second to import


def require_compiler(device: torch.device) -> None:
    """Raise ValueError unless the compiler that torch.compile needs is installed."""
    variable, default = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    if not (os.environ.get(variable) or shutil.which(default) or shutil.which("clang")):
        raise ValueError(f"--compile needs a compiler: install {default}, set {variable}, or use --compile=False")


@contextmanager
def strict_determinism() -> Iterator[None]:
    """Inside, nondeterministic kernels raise an error. In warn-only mode attention can use one in its backward pass."""
    mode = torch.get_deterministic_debug_mode()  # 0: determinism is off; 1: warn; 2: raise an error
    torch.set_deterministic_debug_mode(2 if mode else 0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def single_shape_attention() -> Iterator[None]:
    """Inside, attention may use cuDNN, unless determinism is on. cuDNN plans for up to a second for every new shape."""
    torch.backends.cuda.enable_cudnn_sdp(not torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernel(config: model.GPTConfig, B: int, T: int, rt: Runtime) -> str:
    """The attention kernel in training, which PyTorch selects by device, dtype, head size and versions."""
    dtype = torch.bfloat16 if rt.precision == "bf16" else torch.float32
    if config.attention == "manual" or rt.precision == "bf16" and rt.device.type == "cpu":
        return "manual attention"
    if rt.device.type == "mps":
        return "flash attention"
    shape = B, config.n_head, T, config.n_embd // config.n_head
    with strict_determinism(), single_shape_attention():
        q = torch.empty(shape, device=rt.device, dtype=dtype, requires_grad=True)
        name = SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True)).name.lower().replace("_", " ")
    slow = rt.device.type == "cuda" and name not in ("flash attention", "cudnn attention")
    return f"{name} (slow: flash attention needs bf16 and a head size of at most 256)" if slow else name


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; the host does not wait, as the copy starts from pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def async_to_host(x: Tensor) -> Callable[[], list]:
    """Start copying x to the host; return a function that waits for this copy only and returns the values."""
    if x.device.type != "cuda":
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def read() -> list:
        copied.synchronize()
        return host.tolist()

    return read


def now(device: torch.device) -> float | torch.cuda.Event:
    """The time when the work queued so far is done, for `seconds_between`."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds between two results of `now`. Waits for `end`."""
    if isinstance(end, float):
        return end - start
    end.synchronize()  # short: the losses, whose copy was queued just before `end`, have been read
    return start.elapsed_time(end) / 1e3


def stop_on_signals() -> Callable[[], bool]:
    """Catch Ctrl-C and signals that schedulers send before they kill; return a function that tells whether one came.
    A second Ctrl-C kills; other signals can come twice, from torchrun and Slurm. Ignored signals (nohup) stay ignored.
    """
    received = []

    def handle(signum: int, frame: object) -> None:
        received.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    for signum in signal.Signals:
        if signum.name in STOP_SIGNALS and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handle)
    return lambda: bool(received)
