"""Measure what the code around the model costs: medians of alternating repeats, side by side in one run.

    python bench.py train                     # training steps against a plain PyTorch loop
    python bench.py train --model=gpt2 --T=1024 --B=1 --total_batch_size=1024
    python bench.py data --data=edu_fineweb10B --model=gpt2 --T=1024    # reading batches
    python bench.py hellaswag                 # HellaSwag's rows against scoring one at a time
    python bench.py tokenize --data='books-*.parquet'    # fineweb.py against tiktoken in a bare pool

Figures from our machines are in bench/RESULTS.md. Nothing here is a test: machines are noisy.
"""

import glob
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    what: Literal["train", "data", "tokenize", "hellaswag"] = "train"  # the measurement
    data: str = str(Path(__file__).parent / "input.txt")  # text, shards, parquet files, or rows
    tokenizer: Literal["gpt2", "bytes"] = "bytes"  # of the data
    model: str = "demo"  # a size of model.py's table
    T: int = 256  # sequence length, tokens
    B: int = 8  # sequences per forward pass
    total_batch_size: int = 8 * 256  # tokens per optimizer step
    steps: int = 10  # steps of a repeat
    repeats: int = 7  # alternating repeats; the first one warms up and is not counted
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool = False  # torch.compile both loops
    workers: int = 0  # tokenize: processes; 0: one a core
    rows: int = 40  # hellaswag: rows of a repeat, from all over the file


CONFIGS = {
    "train": Config(),
    "data": Config(what="data"),
    "tokenize": Config(what="tokenize", tokenizer="gpt2", repeats=4),
    "hellaswag": Config(
        what="hellaswag",
        data=".cache/hellaswag/hellaswag_val.jsonl",
        tokenizer="gpt2",
        model="gpt2",
        repeats=4,
    ),
}


def side_by_side(runs: dict[str, Callable[[], float]], repeats: int, unit: str) -> dict[str, float]:
    """Run all `runs` in turn, `repeats` times; print and return the median of the rates each returns."""
    rates = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            rate = run()
            if repeat:
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = next(iter(medians.values()))
    for name, values in rates.items():
        spread = f"{min(values):,.1f} … {max(values):,.1f}"
        median, ratio = medians[name], medians[name] / base
        print(f"{name:>24}: {median:12,.1f} {unit}  ({spread})  x {ratio:.3f}", flush=True)
    return medians


