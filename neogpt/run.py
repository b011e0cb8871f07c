"""One training run in one out_dir: open or resume it, count steps and sequences, log, save and stop.

The loop and the loss stay in the script: see `main` in train_gpt2.py.
"""

import logging
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import nn
from torch.optim import Optimizer

from neogpt import checkpoint, data, files, lora, model, optim, runtime, track, training

LAG = {"cuda": 1}  # by device: read losses this many steps late, so that the GPU queue never drains
MAX_NONFINITE = 10  # a run ends after this many steps in a row with a loss or gradient that is not finite


def code_revision() -> str:
    """The revision of the code according to git; "" if unknown."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


class Log(logging.Handler):
    """<out_dir>/log.txt, append-only: one `step name value` per line. Lines of text start with `# `."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Open the log of rank 0; other ranks write nothing."""
        super().__init__()
        path = folder / "log.txt" if rank == 0 else Path(os.devnull)
        has_incomplete_line = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = open(path, "a", 1, "utf-8", "backslashreplace")  # line-buffered: a killed run loses nothing
        files.lock(self.file)
        self.write("\n" * has_incomplete_line)

    def write(self, text: str) -> None:
        """Append text. Raises OSError, for example if the disk is full."""
        try:
            self.file.write(text)
        except OSError as error:
            raise OSError(f"cannot write {self.file.name}: {error.strerror}; fix it and start again") from error

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message of `print0`."""
        self.write("# " + record.getMessage().replace("\n", "\\n") + "\n")

    def header(self, **facts: object) -> None:
        """Write one line of text about the run."""
        self.write("# " + " ".join(f"{name}={value}" for name, value in facts.items()) + "\n")

    def scalars(self, step: int, **values: float) -> None:
        """Write numbers with nine digits, which distinguish any two float32."""
        self.write("".join(f"{step} {name} {value:.9g}\n" for name, value in values.items()))


class Run:
    """The state of a run. Only rank 0 writes files."""

    def __init__(
        self, cfg: Any, stage: str, tokenizer: tiktoken.Encoding, rt: runtime.Runtime, branch_from: str = ""
    ) -> None:
        """cfg: a Config with out_dir, keep_last, grad_clip, seed, precision and track. stage: as in Checkpoint. The run
        continues the checkpoint branch_from if out_dir has none. Use self.rt: with "auto" it keeps a run's precision.
        """
        self.cfg, self.stage, self.tokenizer, self.rt = cfg, stage, tokenizer, rt
        self.out_dir = files.make_folder(cfg.out_dir)
        starts_branch = bool(branch_from) and not checkpoint.list_checkpoints(self.out_dir)
        self.trunk_log = Path(branch_from).with_name("log.txt") if starts_branch else None  # its first part is copied
        self.log = Log(self.out_dir, rt.rank)
        runtime.logger.addHandler(self.log)
        self.resumed = checkpoint.find_resume(self.out_dir, rt, branch_from)
        if self.resumed and (self.resumed.stage != stage or self.resumed.optimizers is None):
            has = "no moments" if self.resumed.stage == stage else f"stage {self.resumed.stage}"
            path, option = (branch_from, "--branch_from") if starts_branch else (self.out_dir, "--out_dir")
            raise ValueError(f"a {stage} run cannot continue from {path}, which has {has}: use another {option}")
        old = self.resumed.facts if self.resumed else {}
        kept = old.get("precision", rt.precision) if old.get("device") == rt.device.type else rt.precision
        if cfg.precision == "auto" and kept != rt.precision:
            runtime.print0(f"the run keeps its precision {kept}; the choice for this processor is {rt.precision}")
            rt = self.rt = rt._replace(precision=kept)
        self.facts = dict(code=code_revision(), torch=str(torch.__version__), world_size=str(rt.world_size))
        self.facts |= dict(device=rt.device.type, precision=rt.precision)  # completed by `identify`
        self.log.header(**self.facts, python=platform.python_version(), tokenizer=tokenizer.name)
        self.log.header(**{name: repr(value) for name, value in asdict(cfg).items()})
        start = self.resumed or checkpoint.Checkpoint(stage, 0, {}, {}, tokenizer.name)
        self.start_step, self.start_sequences, self.scores = start.step, start.n_sequences, start.scores
        self.step, self.n_sequences, self.n_tokens = start.step, start.n_sequences, start.n_tokens
        self.started = time.perf_counter() - start.seconds
        self.B, self.base, self.flops_per_token = 0, "", 0  # set by the scripts; the last is for the MFU
        self.stopped, self.n_nonfinite, self.saved_step = False, 0, start.step
        self.pending = deque()  # steps whose losses are not read: (step, lr, n_tokens, function that reads them, end)
        self.writer, self.writing = ThreadPoolExecutor(1), None  # writing: the Future of the last checkpoint
        self.tracker = track.start(cfg.track if rt.rank == 0 else "", self.out_dir, self.step, asdict(cfg))
        if self.resumed:
            changed = checkpoint.differences(start.config, asdict(cfg)) or "nothing"
            runtime.print0(f"continuing {self.out_dir} from step {self.step}; changed: {changed}")

    def identify(self, **facts: object) -> None:
        """Record what determines the curve besides cfg; print what differs on resuming. ValueError if ranks differ."""
        self.facts |= {name: str(value) for name, value in facts.items()}
        found = runtime.all_gather(asdict(self.cfg) | self.facts | dict(checkpoint_weights=self.base), self.rt)
        for rank, other in enumerate(found):
            if changed := checkpoint.differences(found[0], other):
                raise ValueError(f"rank {rank} differs from rank 0: {changed}; all need the same files and options")
        self.facts["processor"] = runtime.processor(self.rt.device)  # can differ between ranks
        self.log.header(**facts, processor=self.facts["processor"])
        if self.resumed and (changed := checkpoint.differences(self.resumed.facts, self.facts)):
            runtime.print0(f"changed since step {self.step}: {changed}; the curve can change")

    def attach(self, raw: model.GPT, net: nn.Module, optimizers: list[Optimizer]) -> None:
        """Set what the run trains: net, which is `raw` after `training.wrap`. Load the moments of a resumed run."""
        self.raw, self.model, self.optimizers, self.gathered = raw, net, optimizers, None
        if n_pruned := optim.keep_zeros(optimizers, raw):
            runtime.print0(f"{n_pruned} pruned matrices: their zeros stay zero")
        if self.resumed:
            optim.load_moments(optimizers, self.resumed.optimizers)
            self.resumed = replace(self.resumed, model={}, optimizers=[], adapters={})  # free the host memory
        if self.rt.rank == 0:
            if self.trunk_log and self.trunk_log.exists():
                values = track.VALUE.finditer(self.trunk_log.read_bytes())
                self.log.write("".join(f"{m[0].decode()}\n" for m in values if int(m[1]) < self.step))
            n_bytes = 4 * raw.n_params()
            best = 0 if self.stage == "pretraining" else n_bytes
            checkpoint.require_space(self.out_dir, n_bytes + 4 * optim.n_moments(optimizers), self.cfg.keep_last, best)

    def full_model(self) -> model.GPT:
        """The model for evaluations; if sharded, a copy until the next update, for which all ranks must call this."""
        if not runtime.is_sharded(self.raw):
            return self.raw
        if not self.gathered:
            weights = {name: p.detach().full_tensor() for name, p in self.raw.named_parameters()}
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
            self.gathered = model.GPT.from_weights(self.raw.config, weights)
        return self.gathered

    def items(self, step: int, n: int, n_items: int) -> np.ndarray:
        """The indices of the n items of a step, (n,) int64 in [0, n_items)."""
        position = self.start_sequences + (step - self.start_step) * n  # so n can change when a run is resumed
        return data.windows_at(position, n, n_items, self.cfg.seed)

    def warm_up(self, batch: training.Batch, loss_fn: training.LossFn) -> None:
        """Run one backward pass, which compiles the model, and after which DDP rebuilds its buckets. New buckets change
        the order of sums: without this pass the first step of a resumed run would differ in the last bits.
        """
        if self.model is not self.raw:
            training.backward(self.model, batch.micro_batches[0], loss_fn, 1.0, self.rt)
            self.raw.zero_grad()

    @property
    def last(self) -> bool:
        """Whether no step follows: max_steps is reached, or a signal asked to stop."""
        return self.stopped or self.step == self.max_steps

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, including the time before it was resumed."""
        return time.perf_counter() - self.started

    def steps(self, max_steps: int) -> Iterator[int]:
        """Yield the steps from the resumed one to max_steps. Step max_steps is only evaluated and saved."""
        if self.step > max_steps:
            remedy = f"raise --max_steps={max_steps} or use another --out_dir"
            raise ValueError(f"the run in {self.out_dir} is at step {self.step} already: {remedy}")
        self.stop_requested = runtime.stop_on_signals()
        self.max_steps, self.clock = max_steps, runtime.now(self.rt.device)
        for step in range(self.step, max_steps + 1):
            self.step = step
            self.read_results(LAG.get(self.rt.device.type, 0))
            yield step

    def due(self, every: int) -> bool:
        """Whether to evaluate or save: at multiples of `every` and max_steps, if no signal came. Reads all losses."""
        is_due = self.step % every == 0 or self.step == self.max_steps
        if is_due:
            self.read_results(0)
        return is_due and not self.stopped

    def update(self, batch: training.Batch, loss_fn: training.LossFn, *, lr: float) -> None:
        """Do one optimizer step. Its losses are read and logged LAG steps later."""
        self.gathered = None
        settings = dict(lr=lr, grad_clip=self.cfg.grad_clip, rt=self.rt, stop=self.stop_requested())
        read = training.train_step(self.model, self.optimizers, batch.micro_batches, loss_fn, **settings)
        self.pending.append((self.step, lr, batch.n_tokens, read, runtime.now(self.rt.device)))
        self.n_sequences += batch.n_sequences
        self.n_tokens += batch.n_tokens

    def read_results(self, lag: int) -> None:
        """Read and log the losses of all but the last `lag` steps."""
        while len(self.pending) > lag:
            step, lr, n_tokens, read, end = self.pending.popleft()
            result = read()
            dt, self.clock = runtime.seconds_between(self.clock, end), end
            self.n_nonfinite = self.n_nonfinite + 1 if result.skipped else 0
            self.stopped = self.stopped or result.stop
            self.log.scalars(step, train=result.loss, lr=lr, norm=result.grad_norm, **result.metrics)
            if self.rt.rank == 0:
                self.print_step(step, lr, n_tokens, dt, result)
            if self.n_nonfinite == MAX_NONFINITE:
                problem = f"loss or gradient not finite in {MAX_NONFINITE} steps in a row (loss {result.loss})"
                remedy = "lower --max_lr, lengthen the warmup, or use --precision=fp32; then start again"
                raise ValueError(f"{problem}: {remedy} from the last checkpoint")

    def print_step(self, step: int, lr: float, n_tokens: int, dt: float, result: training.StepResult) -> None:
        """Print one line for a step that took dt seconds. n_tokens: without padding."""
        peak = runtime.peak_flops(self.rt.device) if self.flops_per_token else None
        mfu = f" | MFU {self.flops_per_token * n_tokens / dt / (peak * self.rt.world_size):5.1%}" if peak else ""
        left = timedelta(seconds=round(dt * (self.max_steps - step)))
        line = f"step {step:6d}/{self.max_steps} | loss {result.loss:8.5f} | lr {lr:.2e} | norm {result.grad_norm:7.4f}"
        line += f" | {dt * 1e3:8.1f} ms | {n_tokens / dt:9,.0f} tok/s{mfu} | {left} left"
        try:
            print(line + " | skipped: not finite" * result.skipped, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # the terminal was closed: SIGHUP follows, and the run must save
            sys.stdout = open(os.devnull, "w")

    def record(self, **values: float) -> None:
        """Log the results of an evaluation, with the tokens and seconds until now, and keep them in `scores`."""
        self.scores = self.scores | values
        self.log.scalars(self.step, **values, tokens=self.n_tokens, seconds=self.seconds)
        self.clock = runtime.now(self.rt.device)  # `record` ends an evaluation, whose time is not part of a step

    def save(self, best: bool = False) -> None:
        """Write a checkpoint in the background, and best.pt if `best`. After a nonfinite step only the best and the
        last checkpoint are written, so a run that diverges keeps the older ones.
        """
        if not best and (self.step == self.saved_step or self.n_nonfinite and not self.last):
            return
        self.wait_for_writer()
        sharded = runtime.is_sharded(self.raw)
        if self.rt.rank == 0 or sharded:
            adapters = lora.lora_weights(self.raw)
            if adapters:
                lora.save_adapter(self.out_dir / "adapter", self.raw, self.cfg.checkpoint, self.base)
            weights = lora.merged_weights(self.raw) if adapters else self.raw.state_dict(keep_vars=sharded)
            moments = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
            ckpt = checkpoint.Checkpoint(self.stage, self.step, weights, asdict(self.raw.config), self.tokenizer.name)
            ckpt = replace(ckpt, config=asdict(self.cfg), facts=self.facts, base=self.base, scores=self.scores)
            ckpt = replace(ckpt, optimizers=moments, adapters=adapters, B=self.B, world_size=self.rt.world_size)
            ckpt = replace(ckpt, n_sequences=self.n_sequences, n_tokens=self.n_tokens, seconds=self.seconds)
            pool = self.writer if self.rt.rank == 0 else None
            self.writing = checkpoint.save_async(pool, self.out_dir, ckpt, self.cfg.keep_last, best)
        self.saved_step, self.clock = self.step, runtime.now(self.rt.device)

    def wait_for_writer(self) -> None:
        """Wait until the last checkpoint is written. Raises its error, for example if the disk is full."""
        if self.writing:
            self.writing.result()

    def finish(self) -> None:
        """Save if a signal stopped the run, wait for the checkpoint and leave the process group."""
        self.read_results(0)
        if self.stopped:
            self.save()
        self.wait_for_writer()
        stopped = f"stopped at step {self.step}; the same command continues"
        runtime.print0(stopped if self.stopped else f"done: {self.out_dir}")
        runtime.logger.removeHandler(self.log)
        track.stop(self.tracker)
        runtime.cleanup(self.rt)
