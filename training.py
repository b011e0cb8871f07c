"""What every training script shares, as functions: command line, devices, precision, schedule, the training
step and the log. Each script keeps its own loop and calls these from it.
"""

import contextlib
import difflib
import io
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

MAX_BAD_STEPS = 10  # so many steps in a row without a finite gradient end the run
SAME_STOP = 5.0  # seconds in which a second SIGTERM is taken for the first

# -----------------------------------------------------------------------------
# Command line

Config = TypeVar("Config")


def parse(configs: dict[str, Config], doc: str, args: list[str] | None = None) -> Config:
    """Constants -> command line: `script.py [NAME] [--constant=value …]`, where NAME picks one of `configs`.

    The first configuration is the default. The comments behind the constants become the help; `--max_lr` and
    `--max-lr` are the same, `--chat` is `--chat=True`; an unknown constant ends the program with a
    suggestion. `args` defaults to sys.argv[1:].
    """
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    name = args.pop(0) if args and not args[0].startswith("-") else next(iter(configs))
    if name not in configs:
        raise SystemExit(
            f"unknown configuration {name!r}: expected one of {', '.join(configs)}, then --constant=value …"
        )
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    known = [field.name for field in fields(configs[name])]
    flags = {f"__{field.name}" for field in fields(configs[name]) if "bool" in str(field.type)}
    alone = [not after or after.startswith("--") for after in [*args[1:], ""]]
    args = [f"{a}=True" if a.replace("-", "_") in flags and bare else a for a, bare in zip(args, alone)]
    for option in (arg[2:].split("=")[0] for arg in args if arg.startswith("--")):
        if option.replace("-", "_") not in (*known, "help"):
            close = difflib.get_close_matches(option.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean --{close[0]}?" if close else "see --help"
            raise SystemExit(f"unknown constant --{option}: {hint}" if is_rank_0 else 2)
    return tyro.cli(
        type(configs[name]),
        default=configs[name],
        args=args,
        description=f"{doc.strip()}\n\nConfigurations: {', '.join(configs)}. Constants of {name!r}:",
        config=(tyro.conf.FlagConversionOff,),
        console_outputs=is_rank_0,
    )


# -----------------------------------------------------------------------------
# Devices and precision


class Dist(NamedTuple):
    """This process among those that train together; alone it is rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device


def check_least(config: object, least: int, *names: str) -> None:
    """SystemExit that names the first of these constants that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise SystemExit(f"{name}={getattr(config, name)} must be at least {least}")


def check_recipe(config: object) -> None:
    """SystemExit that names the first constant of optimizer, schedule or randomness that is out of range.

    config: a Config of any script; what it does not have is passed over.
    """
    for what, fits, names in (
        ("at least 0", lambda x: x >= 0, ("max_lr", "warmup_steps", "weight_decay", "eps", "grad_clip")),
        ("at least 0 and below 1", lambda x: 0 <= x < 1, ("beta1", "beta2", "momentum")),
        ("above 0", lambda x: 0 < x < float("inf"), ("epochs",)),
        ("from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63, ("seed",)),
        ("from 0 to 1", lambda x: 0 <= x <= 1, ("min_lr_frac", "decay_frac", "warmup_frac")),
    ):
        for name in names:
            if hasattr(config, name) and not fits(getattr(config, name)):  # NaN fits nowhere
                raise SystemExit(f"{name}={getattr(config, name)} must be {what}")


def require_compiler(device: torch.device) -> None:
    """SystemExit unless there is the compiler that torch.compile works with."""
    if device.type == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise SystemExit(
            "compiling for CUDA needs a C compiler, and none was found: install gcc, or take --compile=False"
        )
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # a slow import
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise SystemExit(
                "compiling on a CPU needs a C++ compiler, and none was found: install g++, or take "
                "--compile=False"
            ) from error


def pick_T(T: int | None, block_size: int) -> int:
    """T, or the model's block_size where it is None; SystemExit if the model cannot hold it."""
    if T is not None and not 1 <= T <= block_size:
        raise SystemExit(f"T={T} must be at least 1 and at most the model's block_size={block_size}")
    return block_size if T is None else T


def setup(device: str, deterministic: bool) -> Dist:
    """Choose the device and, under torchrun, join the process group (nccl on CUDA, gloo on CPU).

    device: "auto" takes CUDA, else MPS, else the CPU. deterministic: CUDA kernels that give the same bits
    every time.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every console can show what a young model samples
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cuda", "mps", "cpu") or (kind == "mps" and not torch.backends.mps.is_available()):
        raise SystemExit(f"--device={device} cannot be had here: expected auto, cuda, mps or cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(
                f"--device={device}, but this PyTorch ({torch.__version__}) finds no CUDA device"
            )
        if torch.device(device).index is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if torch.device(device).index >= torch.cuda.device_count():
            raise SystemExit(
                f"no device {device} here, only {torch.cuda.device_count()} of CUDA: one process for each"
            )
        torch.cuda.set_device(torch.device(device))
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
        # PyTorch prefers cuDNN's attention on Hopper, which is planned anew, for up to a second, for every
        # new shape; train_gpt2.py, which has one, takes it where it need not be exact
        torch.backends.cuda.enable_cudnn_sdp(False)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # where no such kernel exists (sampling's cumsum) a warning; training is strict: exact_kernels
            torch.use_deterministic_algorithms(True, warn_only=True)
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            # not a pass over every new tensor
            torch.utils.deterministic.fill_uninitialized_memory = False
            # compile the backward pass with the forward: left to autograd's own thread, as it is by default,
            # PyTorch 2.13's compiler has forgotten there that it must not choose kernels by timing them
            from torch._functorch import config as functorch

            functorch.force_non_lazy_backward_lowering = True
    if world_size == 1:
        return Dist(0, 1, torch.device(device))
    if kind == "mps":
        raise SystemExit("several processes need CUDA devices or --device=cpu, not mps")
    # half an hour, because rank 0 may read all shards while the others wait
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(minutes=30),
        device_id=torch.device(device) if kind == "cuda" else None,
    )
    return Dist(int(os.environ["RANK"]), world_size, torch.device(device))


def cleanup(dist: Dist) -> None:
    """Leave the process group."""
    if dist.world_size > 1:
        torch.distributed.destroy_process_group()


def barrier(dist: Dist) -> None:
    """Wait for all ranks."""
    if dist.world_size > 1:
        torch.distributed.barrier()


def total(x: Tensor, dist: Dist) -> Tensor:
    """The sum of x over all ranks, on this rank's device; x itself when there is one rank."""
    if dist.world_size > 1:
        x = x.to(dist.device, copy=True)
        torch.distributed.all_reduce(x)  # SUM: gloo has no AVG
    return x


def pick_precision(precision: str, device: torch.device) -> str:
    """ "bf16" or "fp32": what was asked for, and for "auto" bf16 where the device is faster with it.

    That is CUDA with bf16 units, and CPUs with AMX; other CPUs are slower in bf16, and MPS support varies.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of every forward pass; `precision` as `pick_precision` returns it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU by NVIDIA's data sheets, or None for one we have no figure for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}
    return next((peak for key, peak in peaks.items() if key in name), None)


def attention_kernel(config: Any, B: int, T: int, amp: torch.autocast, device: torch.device) -> str:
    """The kernel that attention takes in training, for the log; a warning where it is a slow one.

    config: model.GPTConfig. PyTorch chooses by device, dtype, head size and versions, and says nothing.
    """
    if config.attention == "manual":
        return "written-out products"
    if device.type == "mps":
        return "PyTorch's choice"  # it does not tell
    with amp, exact_kernels():
        q = torch.empty(B, config.n_head, T, config.n_embd // config.n_head, device=device)
        dtype = torch.bfloat16 if amp._enabled else q.dtype
        q = q.to(dtype).requires_grad_()
        choice = torch._fused_sdp_choice(q, q, q, None, 0.0, True)
    name = SDPBackend(choice).name.lower().replace("_", " ")
    slow = device.type == "cuda" and name not in ("flash attention", "cudnn attention")
    return f"{name} (slow: bf16 and a head size up to 256 would allow flash attention)" if slow else name


def fit_micro_batch(run: Callable[[int], None], sizes: list[int], coming: int, device: torch.device) -> int:
    """The largest of `sizes` (rows) whose forward and backward pass, `run(rows)`, fits into a CUDA device's
    memory.

    Memory is a constant plus so much a row, so two small runs tell. Gradients stay behind: zero them.
    `coming`: bytes that are to be had later.
    """

    def peak(rows: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        run(rows)
        return torch.cuda.max_memory_allocated(device)

    fitting = []
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        peak(1)  # the first run also allocates gradients and workspaces
        one = peak(1)
        fitting = sizes[:1]
        two = peak(2)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        room = 0.9 * (free + torch.cuda.memory_allocated(device)) - coming
        fitting = [rows for rows in sizes if one + (two - one) * (rows - 1) <= room]
    if not fitting:
        size = torch.cuda.get_device_properties(device).total_memory
        raise SystemExit(
            f"not even B={min(sizes)} fits into {size / 1e9:.1f} GB of GPU memory: take a smaller model or T"
        )
    return max(fitting)


# -----------------------------------------------------------------------------
# Schedule and step


def cosine_lr(step: int, *, max_steps: int, warmup_steps: int, max_lr: float, min_lr_frac: float) -> float:
    """Linear warmup to max_lr, then half a cosine to min_lr_frac · max_lr at max_steps (GPT-3, app. B)."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return max_lr * (min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


def wsd_lr(
    step: int, *, max_steps: int, warmup_steps: int, max_lr: float, min_lr_frac: float, decay_frac: float
) -> float:
    """Warmup, stable, decay: linear to max_lr, level, and over the last decay_frac of max_steps linear down
    to min_lr_frac · max_lr (arXiv:2405.18392). A run may be made longer until the decay begins.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    left = min(1.0, max(0, max_steps - step) / max(1, decay_frac * max_steps))
    return max_lr * (min_lr_frac + (1 - min_lr_frac) * left)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Within, deterministic means deterministic: attention's backward pass is not while it only warns."""
    if not torch.is_deterministic_algorithms_warn_only_enabled():  # not asked for, or strict already
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def backward(
    model: nn.Module,
    batch: dict[str, Any],
    loss_fn: Callable[[nn.Module, dict[str, Any]], Tensor],
    scale: float | Tensor,
) -> Tensor:
    """One forward and backward pass of scale · loss; returns the loss, summed over the batch, detached."""
    with exact_kernels():
        loss = loss_fn(model, batch)
        (loss * scale).backward()
    return loss.detach()


class StepResult(NamedTuple):
    """What a training step did."""

    loss: float  # mean over the units of the whole step
    grad_norm: float  # before clipping
    skipped: bool  # loss or gradient was not finite, so no parameter moved
    stop: bool  # some rank was asked to stop


def read_later(x: Tensor) -> Callable[[], list]:
    """Start to copy x to the host; the function returned waits for that, not for what was queued since."""
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


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[dict[str, Any]],
    loss_fn: Callable[[nn.Module, dict[str, Any]], Tensor],
    *,
    lr: float,
    grad_clip: float,
    dist: Dist,
    stop: bool = False,
) -> Callable[[], StepResult]:
    """One optimizer step over all micro-batches of all ranks, equal to one big batch whatever the split.

    loss_fn(model, batch) returns the loss summed over the batch's units, and batch["n"] is their number:
    dividing by the units of the whole step is exact where a mean of means is not. grad_clip: the largest
    gradient norm, 0 for any. optimizers: those that heed `found_inf`, as PyTorch's fused ones and our Muon.

    Nothing here waits for a GPU: the step is queued, and the function returned waits for its numbers.
    """
    n = sum(batch["n"] for batch in micro_batches)
    if dist.world_size > 1:
        n = total(torch.full((), n, dtype=torch.float64, device=dist.device), dist)
    loss_sum = torch.zeros((), device=dist.device)
    for i, batch in enumerate(micro_batches):
        # DDP reads this flag in the forward too; gradients travel once a step, with the last micro-batch
        accumulate = dist.world_size > 1 and i < len(micro_batches) - 1
        with model.no_sync() if accumulate else nullcontext():
            loss_sum += backward(model, batch, loss_fn, dist.world_size / n)  # DDP averages; we want the sum
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # one message: the same numbers, hence the same decision, on every rank
    sums = total(torch.stack([loss_sum, torch.full_like(loss_sum, stop)]), dist)
    numbers = torch.stack([sums[0] / n, norm, sums[1]])
    bad = (~numbers.isfinite()).any().float()
    for optimizer in optimizers:
        if dist.device.type == "mps" and bad:  # whose AdamW does not know found_inf
            optimizer.zero_grad()
            continue
        optimizer.found_inf = bad  # decided on the device: where it is 1, a step changes nothing
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    read = read_later(numbers)

    def result() -> StepResult:
        loss, norm, stops = read()
        return StepResult(loss, norm, not (math.isfinite(loss) and math.isfinite(norm)), stops > 0)

    return result


@torch.no_grad()
def validate(raw: nn.Module, val: Any, n_tokens: int, rows: int, amp: torch.autocast, dist: Dist) -> float:
    """Mean loss, nats per token, over the first n_tokens of the validation windows, `rows` at a time.

    val: data.Windows.
    """
    n = max(1, min(len(val), n_tokens // val.T))
    mine = torch.arange(n)[dist.rank :: dist.world_size]
    losses = [torch.zeros((), device=dist.device)]  # on the device: nothing waits until all are in
    for windows in mine.split(rows):
        xy = torch.from_numpy(val.read(windows.numpy()))  # (rows, T + 1)
        xy = (xy.pin_memory() if dist.device.type == "cuda" else xy).to(dist.device, non_blocking=True)
        with amp:
            _, loss = raw(xy[:, :-1], xy[:, 1:], reduction="sum")
        losses.append(loss)
    return total(torch.stack(losses).cpu().double().sum(), dist).item() / (n * val.T)


def count_bad(bad_steps: int, out: StepResult) -> int:
    """The number of skipped steps in a row after this one; SystemExit when it reaches MAX_BAD_STEPS."""
    bad_steps = bad_steps + 1 if out.skipped else 0
    if bad_steps == MAX_BAD_STEPS:
        raise SystemExit(
            f"loss or gradient not finite, {bad_steps} steps in a row (loss {out.loss}): "
            "lower max_lr, lengthen warmup_steps, or try --precision=fp32; the last checkpoint is unharmed"
        )
    return bad_steps


def stop_on_signals() -> Callable[[], bool]:
    """Catch the first Ctrl-C or SIGTERM; the returned function says whether one came. A second one kills,
    but not a SIGTERM that comes at once: a launcher and a scheduler may both send the first.
    """
    received = []

    def note(signum: int, frame: object) -> None:
        received.append(time.monotonic())
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
        elif received[-1] - received[0] > SAME_STOP:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return lambda: bool(received)


# -----------------------------------------------------------------------------
# Log


def code_revision() -> str:
    """What git calls this version of the code; "" where there is no git."""
    if not shutil.which("git"):
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


class Log:
    """<folder>/log.txt, append-only: a `step name value` a line, notes behind `#`. Silent but on rank 0."""

    def __init__(self, folder: Path, dist: Dist) -> None:
        self.file = None
        if dist.rank == 0:
            path = Path(folder) / "log.txt"
            torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # by line: a killed run loses none
            if torn:
                self.file.write("\n")

    def header(self, config: object, **facts: object) -> None:
        """Note the start of a run: configuration, revision of the code, versions, and what else is given."""
        facts = dict(code=code_revision(), torch=torch.__version__, python=platform.python_version(), **facts)
        self.note(" ".join(f"{key}={value}" for key, value in facts.items() if value), quiet=True)
        self.note(" ".join(f"{key}={value!r}" for key, value in asdict(config).items()), quiet=True)

    def write(self, lines: str) -> None:
        """Append lines; SystemExit where the disk is full, say."""
        try:
            self.file.write(lines)
        except OSError as error:
            path, self.file = self.file.name, None
            raise SystemExit(f"cannot write {path}: {error.strerror}; mend that and start again") from error

    def scalars(self, step: int, **values: float) -> None:
        """Write numbers with the nine digits that tell any two float32 apart."""
        if self.file:
            self.write("".join(f"{step} {name} {value:.9g}\n" for name, value in values.items()))

    def note(self, text: str, quiet: bool = False) -> None:
        """Write a line behind `#`, and print it unless `quiet`; samples may hold control characters."""
        if self.file:
            lines = [re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", line) for line in text.splitlines()]
            self.write("# " + "\\n".join(lines) + "\n")
            if not quiet:
                print("\n".join(lines), flush=True)

    def line(
        self, step: int, max_steps: int, out: StepResult, lr: float, dt: float, units: int, mfu: float | None
    ) -> None:
        """Print one aligned console line for a step that took dt seconds for `units` tokens."""
        if self.file:
            left = timedelta(seconds=round(dt * (max_steps - step)))
            share = f" | MFU {mfu:5.1%}" if mfu else ""
            bad = " | skipped: not finite" if out.skipped else ""
            print(
                f"step {step:6d}/{max_steps} | loss {out.loss:8.5f} | lr {lr:.2e} | "
                f"norm {out.grad_norm:7.4f} | "
                f"{dt * 1e3:8.1f} ms | {units / dt:9,.0f} tok/s{share} | {left} left{bad}",
                flush=True,
            )
