"""Measure speed: NeoGPT against plain PyTorch, transformers or tiktoken code, in alternating repeats.

    python -m tools.bench             # an overview of this machine in about five minutes, with a figure
    python -m tools.bench train       # the training step against a plain PyTorch loop; --profile: also the kernels
    python -m tools.bench choices     # the training step with one choice changed at a time
    python -m tools.bench sample      # decoding against transformers; prefill
    python -m tools.bench hellaswag   # against scoring one row at a time
    python -m tools.bench tokenize --data='books-*.parquet'    # fineweb.py against a pool of tiktoken processes

Prints a table and writes <out_dir>/<bench>.json with the command, hardware and versions (overview: and a PNG figure).
Rates are the median, smallest and largest of all repeats but the first. Our results are in bench/RESULTS.md.
"""

import contextlib
import functools
import glob
import importlib.util
import io
import itertools
import multiprocessing
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from neogpt import config, data, files

if multiprocessing.parent_process() is None:  # the workers of `tokenize` import this file too, but need no torch
    import numpy as np
    import torch

    import fineweb
    import hellaswag
    import train_gpt2
    from neogpt import chat, cpu, generate, model, optim, runtime, training
    from tools import timing


@dataclass(frozen=True)
class Config:
    bench: Literal["overview", "train", "choices", "sample", "hellaswag", "tokenize"] = "overview"  # what to measure
    data: str = str(config.ROOT / "input.txt")  # text or shards; hellaswag: rows; tokenize: parquet or text files
    tokenizer: Literal["gpt2", "bytes"] = "bytes"  # of the data
    n_tokens: config.PositiveInt | None = None  # vocabulary of the model; None: that of the tokenizer
    models: tuple[str, ...] = ("demo",)  # names of model.SIZES; the weights are random
    T: config.PositiveInt = 256  # sequence length, tokens
    B: tuple[int, ...] = (8,)  # sequences per forward pass
    total_batch_size: config.PositiveInt = 8 * 256  # tokens per optimizer step
    optimizer: Literal["adamw", "muon"] = "adamw"  # of both training loops
    steps: config.PositiveInt = 10  # optimizer steps per repeat
    repeats: Annotated[int, "[2, inf)"] = 7  # the first one warms up and is not counted
    new_tokens: Annotated[int, "[17, inf)"] = 512  # sample: generated after each prompt
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    plain_precision: Literal["", "bf16", "fp32"] = ""  # train: of the plain loop; "": as NeoGPT
    compile: bool | None = None  # None: as in train_gpt2.py
    profile: bool = False  # train: in one more repeat, print the 30 kernels (on a CPU: operators) that take longest
    only: tuple[str, ...] = ()  # choices: only these, besides the default; sample: only these
    workers: config.PositiveInt | None = None  # tokenize: processes; None: one per core
    rows: config.PositiveInt = 40  # hellaswag: rows per repeat, evenly spaced in the file
    out_dir: str = "out/bench"  # folder of <bench>.json


CONFIGS = {
    "overview": Config(models=("demo", "gpt2"), repeats=6, steps=5, new_tokens=128, rows=60, plain_precision="fp32"),
    "train": Config(bench="train"),
    "choices": Config(bench="choices", repeats=4),
    "sample": Config(bench="sample", n_tokens=50257, models=("gpt2",), B=(1, 8), repeats=4),
    "hellaswag": Config(bench="hellaswag", data="", tokenizer="gpt2", models=("gpt2",), repeats=4),
    "tokenize": Config(bench="tokenize", data="*.parquet", tokenizer="gpt2", repeats=4),
}
COPIES = 12  # the overview tokenizes this many copies of the text, so that the start of the workers hardly counts


def build_model(cfg: Config, name: str, **changes: Any) -> tuple:
    """A GPT on the device, the tokenizer, and the Runtime. changes: to the GPTConfig."""
    if name not in model.SIZES:
        raise ValueError(f"--models {name}: expected names of {', '.join(model.SIZES)}")
    rt, tokenizer = runtime.setup(cfg.device, cfg.precision), data.get_tokenizer(cfg.tokenizer)
    vocabulary = dict(n_tokens=(n := cfg.n_tokens or tokenizer.n_vocab), vocab_size=model.pad_vocab(n))
    changes = dict(residual=runtime.residual_dtype(rt.device)) | changes
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(**model.SIZES[name] | vocabulary | changes)).to(rt.device), tokenizer, rt


