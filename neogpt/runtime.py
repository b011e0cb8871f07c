"""Devices, precision, processes, compilation and signals: the environment that a script runs in."""

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
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, TextIO

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

from neogpt import model

logger = logging.getLogger("neogpt")


class Runtime(NamedTuple):
    """This process among the processes that train together, and how it computes."""

    rank: int
    world_size: int
    device: torch.device
    precision: str  # of forward passes: "bf16" or "fp32"

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def print0(text: str) -> None:
    """Print on rank 0, and copy the text into log.txt while a run is open. Control characters are replaced."""
    logger.info("\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", line) for line in text.split("\n")))


def setup(
    device: str = "auto", precision: str = "auto", deterministic: bool = False, console: TextIO | None = None
) -> Runtime:
    """Select device and precision and, under torchrun, join the process group (nccl on CUDA, gloo on CPU).

    device: "auto" selects CUDA, else MPS, else the CPU. precision: "auto" selects bf16 where it is faster.
    deterministic: CUDA kernels that give the same bits every time. console: of `print0`, default stdout. Raises
    ValueError if the device does not exist.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some consoles cannot show what a model samples
    logger.handlers = [logging.StreamHandler(console or sys.stdout)]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cuda", "mps", "cpu") or index and not index.isdecimal() or (kind == "mps" and not has_mps):
        raise ValueError(f"--device={device} is not available: expected auto, cuda, mps or cpu")
    if kind == "cuda":
        n_devices = torch.cuda.device_count()
        index = int(index or os.environ.get("LOCAL_RANK", "0"))
        if index >= n_devices:
            found = f"{n_devices} CUDA devices, start at most one process per device"
            raise ValueError(f"--device=cuda:{index}, but PyTorch {torch.__version__} finds {found}")
        device = f"cuda:{index}"
        setup_cuda(torch.device(device), deterministic)
    if world_size > 1 and kind == "mps":
        raise ValueError("several processes need CUDA devices or --device=cpu, not mps")
    if world_size > 1:
        torch.distributed.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(minutes=30),  # rank 0 may read all shards while the others wait
            device_id=torch.device(device) if kind == "cuda" else None,
        )
    return Runtime(rank, world_size, torch.device(device), pick_precision(precision, torch.device(device)))


def setup_cuda(device: torch.device, deterministic: bool) -> None:
    """Process-wide settings of CUDA."""
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    # On Hopper PyTorch prefers cuDNN attention, which plans for up to a second for every new shape. train_gpt2.py,
    # which has a single shape, enables it where runs need not be exact.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # only a warning where no deterministic kernel exists (cumsum); training steps use strict_determinism
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    torch.utils.deterministic.fill_uninitialized_memory = False  # saves one pass over every new tensor
    # Compile the backward pass together with the forward pass. Compiled lazily, it runs on the autograd thread, where
    # PyTorch 2.13 does not see the deterministic flag, so inductor may select kernels by timing.
    from torch._functorch import config as functorch

    functorch.force_non_lazy_backward_lowering = True


def pick_precision(precision: str, device: torch.device) -> str:
    """ "bf16" or "fp32"; "auto" selects bf16 on CUDA with bf16 units and on CPUs with AMX."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU according to NVIDIA's data sheets; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}
    return next((peak for key, peak in peaks.items() if key in name), None)


def barrier(rt: Runtime) -> None:
    """Wait for all ranks."""
    if rt.world_size > 1:
        torch.distributed.barrier()


def all_reduce_sum(x: Tensor, rt: Runtime) -> Tensor:
    """The sum of x over all ranks, on this rank's device; x itself if there is one rank."""
    if rt.world_size > 1:
        x = x.to(rt.device, copy=True)
        torch.distributed.all_reduce(x)  # SUM: gloo has no AVG
    return x


def cleanup(rt: Runtime) -> None:
    """Leave the process group."""
    if rt.world_size > 1:
        torch.distributed.destroy_process_group()


