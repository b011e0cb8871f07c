"""A model with random weights, and the two training loops that bench.py compares."""

import signal
import statistics
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import train_gpt2
from neogpt import data, model, optim, run, runtime, training
from tools import timing


def build_model(cfg: Any, name: str, deterministic: bool = False, **changes: Any) -> tuple:
    """A GPT on the device, its tokenizer, and the Runtime. cfg: bench.Config; changes: to the GPTConfig."""
    if name not in model.SIZES:
        raise ValueError(f"--models {name}: expected names of {', '.join(model.SIZES)}")
    rt, tokenizer = runtime.setup(cfg.device, cfg.precision, deterministic), data.get_tokenizer(cfg.tokenizer)
    vocabulary = dict(n_tokens=tokenizer.n_vocab, vocab_size=model.pad_vocab(tokenizer.n_vocab))
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(**model.SIZES[name] | vocabulary | changes)).to(rt.device), tokenizer, rt


class Trainer:
    """Both loops train the same model: the addresses of two models can make a difference of 5 %."""

    def __init__(self, cfg: Any, name: str, B: int, **changes: Any) -> None:
        """cfg, changes: as in `build_model`."""
        raw, tokenizer, self.rt = build_model(cfg, name, deterministic=True, block_size=cfg.T, **changes)
        self.cfg, self.B, self.n = cfg, B, cfg.total_batch_size // cfg.T  # n: sequences per step
        self.train = data.Windows(data.open_data(cfg.data, tokenizer)[0], cfg.T)
        self.folder = tempfile.TemporaryDirectory()
        self.run = run.Run(train_gpt2.Config(out_dir=self.folder.name), "pretraining", tokenizer.name, self.rt)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Run has replaced the handlers
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        optimizers = optim.make_optimizers(raw, optimizer=cfg.optimizer, weight_decay=0.1)
        self.run.attach(raw, optimizers, self.rt.device.type == "cuda" if cfg.compile is None else cfg.compile)

    def read(self, step: int) -> Tensor:
        """The tokens of a step, (n, T + 1), on the host."""
        xy = torch.from_numpy(self.train.read(self.run.items(step, self.n, len(self.train))))
        return xy.pin_memory() if self.rt.device.type == "cuda" else xy

    def plain(self) -> int:
        """Forward, backward, clipping and optimizer on one batch that stays on the device; returns the tokens."""
        xy = self.read(0).to(self.rt.device)
        for _ in range(self.cfg.steps):
            for rows in xy.split(self.B):
                with runtime.strict_determinism():  # as in NeoGPT
                    with self.rt.autocast():
                        _, loss = self.run.model(rows[:, :-1], rows[:, 1:])
                    (loss * len(rows) / self.n).backward()
            nn.utils.clip_grad_norm_(self.run.raw.parameters(), 1.0)
            for optimizer in self.run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-4
                optimizer.step()
                optimizer.zero_grad()
        return self.cfg.steps * self.n * self.cfg.T

    def neogpt(self, mark: Callable[[str], None] = lambda phase: None) -> int:
        """train_gpt2.py's loop with data, log and console; returns the tokens. Calls mark(phase) after each phase."""

        def loss_fn(net: nn.Module, batch: dict) -> tuple[Tensor, dict]:
            mark("backward")  # of the previous micro-batch
            with self.rt.autocast():
                loss = net(batch["x"], batch["y"], reduction="sum")[1]
            mark("forward")
            return loss, {}

        T, stop = self.cfg.T, self.run.step + self.cfg.steps
        batches = data.prefetch(self.read, self.run.step, stop)
        mark("start")
        with timing.quiet():
            for _ in self.run.steps(stop):
                mark("log")
                if self.run.last:
                    break
                xy = next(batches).to(self.rt.device, non_blocking=True)
                micro_batches = [dict(x=rows[:, :-1], y=rows[:, 1:], n=len(rows) * T) for rows in xy.split(self.B)]
                mark("data")
                self.run.update(training.Batch(micro_batches, self.n, self.n * T), loss_fn, lr=1e-4)
                mark("optimizer")
            self.run.read_results(0)
        return self.cfg.steps * self.n * T

    def time_shares(self) -> dict[str, float]:
        """The share of each phase in NeoGPT's step, waiting for the device after each phase."""
        spent, times = Counter(), [0.0]

        def mark(phase: str) -> None:
            times.append(timing.clock())
            spent[phase] += times[-1] - times[-2]

        hook = self.run.optimizers[0].register_step_pre_hook(lambda *_: mark("backward"))
        self.neogpt(mark)
        hook.remove()
        del spent["start"]
        return {phase: seconds / spent.total() for phase, seconds in spent.items()}

    def checkpoint_ms(self) -> float:
        """Milliseconds that the loop waits for a checkpoint: for the copy, not for the writing."""

        def save() -> None:
            self.run.saved_step = None  # save the same step again
            self.run.save()
            timing.clock()

        # the median, because the first time also allocates host memory
        return 1e3 * statistics.median(timeit.repeat(save, self.run.wait_for_writer, number=1, repeat=3))
