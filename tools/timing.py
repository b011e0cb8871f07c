"""What bench.py needs: alternating repeats, JSON results, models with random weights, and the two training loops."""

import contextlib
import io
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import collect_env

import train_gpt2
from neogpt import config, data, files, model, optim, run, runtime, training


def clock() -> float:
    """The time in seconds, after the GPU has done its queued work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing inside the block."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_alternating(variants: dict[str, Callable[[], Any]], repeats: int, unit: str) -> list[dict]:
    """Time every variant `repeats` times, in alternating order; print and return rates per second.

    The first repeat warms up and is not counted. A variant returns its number of units, or (that number, clock() after
    its setup). The first variant is the baseline of the ratios.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants)[:: -1 if repeat % 2 else 1]:
            start = clock()
            done = variants[name]()
            n, start = done if isinstance(done, tuple) else (done, start)
            rates[name].append(n / (clock() - start))
    rows, table = [], [("", f"median {unit}", "min", "max", "ratio")]
    for name, (_, *counted) in rates.items():
        row = dict(name=name, unit=unit, median=statistics.median(counted), min=min(counted), max=max(counted))
        rows.append(row | dict(ratio=row["median"] / (rows or [row])[0]["median"]))
        table.append((name, *(f"{row[key]:,.1f}" for key in ("median", "min", "max")), f"{rows[-1]['ratio']:.3f}"))
    print(config.format_table(table), flush=True)
    return rows


def write_json(path: Path, **results: Any) -> None:
    """Write results with the command, the revision of the code, the machine and the versions of packages."""
    machine = collect_env.get_env_info()._asdict()  # also PyTorch and CUDA
    versions = {d.name: d.version for d in metadata.distributions() if d.name in ("tiktoken", "gigatoken", "pyarrow")}
    facts = dict(command=" ".join(sys.argv), code=run.code_revision(), machine=machine, versions=versions)
    files.write_json(path, facts | results)
    print(f"wrote {path}")


def build_model(cfg: Any, name: str, **changes: Any) -> tuple:
    """A GPT on the device, its tokenizer, and the Runtime. cfg: bench.Config; changes: to the GPTConfig."""
    if name not in model.SIZES:
        raise ValueError(f"--models {name}: expected names of {', '.join(model.SIZES)}")
    rt, tokenizer = runtime.setup(cfg.device, cfg.precision), data.get_tokenizer(cfg.tokenizer)
    vocabulary = dict(n_tokens=tokenizer.n_vocab, vocab_size=model.pad_vocab(tokenizer.n_vocab))
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(**model.SIZES[name] | vocabulary | changes)).to(rt.device), tokenizer, rt


class Trainer:
    """A plain training loop and NeoGPT's on one shared model: the speed of two copies can differ by 5 %."""

    def __init__(self, cfg: Any, name: str, B: int, deterministic: bool = True, **changes: Any) -> None:
        """cfg, name, changes: as in `build_model`. B: sequences per forward pass. deterministic: of CUDA kernels."""
        raw, tokenizer, self.rt = build_model(cfg, name, block_size=cfg.T, **changes)
        self.cfg, self.B, self.n = cfg, B, cfg.total_batch_size // cfg.T  # n: sequences per step
        self.deterministic = deterministic and self.rt.device.type == "cuda"
        self.train = data.Windows(data.open_data(cfg.data, tokenizer)[0], cfg.T)
        self.folder = tempfile.TemporaryDirectory()
        self.run = run.Run(train_gpt2.Config(out_dir=self.folder.name), "pretraining", tokenizer.name, self.rt)
        optimizers = optim.make_optimizers(raw, optimizer=cfg.optimizer, weight_decay=0.1)
        self.run.attach(raw, optimizers, self.rt.device.type == "cuda" if cfg.compile is None else cfg.compile)

    def read(self, step: int) -> training.Batch:
        """The batch of a step, as in train_gpt2.py."""
        xy = torch.from_numpy(self.train.read(self.run.items(step, self.n, len(self.train))))
        return train_gpt2.make_batch(runtime.to_device(xy, self.rt.device), self.B, self.n)

    def plain(self) -> int:
        """Forward, backward, clipping and optimizer on one batch that stays on the device; returns the tokens."""
        runtime.set_determinism(self.deterministic)
        batch = self.read(0)
        for _ in range(self.cfg.steps):
            for micro_batch in batch.micro_batches:
                training.backward(self.run.model, micro_batch, train_gpt2.loss_fn, 1 / batch.n_tokens, self.rt)
            nn.utils.clip_grad_norm_(self.run.raw.parameters(), 1.0)
            for optimizer in self.run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-4
                optimizer.step()
                optimizer.zero_grad()
        return self.cfg.steps * batch.n_tokens

    def neogpt(self) -> int:
        """train_gpt2.py's loop with data, log and console; returns the tokens."""
        runtime.set_determinism(self.deterministic)
        stop = self.run.step + self.cfg.steps
        batches = data.prefetch(self.read, self.run.step, stop)
        with quiet():
            for _ in self.run.steps(stop):
                # a signal ends the measurement at once; the handlers of the run would end only this loop
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if self.run.last:
                    break
                self.run.update(next(batches), train_gpt2.loss_fn, lr=1e-4)
            self.run.read_results(0)
        return self.cfg.steps * self.n * self.cfg.T
