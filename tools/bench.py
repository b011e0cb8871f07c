"""Measure speed: NeoGPT beside plain PyTorch or tiktoken code, in alternating repeats.

    python -m tools.bench train       # the training step against a plain PyTorch loop; --profile also writes a trace
    python -m tools.bench choices     # the training step with one choice changed at a time
    python -m tools.bench data        # reading batches
    python -m tools.bench sample      # prefill, and decoding with and without a KV cache
    python -m tools.bench hellaswag   # against scoring one row at a time
    python -m tools.bench tokenize --data='books-*.parquet'    # fineweb.py against a pool of tiktoken processes

Prints a table and writes <out_dir>/<bench>.json with the command, hardware and versions. The rates are the median,
smallest and largest of all repeats but the first. Our results are in bench/RESULTS.md.
"""

import functools
import itertools
import multiprocessing
import signal
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from neogpt import config, data, files

if multiprocessing.parent_process() is None:  # the workers of `tokenize` import this file too, but need no torch
    import pyarrow.parquet
    import torch
    from torch.nn.utils.rnn import pad_sequence

    import fineweb
    import hellaswag
    import train_gpt2
    from neogpt import generate, optim, run, runtime, training
    from tools import timing


@dataclass(frozen=True)
class Config:
    bench: Literal["train", "choices", "sample", "data", "hellaswag", "tokenize"] = "train"  # what to measure
    data: str = str(config.ROOT / "input.txt")  # text or shards; hellaswag: rows; tokenize: parquet files
    tokenizer: Literal["gpt2", "bytes"] = "bytes"  # of the data
    models: tuple[str, ...] = ("demo",)  # names of model.SIZES; the weights are random
    T: int = 256  # sequence length, tokens
    B: tuple[int, ...] = (8,)  # sequences per forward pass
    total_batch_size: int = 8 * 256  # tokens per optimizer step
    optimizer: Literal["adamw", "muon"] = "adamw"  # of both training loops
    steps: int = 10  # optimizer steps per repeat
    repeats: int = 7  # the first one warms up and is not counted
    new_tokens: int = 512  # sample: generated after each prompt
    prompt_tokens: int = 16  # sample: length of the prompts, of random ids
    uncached_stride: int = 64  # sample: without a cache, measure only every uncached_stride-th length
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool | None = None  # None: train and choices on CUDA, as in training; sample both with and without
    profile: bool = False  # train: write trace-<model>-B<B>.json.gz, of one more repeat
    workers: int | None = None  # tokenize: processes; None: one per core
    rows: int = 40  # hellaswag: rows per repeat, from all over the file
    out_dir: str = "out/bench"  # folder of <bench>.json


CONFIGS = {
    "train": Config(),
    "choices": Config(bench="choices", repeats=4),
    "data": Config(bench="data"),
    "sample": Config(bench="sample", models=("gpt2",), B=(1, 8), repeats=4),
    "hellaswag": Config(bench="hellaswag", data="", tokenizer="gpt2", models=("gpt2",), repeats=4),
    "tokenize": Config(bench="tokenize", tokenizer="gpt2", repeats=4),
}


