"""Measure what the code around the model costs: medians of alternating repeats, side by side in one run.

    python bench.py train                     # training steps against a plain PyTorch loop
    python bench.py train --models gpt2 --tokenizer=gpt2 --T=1024 --B 1 --total_batch_size=1024 --steps=2
    python bench.py train --profile           # and where the time goes, as a trace for chrome://tracing
    python bench.py choices --models gpt2 …   # our step, and the same with one choice made otherwise
    python bench.py data --data=edu_fineweb10B --models gpt2 --T=1024    # reading batches
    python bench.py sample                    # prefill and decoding against the loop without a cache
    python bench.py hellaswag                 # HellaSwag's rows against scoring one at a time
    python bench.py tokenize --data='books-*.parquet'    # fineweb.py against tiktoken in a bare pool

Each prints a table and writes <out_dir>/<what>.json: command, hardware, versions, and median, smallest and
largest rate of the repeats; the first repeat warms up and is not counted. Figures from our machines are in
bench/RESULTS.md. Nothing here is a test: machines are noisy.
"""

import contextlib
import functools
import glob
import importlib.metadata
import io
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    what: Literal["train", "choices", "data", "tokenize", "sample", "hellaswag"] = "train"  # the measurement
    data: str = str(Path(__file__).parent / "input.txt")  # text, shards, parquet files, or rows
    tokenizer: Literal["gpt2", "bytes"] = "bytes"  # of the data
    models: tuple[str, ...] = ("demo",)  # sizes of model.py's table
    T: int = 256  # sequence length, tokens
    B: tuple[int, ...] = (8,)  # sequences per forward pass; sample: streams
    total_batch_size: int = 8 * 256  # tokens per optimizer step
    optimizer: Literal["adamw", "muon"] = "adamw"  # of our step; the plain loop has AdamW
    steps: int = 10  # steps of a repeat
    repeats: int = 7  # alternating repeats; the first one warms up and is not counted
    new_tokens: int = 512  # sample: drawn behind a prompt of `prompt_tokens`
    prompt_tokens: int = 16  # sample: of random ids
    stride: int = 16  # sample: the uncached loop runs at every so many-th length, for the rest it is the same
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool | None = None  # None: train and choices on CUDA, as in training; sample with and without
    profile: bool = False  # train: also write trace-<model>-B<B>.json.gz, of three of our steps
    workers: int = 0  # tokenize: processes; 0: one a core
    rows: int = 40  # hellaswag: rows of a repeat, from all over the file
    out_dir: str = "out/bench"  # where <what>.json goes


CONFIGS = {
    "train": Config(),
    "choices": Config(what="choices", repeats=4),
    "data": Config(what="data"),
    "tokenize": Config(what="tokenize", tokenizer="gpt2", repeats=4),
    "sample": Config(what="sample", models=("gpt2",), B=(1, 8), repeats=4),
    "hellaswag": Config(
        what="hellaswag",
        data=".cache/hellaswag/hellaswag_val.jsonl",
        tokenizer="gpt2",
        models=("gpt2",),
        repeats=4,
    ),
}

Row = dict[str, Any]  # one line of the table and of the json


def side_by_side(runs: dict[str, Callable[[], float]], repeats: int, unit: str) -> list[Row]:
    """Run all `runs` in turn, forth and back, `repeats` times; print and return the median of the rates each
    returns.

    One of several that fails, for want of memory say, is printed and left out; not the first, by which the
    others are measured, nor the only other.
    """
    from files import one_line

    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(rates)[:: -1 if repeat % 2 else 1]:
            try:
                rate = runs[name]()
            except RuntimeError as error:
                if name == next(iter(runs)) or len(rates) == 2:
                    raise
                print(f"{name:>30}: failed: {one_line(error)}", flush=True)
                del rates[name]
                continue
            if repeat:
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = next(iter(medians.values()))
    rows = []
    for name, values in rates.items():
        least, most, ratio = min(values), max(values), medians[name] / base
        print(
            f"{name:>30}: {medians[name]:12,.1f} {unit}  ({least:,.1f} … {most:,.1f})  x {ratio:.3f}",
            flush=True,
        )
        rows.append(dict(name=name, unit=unit, median=medians[name], min=least, max=most, ratio=ratio))
    return rows