def wrap(raw: nn.Module, rt: Runtime, compile: bool, dynamic: bool = False) -> nn.Module:
    """The model of the training step: compiled if asked for, and wrapped by DDP if there are several ranks.

    Unless `dynamic`, the forward pass must be one graph with fixed shapes; anything else is an error.
    """
    if compile:
        require_compiler(rt.device)
        raw = torch.compile(raw, fullgraph=not dynamic, dynamic=dynamic)
    return DistributedDataParallel(raw) if rt.world_size > 1 else raw


def require_compiler(device: torch.device) -> None:
    """Raise ValueError unless the compiler that torch.compile needs is installed."""
    variable, default = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    if not (os.environ.get(variable) or shutil.which(default) or shutil.which("clang")):
        raise ValueError(f"--compile needs a compiler: install {default}, set {variable}, or use --compile=False")


@contextmanager
def strict_determinism() -> Iterator[None]:
    """Inside, nondeterministic kernels are refused. In warn-only mode attention may pick such a backward pass."""
    if not torch.is_deterministic_algorithms_warn_only_enabled():  # not deterministic, or strict already
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def attention_kernel(config: model.GPTConfig, B: int, T: int, rt: Runtime) -> str:
    """The name of the attention kernel in training. PyTorch selects it by device, dtype, head size and versions."""
    if config.attention == "manual" or rt.device.type == "mps":
        return f"{config.attention} attention"
    dtype = torch.bfloat16 if rt.precision == "bf16" else torch.float32
    shape = B, config.n_head, T, config.n_embd // config.n_head
    with strict_determinism():
        q = torch.empty(shape, device=rt.device, dtype=dtype, requires_grad=True)
        name = SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True)).name.lower().replace("_", " ")
    slow = rt.device.type == "cuda" and name not in ("flash attention", "cudnn attention")
    return f"{name} (slow: flash attention needs bf16 and a head size of at most 256)" if slow else name


def fit_micro_batch(step: Callable[[int], None], sizes: list[int], reserved: int, rt: Runtime) -> int:
    """The largest of `sizes` (rows) whose forward and backward pass, `step(rows)`, fits into CUDA memory.

    reserved: bytes to leave free, for optimizer state and DDP buckets. `step` leaves gradients behind. With several
    ranks the fullest GPU decides. Raises ValueError if no size fits.
    """
    fitting = 0
    for rows in sorted(sizes, reverse=True):
        with suppress(torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(rt.device)
            free = torch.cuda.mem_get_info(rt.device)[0] + torch.cuda.memory_allocated(rt.device)
            step(rows)
            if torch.cuda.max_memory_allocated(rt.device) + reserved <= 0.95 * free:
                fitting = rows
                break
    largest = torch.tensor(fitting, device=rt.device)
    if rt.world_size > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MIN)
    if not largest:
        raise ValueError(f"--B={min(sizes)} does not fit into the memory of {rt.device}: use a smaller --model or --T")
    return int(largest)


def async_to_host(x: Tensor) -> Callable[[], list]:
    """Start copying x to the host; return a function that waits for this copy only and returns the values."""
    if x.device.type != "cuda":
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list:
        copied.synchronize()
        return host.tolist()

    return read


SAME_STOP = 5.0  # seconds; SIGTERMs closer than this count as one: torchrun and Slurm both send it


def stop_on_signals() -> Callable[[], bool]:
    """Catch the first Ctrl-C or SIGTERM; return a function that tells whether one came. A second one kills."""
    received = []

    def handle(signum: int, frame: object) -> None:
        received.append(time.monotonic())
        if signum == signal.SIGINT or received[-1] - received[0] > SAME_STOP:
            signal.signal(signum, signal.SIG_DFL)
        if received[-1] - received[0] > SAME_STOP:
            os.kill(os.getpid(), signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    return lambda: bool(received)