class Trainer:
    """One model with two training loops: where a model lies in memory can alone make a difference of 5 %."""

    def __init__(
        self, cfg: Config, name: str, B: int, precision: str = "", compile: bool | None = None, **changes: Any
    ) -> None:
        """precision, compile: in place of those of cfg. changes: to the GPTConfig."""
        self.cfg, self.B = cfg, B
        settings = dict(device=cfg.device, precision=precision or cfg.precision, deterministic=True)
        raw, tokenizer, self.rt = timing.build_model(name, cfg.tokenizer, **settings, block_size=cfg.T, **changes)
        self.train = data.Windows(data.open_data(cfg.data, tokenizer)[0], cfg.T)
        self.folder = tempfile.TemporaryDirectory()
        self.run = run.Run(train_gpt2.Config(out_dir=self.folder.name), "pretraining", tokenizer.name, self.rt)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Run has replaced the handlers
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        optimizers = optim.make_optimizers(raw, optimizer=cfg.optimizer, weight_decay=0.1)
        self.run.attach(raw, optimizers, self.rt.device.type == "cuda" if compile is None else compile)

    def read(self, step: int) -> "torch.Tensor":
        """The tokens of a step, (n, T + 1), on the host."""
        xy = self.train.read(self.run.items(step, self.cfg.total_batch_size // self.cfg.T, len(self.train)))
        return torch.from_numpy(xy).pin_memory() if self.rt.device.type == "cuda" else torch.from_numpy(xy)

    def plain(self) -> int:
        """Forward, backward, clipping and optimizer on one batch that stays on the device; returns the tokens."""
        xy = self.read(0).to(self.rt.device)
        for _ in range(self.cfg.steps):
            for rows in xy.split(self.B):
                with runtime.strict_determinism():  # as in NeoGPT
                    with self.rt.autocast():
                        _, loss = self.run.model(rows[:, :-1], rows[:, 1:])
                    (loss * len(rows) / len(xy)).backward()
            torch.nn.utils.clip_grad_norm_(self.run.raw.parameters(), 1.0)
            for optimizer in self.run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-4
                optimizer.step()
                optimizer.zero_grad()
        return self.cfg.steps * self.cfg.total_batch_size

    def neogpt(self, mark: Callable[[str], None] = lambda phase: None) -> int:
        """The loop of train_gpt2.py with its data, log and console; returns the tokens. Calls mark(phase) after each
        phase of a step.
        """

        def loss_fn(net: Any, batch: dict) -> tuple:
            mark("backward")  # of the previous micro-batch
            with self.rt.autocast():
                loss = net(batch["x"], batch["y"], reduction="sum")[1]
            mark("forward")
            return loss, {}

        n_tokens, stop = self.cfg.total_batch_size, self.run.step + self.cfg.steps
        batches = data.prefetch(self.read, self.run.step, stop)
        with timing.quiet():
            for _ in self.run.steps(stop):
                mark("log")
                if self.run.last:
                    break
                xy = next(batches).to(self.rt.device, non_blocking=True)
                micro_batches = [dict(x=r[:, :-1], y=r[:, 1:], n=len(r) * self.cfg.T) for r in xy.split(self.B)]
                mark("data")
                self.run.update(training.Batch(micro_batches, len(xy), n_tokens), loss_fn, lr=1e-4)
                mark("optimizer")
            self.run.read_results(0)
        return self.cfg.steps * n_tokens

    def time_shares(self) -> dict[str, float]:
        """The share of each phase in the time of NeoGPT's step."""
        phases = timing.Phases()
        hook = self.run.optimizers[0].register_step_pre_hook(lambda *_: phases.mark("backward"))
        self.neogpt(phases.mark)
        hook.remove()
        return phases.shares()

    def save(self) -> None:
        """Copy a checkpoint, as far as the training loop waits for it."""
        self.run.saved_step = None  # save the same step again
        self.run.save()
        timing.clock()


def bench_train(cfg: Config, name: str, B: int) -> list[dict]:
    """NeoGPT's training step against a plain PyTorch loop."""
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(cfg, name, B, compile=cfg.compile)
    loops = {"plain PyTorch": trainer.plain, "NeoGPT": trainer.neogpt}
    rows = timing.run_alternating(loops, cfg.repeats, "tok/s")
    peak, flops = runtime.peak_flops(trainer.rt.device), trainer.run.raw.flops_per_token(cfg.T)
    for row in rows:
        row |= dict(ms=1e3 * cfg.total_batch_size / row["median"], mfu=flops * row["median"] / peak if peak else None)
    copying = timeit.repeat(trainer.save, trainer.run.wait_for_writer, number=1, repeat=3)[1:]  # first: allocations
    details = dict(peak_bytes=torch.cuda.max_memory_allocated(), checkpoint_ms=1e3 * min(copying))
    rows[1] |= details | dict(shares=trainer.time_shares())
    print(", ".join(f"{key} {rows[1][key]:,.3g}" for key in ("ms", "mfu", *details) if rows[1][key]))
    print(", ".join(f"{phase} {share:.1%}" for phase, share in rows[1]["shares"].items()), flush=True)
    if cfg.profile:
        with torch.profiler.profile() as profiler:
            trainer.neogpt()
        profiler.export_chrome_trace(f"{cfg.out_dir}/trace-{name}-B{B}.json.gz")
    return rows


def bench_choices(cfg: Config, name: str, B: int) -> list[dict]:
    """NeoGPT's training step as train_gpt2.py runs it, and with one choice changed at a time."""
    torch._dynamo.config.recompile_limit = 64  # many models of one class
    rt = runtime.setup(cfg.device, cfg.precision)
    compile = rt.device.type == "cuda" if cfg.compile is None else cfg.compile
    precision = "fp32" if rt.precision == "bf16" else "bf16"
    choices = {  # arguments of Trainer
        "default": dict(compile=compile),
        "vocabulary not padded": dict(compile=compile, vocab_size=data.get_tokenizer(cfg.tokenizer).n_vocab),
        "manual attention": dict(compile=compile, attention="manual"),
        "GELU tanh": dict(compile=compile, gelu="tanh"),
        "GELU erf": dict(compile=compile, gelu="erf"),
        precision: dict(compile=compile, precision=precision),
        "not compiled" if compile else "compiled": dict(compile=not compile),
    }
    trainer = functools.cache(lambda choice: Trainer(cfg, name, B, **choices[choice]))  # built in the first repeat
    variants = {choice: lambda choice=choice: trainer(choice).neogpt() for choice in choices}
    return timing.run_alternating(variants, cfg.repeats, "tok/s")


def bench_sample(cfg: Config, name: str, B: int) -> list[dict]:
    """Prefill, and decoding with a KV cache against recomputing all tokens for each new one."""
    raw, _, rt = timing.build_model(name, cfg.tokenizer, cfg.device, cfg.precision)
    if rt.precision == "bf16":
        generate.cast_linears(raw, torch.bfloat16)
    ids = torch.randint(raw.config.n_tokens, (B, raw.config.block_size)).tolist()
    prompts, long_prompts = [row[: cfg.prompt_tokens] for row in ids], [row[:512] for row in ids]

    def decode(compile: bool) -> tuple[int, float]:
        steps = generate.generate(raw, prompts, cfg.new_tokens, temperature=0, compile=compile)
        with rt.autocast():
            for _ in range(generate.CHUNK.get(rt.device.type, 1)):  # not timed: prefill and capture of the CUDA graph
                next(steps)
            start = timing.clock()
            return B * sum(1 for _ in steps), start

    @torch.no_grad()
    def uncached() -> int:
        window = torch.tensor(ids, device=rt.device)
        lengths = range(cfg.prompt_tokens, cfg.prompt_tokens + cfg.new_tokens, cfg.uncached_stride)
        with rt.autocast():
            for length in lengths:
                raw.lm_head(raw.trunk(window[:, :length])[:, -1]).argmax(-1).tolist()
        return B * len(lengths)

    @torch.no_grad()
    def prefill() -> int:
        with rt.autocast():
            generate.prefill(raw, long_prompts, generate.KVCache(raw.config.n_layer, raw.config.block_size))
        return sum(map(len, long_prompts))

    x = torch.ones(2**28, device=rt.device)
    bandwidth = x.nbytes / min(timeit.repeat(lambda: x.sum().item(), number=1, repeat=10))  # bytes/s
    per_second = bandwidth / sum(p.nbytes for p in raw.parameters())
    print(f"the memory bandwidth allows {per_second:,.1f} passes over the weights per second, {B} tokens each")
    variants = {"no cache": uncached, "cache": lambda: decode(False), "cache, compiled": lambda: decode(True)}
    if cfg.compile is not None:
        variants.pop("cache" if cfg.compile else "cache, compiled")
    return timing.run_alternating(variants | {"prefill": prefill}, cfg.repeats, "tok/s")


def bench_data(cfg: Config) -> list[dict]:
    """Reading the batches of training, on one thread."""
    train = data.Windows(data.open_data(cfg.data, data.get_tokenizer(cfg.tokenizer))[0], cfg.T)
    n, step = cfg.total_batch_size // cfg.T, itertools.count()

    def read() -> int:
        for _ in range(cfg.steps):
            train.read(data.windows_at(next(step) * n, n, len(train), 1))
        return cfg.steps * n * cfg.T

    return timing.run_alternating({f"{n} windows per step": read}, cfg.repeats, "tok/s")


def bench_hellaswag(cfg: Config) -> list[dict]:
    """hellaswag.py against scoring the four padded endings of one row at a time."""
    raw, tokenizer, rt = timing.build_model(cfg.models[0], cfg.tokenizer, cfg.device, cfg.precision)
    rows = hellaswag.read_rows(cfg.data, None, rt)
    rows = rows[:: max(1, len(rows) // cfg.rows)][: cfg.rows]
    questions = hellaswag.prepare(rows, tokenizer, "completion", raw.config.block_size)

    @torch.no_grad()
    def plain() -> int:
        for row in rows:
            head, tails = hellaswag.encode(*hellaswag.texts(row, "completion"), "completion", tokenizer)
            x = pad_sequence([torch.tensor(head + tail) for tail in tails], batch_first=True)
            y = [torch.tensor([-100] * len(head) + tail) for tail in tails]
            y = pad_sequence(y, batch_first=True, padding_value=-100)
            with rt.autocast():
                _, losses = raw(x[:, :-1].to(rt.device), y[:, 1:].to(rt.device), reduction="none")
            losses.view(len(x), -1).sum(1).tolist()
        return len(rows)

    def neogpt() -> int:
        return len(hellaswag.evaluate(raw, questions, rt).sums)

    return timing.run_alternating({"one row at a time": plain, "NeoGPT": neogpt}, cfg.repeats, "rows/s")


def count_tokens(texts: list[str]) -> int:
    """The number of GPT-2 tokens, by the simplest use of tiktoken."""
    return sum(map(len, map(data.get_tokenizer("gpt2").encode_ordinary, texts)))


def bench_tokenize(cfg: Config) -> list[dict]:
    """fineweb.py from files to shards, against a pool of tiktoken processes on texts that are in memory."""
    _, paths = fineweb.find_local(cfg.data)
    texts = [text for path in paths for text in pyarrow.parquet.read_table(path)["text"].to_pylist()]
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    n_tokens = count_tokens(texts)

    def plain() -> int:
        with multiprocessing.Pool(cfg.workers) as pool:
            return sum(pool.imap_unordered(count_tokens, chunks))

    def neogpt(encoder: str) -> int:
        with tempfile.TemporaryDirectory() as folder, timing.quiet():
            fineweb.main(fineweb.Config(data=cfg.data, out_dir=folder, workers=cfg.workers, encoder=encoder))
        return n_tokens

    variants = {"tiktoken pool": plain, "fineweb.py, tiktoken": lambda: neogpt("tiktoken")}
    if fineweb.has_gigatoken():
        variants["fineweb.py, gigatoken"] = lambda: neogpt("gigatoken")
    return timing.run_alternating(variants, cfg.repeats, "tok/s")


PER_MODEL = {"train": bench_train, "choices": bench_choices, "sample": bench_sample}
ONCE = {"data": bench_data, "hellaswag": bench_hellaswag, "tokenize": bench_tokenize}


def main(cfg: Config) -> None:
    """Run one measurement and write its results."""
    config.require("[1, inf)", B=min(cfg.B), steps=cfg.steps, rows=cfg.rows, workers=cfg.workers)
    config.require("[1, inf)", prompt_tokens=cfg.prompt_tokens, uncached_stride=cfg.uncached_stride)
    config.require("[2, inf)", repeats=cfg.repeats)
    path = files.make_folder(cfg.out_dir) / f"{cfg.bench}.json"
    rows = ONCE[cfg.bench](cfg) if cfg.bench in ONCE else []
    for name, B in itertools.product(cfg.models, cfg.B if cfg.bench in PER_MODEL else ()):
        print(f"{name}, B={B}")
        torch._dynamo.reset()  # it compiles a class at most eight times
        try:
            rows += [row | dict(model=name, B=B) for row in PER_MODEL[cfg.bench](cfg, name, B)]
        except torch.cuda.OutOfMemoryError as error:  # keep the results of smaller batches
            print(f"skipped: {files.one_line(error)}", flush=True)
    timing.write_json(path, config=asdict(cfg), results=rows)


if __name__ == "__main__":
    config.run(main, CONFIGS)