def training_loops(cfg: Config, name: str, B: int, deterministic: bool = True, **changes: Any) -> tuple:
    """A GPT, the Runtime, a plain training loop and NeoGPT's. Both train this model, as the speed of two copies can
    differ by 5 %, and return the number of tokens. B: sequences per forward pass. name, changes: as in `build_model`.
    """
    raw, tokenizer, rt = build_model(cfg, name, block_size=cfg.T, **changes)
    n, is_cuda = cfg.total_batch_size // cfg.T, rt.device.type == "cuda"  # n: sequences per step
    train = data.Windows(data.open_data(cfg.data, tokenizer)[0], cfg.T)
    optimizers = optim.make_optimizers(raw, optimizer=cfg.optimizer, weight_decay=0.1)
    net = training.wrap(raw, rt, False, False, is_cuda if cfg.compile is None else cfg.compile)
    plain_rt = rt._replace(precision=cfg.plain_precision or rt.precision)

    def read(step: int) -> training.Batch:  # as in train_gpt2.py
        xy = torch.from_numpy(train.read(data.windows_at(step * n, n, len(train), seed=0)))
        return train_gpt2.make_batch(runtime.to_device(xy, rt.device), B, n)

    def plain() -> int:  # one batch that stays on the device
        runtime.set_determinism(deterministic and is_cuda)
        batch = read(0)
        for _ in range(cfg.steps):
            for micro_batch in batch.micro_batches:
                training.backward(net, micro_batch, train_gpt2.loss_fn, 1 / batch.n_tokens, plain_rt)
            torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()  # with the learning rate that `neogpt` has set
                optimizer.zero_grad()
        return cfg.steps * batch.n_tokens

    def neogpt() -> int:  # prefetched batches; losses are read one step late, as in a run on CUDA
        runtime.set_determinism(deterministic and is_cuda)
        settings, read_loss = dict(lr=1e-4, grad_clip=1.0, rt=rt), lambda: None
        for batch in data.prefetch(read, 0, cfg.steps):
            step = training.train_step(net, optimizers, batch.micro_batches, train_gpt2.loss_fn, **settings)
            read_loss()
            read_loss = step
        read_loss()
        return cfg.steps * batch.n_tokens

    return raw, rt, plain, neogpt