def write_json(cfg: Config, rows: list[Row]) -> None:
    """Write <out_dir>/<what>.json: what was measured, on what, with which versions."""
    from files import written_whole
    from training import code_revision

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    hardware = dict(cpu=cpu, cores=os.cpu_count(), system=platform.platform())
    versions = dict(python=platform.python_version())
    for package in ("torch", "numpy", "tiktoken", "gigatoken", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            hardware |= dict(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    path = Path(cfg.out_dir) / f"{cfg.what}.json"
    facts = dict(command=" ".join(sys.argv), code=code_revision(), hardware=hardware, versions=versions)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(facts | dict(config=asdict(cfg), results=rows), indent=1) + "\n")
    print(f"written: {path}")


def size(model: str) -> dict[str, Any]:
    """The shape of a model by name; SystemExit if there is none."""
    from model import SIZES

    if model not in SIZES:
        raise SystemExit(f"unknown model {model!r}: expected one of {', '.join(SIZES)}")
    return SIZES[model]


# -----------------------------------------------------------------------------
# Training


def synchronize(device: Any) -> None:
    """Wait until the device has done what was queued."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Choice:
    """What our training step may be made of; the defaults are what train_gpt2.py takes."""

    compile: bool | None = None  # None: on CUDA
    mode: str | None = None  # of torch.compile
    padded: bool = True  # the vocabulary, to a multiple of 64
    attention: str = "flash"
    deterministic: bool = True  # kernels
    gelu: str | None = None  # None: as the size has it
    precision: str = "auto"
    late: bool = True  # read a step's loss when the next one is queued


class Trainer:
    """A model with its optimizer, and runs of training steps over real batches, timed."""

    def __init__(self, cfg: Config, model: str, B: int, choice: Choice) -> None:
        import torch

        from data import Windows, get_tokenizer, open_data
        from model import GPT, GPTConfig, pad_vocab
        from optimizers import make_optimizers
        from training import Log, autocast, pick_precision, setup

        self.cfg, self.B, self.choice = cfg, B, choice
        self.dist = setup(cfg.device, choice.deterministic)
        wanted = cfg.precision if choice.precision == "auto" else choice.precision
        self.amp = autocast(pick_precision(wanted, self.dist.device), self.dist.device)
        tokenizer = get_tokenizer(cfg.tokenizer)
        n_tokens = tokenizer.n_vocab
        vocab_size = pad_vocab(n_tokens) if choice.padded else n_tokens
        shape = size(model) | dict(block_size=cfg.T, n_tokens=n_tokens, vocab_size=vocab_size)
        shape |= dict(gelu=choice.gelu) if choice.gelu else {}
        self.train = Windows(open_data(cfg.data, tokenizer)[0], cfg.T)
        self.N = cfg.total_batch_size // cfg.T
        if cfg.total_batch_size % (cfg.T * B):
            raise SystemExit(
                f"total_batch_size={cfg.total_batch_size} is not divisible by T x B = {cfg.T * B}"
            )
        torch.manual_seed(0)
        self.raw = GPT(GPTConfig(**shape, attention=choice.attention)).to(self.dist.device)
        settings = dict(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        self.optimizers = make_optimizers(self.raw, optimizer=cfg.optimizer, **settings)
        compiled = self.dist.device.type == "cuda" if choice.compile is None else choice.compile
        options = dict(fullgraph=True, dynamic=False, mode=choice.mode)
        self.model = torch.compile(self.raw, **options) if compiled else self.raw
        self.folder = tempfile.TemporaryDirectory()  # removed with the trainer
        self.log = Log(Path(self.folder.name), self.dist)

    def read(self, step: int) -> Any:
        """A step's tokens, (N, T + 1), on the host."""
        import torch

        from data import step_windows

        xy = torch.from_numpy(self.train.read(step_windows(step, self.N, len(self.train), 1)))
        return xy.pin_memory() if self.dist.device.type == "cuda" else xy

    def loss(self, model: Any, batch: dict) -> Any:
        """The summed loss of a micro-batch."""
        with self.amp:
            return model(batch["x"], batch["y"], reduction="sum")[1]

    def plain(self) -> float:
        """Tokens/s of forward, backward, clip and AdamW written down, on one batch that stays."""
        import torch

        from training import exact_kernels

        xy = self.read(0).to(self.dist.device)
        [optimizer] = self.optimizers
        synchronize(self.dist.device)
        t0 = time.perf_counter()
        for _ in range(self.cfg.steps):
            for rows in xy.split(self.B):
                with exact_kernels():  # as ours has them
                    with self.amp:
                        _, loss = self.model(rows[:, :-1], rows[:, 1:])
                    (loss * len(rows) / self.N).backward()
            torch.nn.utils.clip_grad_norm_(self.raw.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-4
            optimizer.step()
            optimizer.zero_grad()
        synchronize(self.dist.device)
        return self.cfg.steps * self.cfg.total_batch_size / (time.perf_counter() - t0)

    def ours(self, mark: Callable[[str], None] = lambda phase: None) -> float:
        """Tokens/s of the step of train_gpt2.py with its loader and log; `mark` is told what was done."""
        from data import prefetch
        from training import cosine_lr, train_step

        cfg, dist = self.cfg, self.dist

        def loss(model: Any, batch: dict) -> Any:
            mark("backward")  # of the micro-batch before
            value = self.loss(model, batch)
            mark("forward")
            return value

        batches = prefetch(self.read, 0, cfg.steps)
        late = self.choice.late and dist.device.type == "cuda"
        pending: list[tuple[int, Callable]] = []
        synchronize(dist.device)
        t0 = time.perf_counter()
        mark("")
        for step in range(cfg.steps):
            lr = cosine_lr(step, max_steps=10**6, warmup_steps=1, max_lr=1e-4, min_lr_frac=0.1)
            xy = next(batches).to(dist.device, non_blocking=True)
            micro = [dict(x=r[:, :-1], y=r[:, 1:], n=len(r) * cfg.T) for r in xy.split(self.B)]
            mark("data")
            pending.append(
                (step, train_step(self.model, self.optimizers, micro, loss, lr=lr, grad_clip=1.0, dist=dist))
            )
            mark("optimizer")
            while len(pending) > (late and step < cfg.steps - 1):
                done, read = pending.pop(0)
                out = read()
                self.log.scalars(done, train=out.loss, lr=lr, norm=out.grad_norm)
            mark("log")
        synchronize(dist.device)
        return cfg.steps * cfg.total_batch_size / (time.perf_counter() - t0)

    def shares(self) -> dict[str, float]:
        """The share of our step's time in each of its parts, waiting for the device after each."""
        spent: dict[str, float] = {}
        clock = time.perf_counter()

        def mark(phase: str) -> None:
            nonlocal clock
            synchronize(self.dist.device)
            now = time.perf_counter()
            spent[phase] = spent.get(phase, 0.0) + now - clock
            clock = now

        hooks = [o.register_step_pre_hook(lambda *_: mark("backward")) for o in self.optimizers[:1]]
        self.ours(mark)
        for hook in hooks:
            hook.remove()
        spent.pop("")
        return {phase: seconds / sum(spent.values()) for phase, seconds in spent.items()}

    def peak_memory(self) -> int:
        """Bytes: on CUDA of model, optimizer and one of our steps; elsewhere of this process so far."""
        import torch

        if self.dist.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.ours()
        return torch.cuda.max_memory_allocated() - before + 12 * self.raw.n_params()

    def checkpoint_ms(self) -> float:
        """How long saving model and optimizer keeps the next step waiting: the copy, not the writing."""
        from checkpoints import save_in_background

        moments = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        state = dict(step=0, model=self.raw.state_dict(), optimizers=moments)
        folder, times = Path(tempfile.mkdtemp()), []
        with ThreadPoolExecutor(1) as pool:
            for _ in range(3):  # the first allocates the host's memory
                synchronize(self.dist.device)
                t0 = time.perf_counter()
                writing = save_in_background(pool, folder, state, keep=1)
                synchronize(self.dist.device)
                times.append(time.perf_counter() - t0)
                writing.result()
        shutil.rmtree(folder)
        return 1e3 * statistics.median(times)

    def trace(self, path: Path) -> None:
        """Write a Chrome trace of three of our steps."""
        import torch

        whole, self.cfg = self.cfg, replace(self.cfg, steps=3)
        with torch.profiler.profile() as profiler:
            self.ours()
        self.cfg = whole
        profiler.export_chrome_trace(str(path))
        print(f"written: {path}")


def bench_train(cfg: Config) -> list[Row]:
    """Our step with loader and log, against forward, backward, clip and AdamW written down on one batch."""
    import torch

    from files import one_line
    from training import peak_flops

    rows = []
    for model in cfg.models:
        for B in cfg.B:
            torch._dynamo.reset()  # it counts what it compiles of one class, and stops at eight
            choice = Choice(compile=cfg.compile)
            ours = Trainer(cfg, model, B, choice)
            # the same model, and with it the same places in memory: with one each they came out 5 % apart
            same = cfg.optimizer == "adamw"
            plain = ours if same else Trainer(replace(cfg, optimizer="adamw"), model, B, choice)
            print(f"{model}, B={B}, T={cfg.T}, {cfg.total_batch_size:,} tokens a step")
            runs = {"plain PyTorch loop": plain.plain, "NeoGPT": ours.ours}
            try:
                found = side_by_side(runs, cfg.repeats, "tok/s")
            except torch.cuda.OutOfMemoryError as error:  # what was measured before is not lost
                print(f"B={B} is too much: {one_line(error)}", flush=True)
                continue
            peak, shares, memory = peak_flops(ours.dist.device), ours.shares(), ours.peak_memory()
            for row in found:
                row |= dict(model=model, B=B, T=cfg.T, ms=1e3 * cfg.total_batch_size / row["median"])
                row["mfu"] = peak and ours.raw.flops_per_token(cfg.T) * row["median"] / peak
            found[1] |= dict(shares=shares, peak_memory=memory, checkpoint_ms=ours.checkpoint_ms())
            parts = ", ".join(f"{phase} {share:.1%}" for phase, share in shares.items())
            mfu = f", MFU {found[1]['mfu']:.1%}" if peak else ""
            print(f"  {found[1]['ms']:,.1f} ms a step{mfu}, {memory / 1e9:.2f} GB; {parts}")
            print(
                f"  a checkpoint keeps the next step waiting {found[1]['checkpoint_ms']:,.1f} ms", flush=True
            )
            if cfg.profile:
                ours.trace(Path(cfg.out_dir) / f"trace-{model}-B{B}.json.gz")
            rows += found
    return rows


def bench_choices(cfg: Config) -> list[Row]:
    """Our step as train_gpt2.py takes it, and with one choice at a time made otherwise."""
    import torch

    from training import pick_precision, setup

    base = Choice(compile=cfg.compile)
    device = setup(cfg.device, deterministic=False).device
    on_cuda = device.type == "cuda"
    compiled = on_cuda if cfg.compile is None else cfg.compile
    precision = "fp32" if pick_precision(cfg.precision, device) == "bf16" else "bf16"
    choices = {
        "as it is": base,
        "vocabulary not padded": replace(base, padded=False),
        "attention written out": replace(base, attention="manual"),
        "GELU by tanh": replace(base, gelu="tanh"),
        "GELU by erf": replace(base, gelu="erf"),
        f"in {precision}": replace(base, precision=precision),
        "not compiled" if compiled else "compiled": replace(base, compile=not compiled),
    }
    if on_cuda:
        choices |= {
            "kernels not deterministic": replace(base, deterministic=False),
            "loss read at once": replace(base, late=False),
            # PyTorch tunes nothing while it is deterministic
            "not deterministic and compiled with autotuning": replace(
                base, deterministic=False, mode="max-autotune-no-cudagraphs"
            ),
        }
    rows = []
    for model in cfg.models:
        for B in cfg.B:
            print(f"{model}, B={B}, T={cfg.T}, {cfg.total_batch_size:,} tokens a step")
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64  # models compiled side by side, all of one class
            trainers = {name: Trainer(cfg, model, B, choice) for name, choice in choices.items()}

            def run(trainer: Trainer) -> float:
                if on_cuda:  # a setting of the process
                    exact = trainer.choice.deterministic
                    torch.use_deterministic_algorithms(exact, warn_only=exact)
                    torch.backends.cuda.enable_cudnn_sdp(not exact)  # as train_gpt2.py does
                return trainer.ours()

            runs = {name: functools.partial(run, trainer) for name, trainer in trainers.items()}
            rows += [row | dict(model=model, B=B) for row in side_by_side(runs, cfg.repeats, "tok/s")]
    return rows


def bench_data(cfg: Config) -> list[Row]:
    """How long the loader takes for a step's batch, and how much memory it holds after many."""
    from data import Windows, check_shards, get_tokenizer, open_data, step_windows

    tokenizer = get_tokenizer(cfg.tokenizer)
    t0 = time.perf_counter()
    if Path(cfg.data).is_dir():
        check_shards(cfg.data, tokenizer.n_vocab)
    train = Windows(open_data(cfg.data, tokenizer)[0], cfg.T)
    print(f"opened and checked {len(train):,} windows in {time.perf_counter() - t0:.2f} s")

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    N, steps = cfg.total_batch_size // cfg.T, iter(range(10**9))

    def read() -> float:
        t0 = time.perf_counter()
        for _ in range(cfg.steps):
            train.read(step_windows(next(steps), N, len(train), 1))
        return cfg.steps * N * cfg.T / (time.perf_counter() - t0)

    before = resident()
    [row] = side_by_side({f"{N} windows on one thread": read}, cfg.repeats, "tok/s")
    row |= dict(ms=1e3 * cfg.total_batch_size / row["median"], mb_before=before, mb_after=resident())
    print(
        f"  {row['ms']:.3f} ms a step; resident memory {before:.0f} MB before, {row['mb_after']:.0f} MB after"
    )
    return [row]


# -----------------------------------------------------------------------------
# Tokenising


def encode_all(texts: list[str]) -> int:
    """Tokenise texts as plainly as tiktoken allows; the number of tokens."""
    import tiktoken

    tokenizer = tiktoken.get_encoding("gpt2")  # cached in the process after its first call
    return sum(len(tokenizer.encode_ordinary(text)) for text in texts)


def bench_tokenize(cfg: Config) -> list[Row]:
    """fineweb.py from files to shards, against a bare pool of tiktoken on texts already in memory."""
    import pyarrow.parquet

    import fineweb

    workers = cfg.workers or os.cpu_count()
    paths = sorted(Path(path) for path in glob.glob(cfg.data))
    texts = [
        t for path in paths for t in pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    ]
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    n_tokens = 0

    def plain() -> float:
        nonlocal n_tokens
        t0 = time.perf_counter()
        with ProcessPoolExecutor(workers) as pool:
            n_tokens = sum(pool.map(encode_all, chunks))
        return n_tokens / (time.perf_counter() - t0)

    def ours(encoder: str) -> float:
        folder = tempfile.mkdtemp()
        t0 = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            settings = dict(data=cfg.data, out_dir=f"{folder}/shards", workers=workers, encoder=encoder)
            fineweb.main(fineweb.Config(**settings))
        rate = n_tokens / (time.perf_counter() - t0)
        shutil.rmtree(folder)
        return rate

    runs = {"tiktoken in a bare pool": plain, "fineweb.py, tiktoken": lambda: ours("tiktoken")}
    if fineweb.find_gigatoken():
        runs["fineweb.py, gigatoken"] = lambda: ours("gigatoken")
    return side_by_side(runs, cfg.repeats, "tok/s")


# -----------------------------------------------------------------------------
# Sampling and evaluation


def build_model(cfg: Config, model: str) -> tuple:
    """A model of random weights, its tokenizer, and the context of its forward passes."""
    import torch

    from data import get_tokenizer
    from model import GPT, GPTConfig, pad_vocab
    from training import autocast, pick_precision, setup

    dist = setup(cfg.device, deterministic=False)
    precision = pick_precision(cfg.precision, dist.device)
    tokenizer = get_tokenizer(cfg.tokenizer)
    torch.manual_seed(0)
    shape = dict(n_tokens=tokenizer.n_vocab, vocab_size=pad_vocab(tokenizer.n_vocab))
    raw = GPT(GPTConfig(**size(model), **shape)).to(dist.device)
    return raw, tokenizer, autocast(precision, dist.device), precision, dist


def read_bandwidth(device: Any) -> float:
    """Bytes/s at which the device reads memory: the best of ten sums over a gigabyte."""
    import torch

    x, rates = torch.ones(2**28, device=device), []
    for _ in range(10):
        synchronize(device)
        t0 = time.perf_counter()
        x.sum()
        synchronize(device)
        rates.append(x.numel() * 4 / (time.perf_counter() - t0))
    return max(rates)


def sample_rows(cfg: Config, model: str) -> list[Row]:
    """One model's prefill and decoding with the cache, and the loop that runs all tokens for each new one."""
    import torch

    from model import KVCache
    from sampling import CHUNK, cast_linears, fill_cache, generate
    from training import require_compiler

    raw, _, amp, precision, dist = build_model(cfg, model)
    if cfg.compile is not False:
        require_compiler(dist.device)
        torch._dynamo.reset()  # what was compiled for the model before
    if precision == "bf16":
        cast_linears(raw, torch.bfloat16)
    weights = sum(p.nbytes for p in raw.parameters()) - raw.transformer.wpe.weight.nbytes
    limit = read_bandwidth(dist.device) / weights
    print(f"{model}, {precision}; memory allows {limit:,.1f} passes over the weights a second")
    ids = torch.randint(raw.config.n_tokens, (max(cfg.B), raw.config.block_size)).tolist()
    n_prompt, n_prefill = cfg.prompt_tokens, min(512, raw.config.block_size)
    # so many come at once, on a GPU behind recording and compiling; a CPU compiles in the repeat not counted
    first = CHUNK.get(dist.device.type, 1)

    def decode(B: int, compile: bool) -> float:
        prompts, t0 = [row[:n_prompt] for row in ids[:B]], 0.0
        with amp:
            steps = generate(raw, prompts, cfg.new_tokens, temperature=0, compile=compile)
            for number, _ in enumerate(steps, 1):
                if number == first:
                    t0 = time.perf_counter()
        return B * (cfg.new_tokens - first) / (time.perf_counter() - t0)

    @torch.no_grad()
    def prefill(B: int) -> float:
        synchronize(dist.device)
        t0 = time.perf_counter()
        with amp:
            fill_cache(raw, [row[:n_prefill] for row in ids[:B]], KVCache(raw.config.n_layer, n_prefill))
        synchronize(dist.device)
        return B * n_prefill / (time.perf_counter() - t0)

    @torch.no_grad()
    def uncached(B: int) -> float:
        window = torch.tensor(ids[:B], device=dist.device)
        lengths = range(n_prompt, n_prompt + cfg.new_tokens, cfg.stride)
        t0 = time.perf_counter()
        for length in lengths:
            with amp:
                logits = raw.lm_head(raw.hidden(window[:, :length])[:, -1])
            logits.argmax(-1).tolist()
        return B * len(lengths) / (time.perf_counter() - t0)

    runs = {f"B={cfg.B[0]}, no cache": functools.partial(uncached, cfg.B[0])}
    streams = {}
    for compile, B in product((False, True) if cfg.compile is None else (cfg.compile,), cfg.B):
        name = f"B={B}, cache{', compiled' * compile}"
        runs[name], streams[name] = functools.partial(decode, B, compile), B
    rows = side_by_side(runs, cfg.repeats, "tok/s")
    for row in rows[1:]:
        row["memory_share"] = row["median"] / streams[row["name"]] / limit
        print(f"{row['name']:>30}: {row['memory_share']:.0%} of what memory allows")
    runs = {f"B={B}, prompts of {n_prefill}": functools.partial(prefill, B) for B in cfg.B}
    return [row | dict(model=model) for row in rows + side_by_side(runs, cfg.repeats, "tok/s")]


def bench_sample(cfg: Config) -> list[Row]:
    """Prefill and decoding with the cache, against the loop without it, for every model and batch."""
    return [row for model in cfg.models for row in sample_rows(cfg, model)]


def bench_hellaswag(cfg: Config) -> list[Row]:
    """hellaswag.py against scoring plainly one ending, and one row of four padded endings, at a time."""
    import torch
    import torch.nn.functional as F

    from hellaswag import encode, evaluate, prepare, read_rows, texts

    raw, tokenizer, amp, _, dist = build_model(cfg, cfg.models[0])
    rows = read_rows(cfg.data, 0, print)
    rows = rows[:: max(1, len(rows) // cfg.rows)][: cfg.rows]  # from all over the file: its halves differ
    questions = prepare(rows, tokenizer, "completion", raw.config.block_size, print)

    @torch.no_grad()
    def score(sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        longest = max(len(head) + len(tail) for head, tail in sequences)
        idx = torch.zeros(len(sequences), longest, dtype=torch.int64)
        targets = torch.full_like(idx, -100)
        for row, target, (head, tail) in zip(idx, targets, sequences):
            row[: len(head) + len(tail)] = torch.tensor(head + tail)
            target[len(head) : len(head) + len(tail)] = torch.tensor(tail)
        idx, targets = idx.to(dist.device), targets.to(dist.device)
        with amp:
            logits, _ = raw(idx)
        logits, targets = logits[:, :-1].float(), targets[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return losses.view(targets.shape).sum(1).cpu()  # (len(sequences),)

    def plain(together: bool) -> float:
        t0 = time.perf_counter()
        for row in rows:
            head, tails = encode(*texts(row, "completion"), "completion", tokenizer)
            sequences = [(head, tail) for tail in tails]
            for group in [sequences] if together else [[sequence] for sequence in sequences]:
                score(group)
        return len(rows) / (time.perf_counter() - t0)

    def ours() -> float:
        t0 = time.perf_counter()
        evaluate(raw, questions, amp, dist)
        return len(rows) / (time.perf_counter() - t0)

    runs = {"one ending at a time": lambda: plain(False), "one row at a time": lambda: plain(True)}
    return side_by_side(runs | {"NeoGPT": ours}, cfg.repeats, "rows/s")


def main(cfg: Config) -> None:
    """Run the measurement that the configuration names."""
    from files import make_folder
    from training import check_least

    check_least(cfg, 1, "T", "steps", "new_tokens", "prompt_tokens", "stride", "rows")
    check_least(cfg, 2, "repeats")  # the first is not counted
    if min(cfg.B) < 1 or cfg.total_batch_size < cfg.T:
        raise SystemExit("B must be at least 1, and total_batch_size at least T")
    make_folder(Path(cfg.out_dir))
    runs = {
        "train": bench_train,
        "choices": bench_choices,
        "data": bench_data,
        "tokenize": bench_tokenize,
        "sample": bench_sample,
        "hellaswag": bench_hellaswag,
    }
    write_json(cfg, runs[cfg.what](cfg))


if __name__ == "__main__":
    from training import parse  # not above: the pool's processes import this file, and need no torch

    main(parse(CONFIGS, __doc__))
