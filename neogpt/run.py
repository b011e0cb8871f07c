"""One training run in one out_dir: open or resume it, count steps and sequences, log, save and stop.

The loop and the loss stay in the script:

    run = Run(cfg, "pretraining", "gpt2", rt)        # run.resumed is the checkpoint to continue from, or None
    run.attach(raw, optimizers, compile=True)
    for step in run.steps(max_steps):
        if run.due(cfg.eval_every):
            run.record(val=...)
        if run.due(cfg.save_every):
            run.save()
        if run.last:
            break
        run.update(next(batches), loss_fn, lr=...)
    run.finish()
"""

import logging
import platform
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neogpt import checkpoint, data, files, lora, model, optim, runtime, training

LAG = {"cuda": 1}  # read losses this many steps late, so that the GPU queue never drains
MAX_NONFINITE = 10  # a run ends after this many steps in a row without a finite loss and gradient


def code_revision() -> str:
    """The revision of the code according to git; "" if unknown."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


class Log(logging.Handler):
    """<out_dir>/log.txt, append-only: one `step name value` per line; what `print0` prints follows a `#`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        path = Path(folder) / "log.txt"
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # line-buffered: a killed run loses nothing
        self.write("\n" * torn)

    def write(self, text: str) -> None:
        """Append text. Raises OSError, for example if the disk is full."""
        try:
            self.file.write(text)
        except OSError as error:
            raise OSError(f"cannot write {self.file.name}: {error.strerror}; fix it and start again") from error

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message of `print0` as one line."""
        self.write("# " + record.getMessage().replace("\n", "\\n") + "\n")

    def header(self, **facts: object) -> None:
        """Write facts about the run as one line."""
        self.write("# " + " ".join(f"{name}={value}" for name, value in facts.items()) + "\n")

    def scalars(self, step: int, **values: float) -> None:
        """Write numbers with nine digits, which distinguish any two float32."""
        self.write("".join(f"{step} {name} {value:.9g}\n" for name, value in values.items()))


class Run:
    """The state of a run. Only rank 0 writes."""

    def __init__(self, cfg: Any, stage: str, tokenizer: str, rt: runtime.Runtime) -> None:
        """cfg: a script's Config with out_dir, keep_last, grad_clip and seed. stage: as in checkpoint.Checkpoint."""
        self.cfg, self.stage, self.tokenizer, self.rt = cfg, stage, tokenizer, rt
        self.stop_requested = runtime.stop_on_signals()
        self.out_dir = files.make_folder(cfg.out_dir)
        self.log = Log(self.out_dir) if rt.rank == 0 else None
        if self.log:
            runtime.logger.addHandler(self.log)
        self.resumed = checkpoint.find_resume(self.out_dir, rt)
        if self.resumed and (self.resumed.stage != stage or self.resumed.optimizers is None):
            raise ValueError(f"the checkpoint in {self.out_dir} is not of a {stage} run: use another --out_dir")
        if self.log:
            versions = dict(code=code_revision(), torch=torch.__version__, python=platform.python_version())
            self.log.header(**versions, **rt._asdict(), tokenizer=tokenizer)
            self.log.header(**{name: repr(value) for name, value in asdict(cfg).items()})
        at = self.resumed or checkpoint.Checkpoint(stage, 0, {}, {}, tokenizer)
        self.step, self.n_sequences, self.n_tokens, self.scores = at.step, at.n_sequences, at.n_tokens, at.scores
        self.start = at.step, at.n_sequences
        self.started = time.perf_counter() - at.seconds
        self.saved_step = at.step  # of the newest checkpoint
        self.B, self.base, self.flops_per_token = 0, "", 0
        self.stopped, self.n_nonfinite = False, 0
        self.pending: deque[tuple[int, float, int, Callable[[], training.StepResult]]] = deque()
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future | None = None
        if self.resumed:
            changed = checkpoint.differences(at.config, asdict(cfg)) or "nothing"
            runtime.print0(f"continuing {self.out_dir} from step {self.step}; changed: {changed}")

    def attach(
        self, raw: model.GPT, optimizers: list[torch.optim.Optimizer], compile: bool, dynamic: bool = False
    ) -> None:
        """Train this model, which is on the device: load the moments of a resumed run, compile and wrap the model."""
        self.raw, self.optimizers = raw, optimizers
        self.model: nn.Module = runtime.wrap(raw, self.rt, compile, dynamic)
        if n_pruned := optim.keep_zeros(optimizers, raw):
            runtime.print0(f"{n_pruned} pruned matrices: their zeros stay zero")
        if self.resumed:
            optim.load_moments(optimizers, self.resumed.optimizers)
            self.resumed = replace(self.resumed, model={}, optimizers=[], adapters={})  # free the host memory
        if self.rt.rank == 0:
            checkpoint.require_space(self.out_dir, raw.n_params(), self.cfg.keep_last)

    def items(self, step: int, n: int, n_items: int) -> np.ndarray:
        """The indices, (n,) int64, of a step's n items out of n_items.

        The position counts items from the resumed checkpoint on, so n can change when a run is resumed.
        """
        step_0, position_0 = self.start
        return data.windows_at(position_0 + (step - step_0) * n, n, n_items, self.cfg.seed)

    def warm_up(self, batch: training.Batch, loss_fn: training.LossFn) -> None:
        """Compile before the clock starts. And after its first backward pass DDP regroups gradients, which changes the
        order of sums: a resumed run must be past that before its first step too.
        """
        if self.model is not self.raw:
            training.backward(self.model, batch.micro_batches[0], loss_fn, 1.0)
            self.raw.zero_grad()

    @property
    def last(self) -> bool:
        """Whether no further step follows: max_steps is reached, or a signal asked to stop."""
        return self.stopped or self.step == self.max_steps

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, over all its starts."""
        return time.perf_counter() - self.started

    def steps(self, max_steps: int) -> Iterator[int]:
        """Yield the step numbers from the resumed one to max_steps. The last is for evaluating and saving only."""
        if self.step > max_steps:
            raise ValueError(f"the run in {self.out_dir} is at step {self.step} already: --max_steps={max_steps}")
        self.max_steps, self.clock = max_steps, time.perf_counter()
        for step in range(self.step, max_steps + 1):
            self.step = step
            self.read_results(LAG.get(self.rt.device.type, 0))
            if self.stopped:
                self.read_results(0)
            yield step

    def due(self, every: int | None) -> bool:
        """Whether something done every `every` steps (0 or None: never) and at the end is due. Reads all losses."""
        is_due = bool(every) and (self.step % every == 0 or self.step == self.max_steps)
        if is_due:
            self.read_results(0)
        return is_due and not self.stopped

    def update(self, batch: training.Batch, loss_fn: training.LossFn, *, lr: float) -> None:
        """Do one optimizer step; its results are read and logged LAG steps later."""
        limits = dict(lr=lr, grad_clip=self.cfg.grad_clip, rt=self.rt, stop=self.stop_requested())
        read = training.train_step(self.model, self.optimizers, batch.micro_batches, loss_fn, **limits)
        self.pending.append((self.step, lr, batch.n_tokens, read))
        self.n_sequences += batch.n_sequences
        self.n_tokens += batch.n_tokens

    def read_results(self, lag: int) -> None:
        """Read and log the results of all but the last `lag` steps."""
        while len(self.pending) > lag:
            step, lr, n_tokens, read = self.pending.popleft()
            out = read()
            dt, self.clock = time.perf_counter() - self.clock, time.perf_counter()
            self.n_nonfinite = self.n_nonfinite + 1 if out.skipped else 0
            self.stopped = self.stopped or out.stop
            if self.log:
                self.log.scalars(step, train=out.loss, lr=lr, norm=out.grad_norm, **out.metrics)
                self.print_step(step, lr, n_tokens, dt, out)
            if self.n_nonfinite == MAX_NONFINITE:
                raise ValueError(
                    f"loss or gradient not finite in {MAX_NONFINITE} steps in a row (loss {out.loss}): lower --max_lr, "
                    "lengthen the warmup, or use --precision=fp32; then start again from the last checkpoint"
                )

    def print_step(self, step: int, lr: float, n_tokens: int, dt: float, out: training.StepResult) -> None:
        """Print one line for a step that took dt seconds. Tokens per second do not count padding."""
        peak = runtime.peak_flops(self.rt.device) if self.flops_per_token else None
        mfu = f" | MFU {self.flops_per_token * n_tokens / dt / (peak * self.rt.world_size):5.1%}" if peak else ""
        left = timedelta(seconds=round(dt * (self.max_steps - step)))
        line = f"step {step:6d}/{self.max_steps} | loss {out.loss:8.5f} | lr {lr:.2e} | norm {out.grad_norm:7.4f}"
        line += f" | {dt * 1e3:8.1f} ms | {n_tokens / dt:9,.0f} tok/s{mfu} | {left} left"
        print(line + " | skipped: not finite" * out.skipped, flush=True)

    def record(self, **values: float) -> None:
        """Log the results of an evaluation, with tokens and seconds so far, and keep them in `scores`."""
        self.scores = self.scores | values
        if self.log:
            self.log.scalars(self.step, **values, tokens=self.n_tokens, seconds=self.seconds)
        self.clock = time.perf_counter()  # the time of an evaluation is not part of a step

    def save(self, best: bool = False) -> None:
        """Write a checkpoint in the background, and best.pt if `best`. Does nothing if this step is saved already, or
        while losses are not finite.
        """
        if (self.step == self.saved_step and not best) or self.n_nonfinite:
            return
        self.wait_for_writer()
        if self.rt.rank == 0:
            adapters = lora.lora_weights(self.raw)
            if adapters:
                lora.save_adapter(self.out_dir / "adapter", self.raw, self.cfg.checkpoint, self.base)
            ckpt = checkpoint.Checkpoint(
                stage=self.stage,
                step=self.step,
                model=lora.merged_weights(self.raw) if adapters else self.raw.state_dict(),
                model_config=asdict(self.raw.config),
                tokenizer=self.tokenizer,
                config=asdict(self.cfg),
                optimizers=[optimizer.state_dict()["state"] for optimizer in self.optimizers],
                adapters=adapters,
                base=self.base,
                n_sequences=self.n_sequences,
                n_tokens=self.n_tokens,
                seconds=self.seconds,
                scores=self.scores,
                B=self.B,
                world_size=self.rt.world_size,
            )
            self.writing = checkpoint.save_in_background(self.writer, self.out_dir, ckpt, self.cfg.keep_last, best)
        self.saved_step, self.clock = self.step, time.perf_counter()

    def wait_for_writer(self) -> None:
        """Wait for the checkpoint in the background; raises its error, for example on a full disk."""
        if self.writing:
            self.writing.result()

    def finish(self) -> None:
        """Save if a signal stopped the run, wait for the checkpoint, close the log and leave the process group."""
        if self.stopped:
            self.save()
        self.wait_for_writer()
        stopped = f"stopped at step {self.step}; the same command continues"
        runtime.print0(stopped if self.stopped else f"done: {self.out_dir}")
        if self.log:
            runtime.logger.removeHandler(self.log)
        runtime.cleanup(self.rt)