def bench_train(cfg: Config, name: str, B: int) -> list[dict]:
    """NeoGPT's training step against a plain PyTorch loop."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    raw, rt, plain, neogpt = training_loops(cfg, name, B)
    variants = {f"plain PyTorch {cfg.plain_precision}".strip(): plain, "NeoGPT": neogpt}
    rows = timing.run_alternating(variants, cfg.repeats, "tok/s")
    rate, peak = rows[1]["median"], runtime.peak_flops(rt.device)
    rows[1] |= dict(ms=1e3 * cfg.total_batch_size / rate, peak_gb=torch.cuda.max_memory_allocated() / 1e9)
    rows[1] |= dict(mfu=raw.flops_per_token(cfg.T) * rate / peak if peak else None)
    print(", ".join(f"{key} {rows[1][key]:,.3g}" for key in ("ms", "mfu", "peak_gb") if rows[1][key]), flush=True)
    if cfg.profile:
        with torch.profiler.profile() as profiler:
            neogpt()
        slowest = "self_device_time_total" if rt.device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=slowest, row_limit=30))
    return rows


def bench_choices(cfg: Config, name: str, B: int) -> list[dict]:
    """NeoGPT's training step as train_gpt2.py runs it, and with one choice changed at a time."""
    torch._dynamo.config.recompile_limit = 64  # many models of one class
    rt = runtime.setup(cfg.device, cfg.precision)
    compile = rt.device.type == "cuda" if cfg.compile is None else cfg.compile
    precision = "fp32" if rt.precision == "bf16" else "bf16"
    choices = {  # Config, and options of training_loops
        "default": (cfg, {}),
        "not deterministic": (cfg, dict(deterministic=False)),
        "fp32 residual": (cfg, dict(residual="fp32")),
        "bf16 residual": (cfg, dict(residual="bf16")),
        "vocabulary not padded": (cfg, dict(vocab_size=cfg.n_tokens or data.get_tokenizer(cfg.tokenizer).n_vocab)),
        "heads of 128": (cfg, dict(n_head=max(1, model.SIZES[name]["n_embd"] // 128))),
        "manual attention": (cfg, dict(attention="manual")),
        "GELU tanh": (cfg, dict(gelu="tanh")),
        precision: (replace(cfg, precision=precision), {}),
        "not compiled" if compile else "compiled": (replace(cfg, compile=not compile), {}),
    }
    if unknown := set(cfg.only) - set(choices):
        raise ValueError(f"--only {unknown.pop()!r}: expected some of {', '.join(choices)}")
    chosen = {choice: choices[choice] for choice in ("default", *(cfg.only or choices))}
    variants = {choice: training_loops(c, name, B, **options)[-1] for choice, (c, options) in chosen.items()}
    return timing.run_alternating(variants, cfg.repeats, "tok/s")


def bench_sample(cfg: Config, name: str, B: int) -> list[dict]:
    """Decoding against transformers, and prefill."""
    raw, _, rt = build_model(cfg, name)
    if rt.precision == "bf16":
        generate.cast_linears(raw)
    ids = torch.randint(raw.config.n_tokens, (B, raw.config.block_size)).tolist()
    prompts, long_prompts = [row[:16] for row in ids], [row[:512] for row in ids]

    def decode(compile: bool, raw: model.GPT = raw, rt: runtime.Runtime = rt) -> tuple[int, float]:
        start, steps = timing.clock(), generate.generate(raw, prompts, cfg.new_tokens, temperature=0, compile=compile)
        with rt.autocast():
            for _ in range(generate.CHUNK.get(rt.device.type, 0)):  # not timed: capture of the CUDA graph
                next(steps)
                start = timing.clock()
            return B * sum(1 for _ in steps), start

    def prefill() -> int:
        with rt.autocast():
            generate.prefill(raw, long_prompts, generate.KVCache(raw.config.n_layer, raw.config.block_size))
        return sum(map(len, long_prompts))

    variants = {}
    fits = len(prompts[0]) + cfg.new_tokens <= raw.config.block_size  # transformers has no positions beyond it
    if fits and importlib.util.find_spec("transformers"):
        variants["transformers"] = timing.transformers_decoder(raw, prompts, cfg.new_tokens, rt)
    variants |= {"NeoGPT": lambda: decode(False), "prefill": prefill}
    if rt.device.type == "cpu" and "NeoGPT, int8" in (cfg.only or ["NeoGPT, int8"]):
        cpu.use_int8(int8 := build_model(replace(cfg, precision="fp32"), name)[0])
        variants["NeoGPT, int8"] = lambda: decode(False, int8, rt._replace(precision="fp32"))
    if rt.device.type == "cuda":
        variants["NeoGPT, compiled"] = lambda: decode(True)
    with torch.no_grad():
        return timing.run_alternating(variants, cfg.repeats, "tok/s", cfg.only)


def bench_hellaswag(cfg: Config, name: str, B: int) -> list[dict]:
    """hellaswag.py against scoring the four padded endings of one row at a time. B has no effect."""
    raw, tokenizer, rt = build_model(cfg, name)
    rows = hellaswag.read_rows(cfg.data, None)
    rows = rows[:: max(1, len(rows) // cfg.rows)][: cfg.rows]
    questions = hellaswag.prepare(rows, tokenizer, "completion", raw.config.block_size)

    @torch.no_grad()
    def plain() -> int:
        for row in rows:
            ids, ending_ids = hellaswag.encode(*hellaswag.texts(row, "completion"), "completion", tokenizer)
            batch = chat.collate([[chat.Example(np.array(ids + e), len(ids))] for e in ending_ids], rt.device)
            with rt.autocast():
                losses = chat.loss(raw, batch, "none")
            losses.view(len(ending_ids), -1).sum(1).tolist()
        return len(rows)

    variants = {"one row at a time": plain, "NeoGPT": lambda: len(hellaswag.evaluate(raw, questions, rt).sums)}
    return timing.run_alternating(variants, cfg.repeats, "rows/s")


def count_tokens(text: str) -> int:
    """The number of GPT-2 tokens."""
    return len(data.get_tokenizer("gpt2").encode_ordinary(text))


def bench_tokenize(cfg: Config) -> list[dict]:
    """fineweb.py from files to shards, against a pool of tiktoken processes on texts in memory."""
    paths = sorted(glob.glob(cfg.data))
    if not paths:
        raise ValueError(f"--data={cfg.data}: no such files; give a pattern of parquet files")
    texts = [t.decode() for path in paths for part in fineweb.read_file(Path(path), "text") for t in part if t]

    def plain() -> int:
        with multiprocessing.Pool(cfg.workers) as pool:
            return sum(pool.imap_unordered(count_tokens, texts, chunksize=64))

    def neogpt(encoder: str) -> int:
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
            fineweb.main(fineweb.Config(data=cfg.data, out_dir=folder, workers=cfg.workers, encoder=encoder))
            manifest = data.read_manifest(folder)
        return manifest["n_tokens"] - manifest["n_documents"]  # without end-of-text

    variants = {"tiktoken pool": plain, "fineweb.py, tiktoken": lambda: neogpt("tiktoken")}
    if importlib.util.find_spec("gigatoken"):
        variants["fineweb.py, gigatoken"] = lambda: neogpt("gigatoken")
    return timing.run_alternating(variants, cfg.repeats, "tok/s")


def bench_overview(cfg: Config) -> list[dict]:
    """Tokenizing, training, decoding and scoring, each against the baseline that the table and the figure name."""
    small, large, questions = cfg.models[0], cfg.models[-1], f"{config.ROOT}/demo/hellaswag.jsonl"
    rt = runtime.setup(cfg.device, cfg.precision)
    gpt2 = replace(cfg, n_tokens=50257, T=1024, total_batch_size=1024, steps=1, only=("transformers", "NeoGPT"))
    with tempfile.TemporaryDirectory() as folder:
        (text := Path(folder, "texts.txt")).write_bytes(Path(cfg.data).read_bytes() * COPIES)
        measurements = {
            "tokenizing": lambda: bench_tokenize(replace(cfg, data=str(text))),  # first: it forks
            f"training {small}, Muon": lambda: bench_train(replace(cfg, optimizer="muon"), small, 8),
            f"training {large}, T = 1,024": lambda: bench_train(gpt2, large, 1),
            f"decoding {large}, fp32": lambda: bench_sample(replace(gpt2, precision="fp32"), large, 1),
            f"decoding {large}, {rt.precision}": lambda: bench_sample(gpt2, large, 1),  # in fp32 replaces the one above
            f"decoding {large}, {rt.precision}, 8 streams": lambda: bench_sample(gpt2, large, 8),
            f"HellaSwag, {small}": lambda: bench_hellaswag(replace(cfg, data=questions), small, 1),
        }
        return timing.overview(measurements, rt, Path(cfg.out_dir) / "overview.png")


PER_MODEL = dict(train=bench_train, choices=bench_choices, sample=bench_sample, hellaswag=bench_hellaswag)


def main(cfg: Config) -> None:
    """Run one measurement and write its results."""
    config.require("[1, inf)", B=min(cfg.B, default=0), models=len(cfg.models))
    sizes = cfg.B if cfg.bench in ("train", "choices") else (1,)  # of the micro-batches
    if wrong := [B for B in sizes if cfg.total_batch_size % (B * cfg.T)]:
        raise ValueError(f"--total_batch_size={cfg.total_batch_size} must be a multiple of {wrong[0]} x --T={cfg.T}")
    write = functools.partial(timing.write_json, files.make_folder(cfg.out_dir) / f"{cfg.bench}.json", config=vars(cfg))
    if cfg.bench not in PER_MODEL:
        return write(results=bench_tokenize(cfg) if cfg.bench == "tokenize" else bench_overview(cfg))
    rows = []
    for name, B in itertools.product(cfg.models, cfg.B):
        print(f"{name}, B={B}")
        torch._dynamo.reset()  # it compiles a class at most eight times
        rows += [row | dict(model=name, B=B) for row in PER_MODEL[cfg.bench](cfg, name, B)]
        write(results=rows)  # now: a larger B may not fit into memory


if __name__ == "__main__":
    config.run(main, CONFIGS)