def bench_train(cfg: Config) -> None:
    """Our step with loader and log, against forward, backward, clip and AdamW written down on one batch."""
    import torch

    from data import Windows, get_tokenizer, open_data, prefetch, step_windows
    from model import GPT, SIZES, GPTConfig, pad_vocab
    from optimizers import make_optimizers
    from training import Log, StepResult, autocast, cosine_lr, pick_precision, setup, train_step

    dist = setup(cfg.device, deterministic=False)
    amp = autocast(pick_precision(cfg.precision, dist.device), dist.device)
    tokenizer = get_tokenizer(cfg.tokenizer)
    shape = SIZES[cfg.model] | dict(
        block_size=cfg.T, n_tokens=tokenizer.n_vocab, vocab_size=pad_vocab(tokenizer.n_vocab)
    )
    train = Windows(open_data(cfg.data, tokenizer)[0], cfg.T)
    N = cfg.total_batch_size // cfg.T

    def fresh() -> tuple:
        torch.manual_seed(0)
        raw = GPT(GPTConfig(**shape)).to(dist.device)
        optimizers = make_optimizers(raw, optimizer="adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        return torch.compile(raw) if cfg.compile else raw, optimizers

    def read(step: int) -> torch.Tensor:
        xy = torch.from_numpy(train.read(step_windows(step, N, len(train), 1)))
        return xy.pin_memory() if dist.device.type == "cuda" else xy

    def synchronize() -> None:
        if dist.device.type == "cuda":
            torch.cuda.synchronize()

    plain_model, [plain_optimizer] = fresh()
    model, optimizers = fresh()
    fixed = read(0).to(dist.device)

    def plain() -> float:
        synchronize()
        t0 = time.perf_counter()
        for _ in range(cfg.steps):
            for rows in fixed.split(cfg.B):
                with amp:
                    _, loss = plain_model(rows[:, :-1], rows[:, 1:])
                (loss * len(rows) / N).backward()
            torch.nn.utils.clip_grad_norm_(plain_model.parameters(), 1.0)
            for group in plain_optimizer.param_groups:
                group["lr"] = 1e-4
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        synchronize()
        return cfg.steps * cfg.total_batch_size / (time.perf_counter() - t0)

    def loss_fn(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        with amp:
            return model(batch["x"], batch["y"], reduction="sum")[1]

    folder = Path(tempfile.mkdtemp())
    log = Log(folder, dist)

    def ours() -> float:
        batches = prefetch(read, 0, cfg.steps)
        synchronize()
        t0 = time.perf_counter()
        for step in range(cfg.steps):
            lr = cosine_lr(step, max_steps=10**6, warmup_steps=1, max_lr=1e-4, min_lr_frac=0.1)
            xy = next(batches).to(dist.device, non_blocking=True)
            micro_batches = [
                dict(x=rows[:, :-1], y=rows[:, 1:], n=len(rows) * cfg.T) for rows in xy.split(cfg.B)
            ]
            out: StepResult = train_step(
                model, optimizers, micro_batches, loss_fn, lr=lr, grad_clip=1.0, dist=dist
            )
            log.scalars(step, train=out.loss, lr=lr, norm=out.grad_norm)
        synchronize()
        return cfg.steps * cfg.total_batch_size / (time.perf_counter() - t0)

    side_by_side({"plain PyTorch loop": plain, "NeoGPT": ours}, cfg.repeats, "tok/s")
    shutil.rmtree(folder)


def bench_data(cfg: Config) -> None:
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

    N, steps, times = cfg.total_batch_size // cfg.T, cfg.steps * cfg.repeats, []
    before = resident()
    for step in range(steps):
        t0 = time.perf_counter()
        train.read(step_windows(step, N, len(train), 1))
        times.append(time.perf_counter() - t0)
    median = statistics.median(times)
    print(
        f"{N} windows: {median * 1e3:.3f} ms a step, {cfg.total_batch_size / median:,.0f} tok/s on one thread"
    )
    print(f"resident memory {before:.0f} MB before, {resident():.0f} MB after {steps} steps")


def encode_all(texts: list[str]) -> int:
    """Tokenise texts as plainly as tiktoken allows; the number of tokens."""
    import tiktoken

    tokenizer = tiktoken.get_encoding("gpt2")  # cached in the process after its first call
    return sum(len(tokenizer.encode_ordinary(text)) for text in texts)


def bench_tokenize(cfg: Config) -> None:
    """fineweb.py from files to shards, against a bare pool of tiktoken on texts already in memory."""
    import contextlib
    import io

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

    def ours() -> float:
        folder = tempfile.mkdtemp()
        t0 = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fineweb.main(fineweb.Config(data=cfg.data, out_dir=f"{folder}/shards", workers=workers))
        rate = n_tokens / (time.perf_counter() - t0)
        shutil.rmtree(folder)
        return rate

    side_by_side({"tiktoken in a bare pool": plain, "fineweb.py": ours}, cfg.repeats, "tok/s")


def bench_hellaswag(cfg: Config) -> None:
    """hellaswag.py against scoring plainly one ending, and one row of four padded endings, at a time."""
    import torch
    import torch.nn.functional as F

    from data import get_tokenizer
    from hellaswag import encode, evaluate, prepare, read_rows, texts
    from model import GPT, SIZES, GPTConfig, pad_vocab
    from training import autocast, pick_precision, setup

    dist = setup(cfg.device, deterministic=False)
    amp = autocast(pick_precision(cfg.precision, dist.device), dist.device)
    tokenizer = get_tokenizer(cfg.tokenizer)
    shape = dict(n_tokens=tokenizer.n_vocab, vocab_size=pad_vocab(tokenizer.n_vocab))
    torch.manual_seed(0)
    raw = GPT(GPTConfig(**SIZES[cfg.model], **shape)).to(dist.device)
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
    side_by_side(runs | {"NeoGPT": ours}, cfg.repeats, "rows/s")


def main(cfg: Config) -> None:
    """Run the measurement that the configuration names."""
    runs = {
        "train": bench_train,
        "data": bench_data,
        "tokenize": bench_tokenize,
        "hellaswag": bench_hellaswag,
    }
    runs[cfg.what](cfg)


if __name__ == "__main__":
    from training import parse  # not above: the pool's processes import this file, and need no torch

    main(parse(CONFIGS, __doc__))
