"""log.txt, delayed losses, checkpoints, signals and non-finite steps of a run."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import harness
import numpy as np
import pytest
import torch
from harness import BYTES

from neogpt import checkpoint, model, optim, run, runtime, training


@dataclass(frozen=True)
class Config:
    out_dir: str
    keep_last: int = 2
    grad_clip: float = 1.0
    seed: int = 3
    track: str = ""
    precision: str = "auto"
    prompt: str = "a\nb"


@pytest.fixture(autouse=True)
def isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no handlers of signals and of the log to other tests."""
    monkeypatch.setattr(runtime, "stop_on_signals", lambda: lambda: False)
    monkeypatch.setattr(runtime.logger, "handlers", [])


def open_run(folder: Path, selected: str = "fp32", **constants: Any) -> run.Run:
    """A run of a tiny model, new or resumed. selected: the precision of the Runtime."""
    opened = run.Run(Config(str(folder), **constants), "pretraining", BYTES, runtime.setup("cpu", selected))
    raw = harness.tiny_model(n_layer=1)
    if opened.resumed:
        raw = model.GPT.from_weights(raw.config, opened.resumed.model)
    opened.attach(raw, raw, optim.make_optimizers(raw, weight_decay=0.1))
    return opened


def update(opened: run.Run, factor: float = 1.0) -> None:
    """One step on 2 sequences of 8 tokens that depend on the step; the loss is multiplied by `factor`."""
    idx = (torch.arange(18).view(2, 9) * (opened.step + 3)) % 257

    def loss_fn(net: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        loss = net(batch["x"], batch["y"], reduction="sum") * factor
        return loss, dict(double=2 * loss.detach())

    opened.update(training.Batch([dict(x=idx[:, :-1], y=idx[:, 1:], n=16)], 2, 16), loss_fn, lr=1e-2)


def train(opened: run.Run, max_steps: int, save_every: int = 2, bad: tuple[int, ...] = ()) -> Path:
    """Train to the end; the loss of the steps in `bad` is not finite. Returns the folder."""
    for step in opened.steps(max_steps):
        if opened.due(save_every):
            opened.save()
        if opened.last:
            break
        update(opened, math.nan if step in bad else 1.0)
    opened.finish()
    return opened.out_dir


def log_lines(folder: Path) -> list[str]:
    with open(folder / "log.txt", encoding="utf-8") as file:  # as in most readers, \n, \r\n and \r end a line
        return file.readlines()


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_a_resumed_run_keeps_the_precision_that_was_selected(began: str, tmp_path: Path) -> None:
    """On a processor for which another one would be selected; an explicit --precision is obeyed."""
    other = dict(fp32="bf16", bf16="fp32")[began]
    folder = train(open_run(tmp_path, began), 2)
    resumed = open_run(folder, other)
    assert resumed.rt.precision == resumed.facts["precision"] == began
    assert f"keeps its precision {began}" in harness.notes(folder)
    train(resumed, 4)
    resumed = open_run(folder, other, precision=other)
    assert resumed.rt.precision == resumed.facts["precision"] == other


def test_log_is_appended_at_once_with_all_digits(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("1 train 2.5\n2 tra")
    for step in (2, 3):  # never closed
        run.Log(tmp_path).scalars(step, train=2.25, lr=0.1)
    added = [f"{step} {name}\n" for step in (2, 3) for name in ("train 2.25", "lr 0.1")]
    assert log_lines(tmp_path) == ["1 train 2.5\n", "2 tra\n", *added]  # an incomplete line is ended
    values = np.random.default_rng(0).integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    run.Log(tmp_path).scalars(4, **{f"x{i}": value for i, value in enumerate(values.tolist())})
    found = np.float32([float(line.split()[2]) for line in log_lines(tmp_path)[6:]])
    assert found.tobytes() == values.tobytes()  # the text distinguishes any two float32


def test_header_and_text_in_the_log(tmp_path: Path) -> None:
    opened = open_run(tmp_path)
    runtime.print0("50 % é\r\n5 train 1\x1b[31m\u2028")  # sampled bytes
    opened.log.scalars(7, val=2.0)
    *header, text, last = log_lines(tmp_path)
    assert (text, last) == ("# 50 % é\ufffd\\n5 train 1\ufffd[31m\u2028\n", "7 val 2\n")
    for part in (f"torch={torch.__version__}", "device=cpu", "precision=fp32", "tokenizer=bytes", "seed=3", r"'a\nb'"):
        assert part in "".join(header)
    assert all(line.startswith("# ") for line in header)


def test_closed_terminal_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP follows, after which the run saves."""
    opened = open_run(tmp_path)
    monkeypatch.setattr(sys, "stdout", Mock(write=Mock(side_effect=OSError(5, "Input/output error"))))
    train(opened, 3)
    assert checkpoint.read_newest(tmp_path).step == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", Mock(side_effect=OSError(28, "No space left on device")))
    for max_steps in (2, 4):  # the last checkpoint, and one in the background
        with pytest.raises(OSError, match=r"ckpt_000002\.pt.*No space left"):
            train(open_run(tmp_path / str(max_steps)), max_steps)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    for write in (lambda log: log.scalars(1, train=2.0), lambda log: runtime.print0("text")):
        log = run.Log(tmp_path)
        runtime.logger.handlers = [log]
        with pytest.raises(OSError, match=r"log\.txt.*No space left"):
            write(log)


def test_console_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(runtime, "peak_flops", lambda device: 80_000)
    opened = open_run(tmp_path)
    opened.max_steps, opened.flops_per_token = 110, 10
    opened.print_step(10, 6e-4, 1000, 0.25, training.StepResult(2.5, 0.75, True, False, {}))
    printed = set(capsys.readouterr().out.split())
    assert {"10/110", "2.50000", "6.00e-04", "0.7500", "250.0", "4,000", "50.0%", "0:00:25", "skipped:"} <= printed


def test_losses_are_read_late_unless_something_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lag in (0, 1):  # 1: as on a GPU
        monkeypatch.setitem(run.LAG, "cpu", lag)
        folder, due = tmp_path / str(lag), []
        opened = open_run(folder)
        for step in opened.steps(7):
            assert harness.n_losses(folder) == max(0, step - lag)
            if opened.due(3):
                due.append(step)
                assert harness.n_losses(folder) == step
            if opened.last:
                break
            update(opened)
        assert due == [0, 3, 6, 7] and opened.due(100)
        opened.save()
        opened.finish()
    harness.assert_same_run(tmp_path / "1", tmp_path / "0")
    assert harness.losses(folder, "double") == pytest.approx({s: 2 * x for s, x in harness.losses(folder).items()})


def test_nonfinite_steps_end_a_run_if_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.LAG, "cpu", 1)
    n, opened = run.MAX_NONFINITE, open_run(tmp_path)
    bad = (2, *range(4, 3 + n), *range(4 + n, 4 + 2 * n))  # one, one less than too many, too many
    with pytest.raises(ValueError, match=f"{n} steps in a row.*--max_lr"):
        train(opened, 99, 4, bad)
    assert [step for step, loss in harness.losses(tmp_path).items() if math.isnan(loss)] == list(bad)
    assert all(p.isfinite().all() for p in opened.raw.parameters())
    opened.wait_for_writer()  # not saved after a step that was skipped
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["ckpt_000004.pt"]
    train(open_run(tmp_path), 6, 2, bad=(5,))  # but the last step is saved
    assert checkpoint.read_newest(tmp_path).step == 6


def identify_on_rank(rt: runtime.Runtime, folder: Path) -> None:
    opened = run.Run(Config(str(folder)), "pretraining", BYTES, rt)
    opened.identify(kernel="fast")
    with harness.error("rank 1 differs from rank 0: data 0 -> 1"):
        opened.identify(kernel="fast", data=rt.rank)


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    harness.on_ranks(tmp_path, partial(identify_on_rank, folder=tmp_path / "ranks"))


def test_stop_saves_all_steps_that_were_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = train(open_run(tmp_path / "whole"), 9, 100), tmp_path / "stopped"
    monkeypatch.setitem(run.LAG, "cpu", 1)
    opened = open_run(stopped)
    monkeypatch.setattr(runtime, "stop_on_signals", lambda: lambda: opened.step == 5)
    train(opened, 9, 100)
    # requested in step 5, and read when step 6 is queued, which therefore counts too
    assert sorted(harness.losses(stopped)) == list(range(7))
    assert [path.name for path in checkpoint.list_checkpoints(stopped)] == ["ckpt_000007.pt"]
    train(open_run(stopped), 9, 100)
    harness.assert_same_run(stopped, whole)


def test_what_a_checkpoint_holds_and_what_no_run_continues(tmp_path: Path) -> None:
    opened = open_run(tmp_path)
    opened.base, opened.B = "1a2b", 4
    train(opened, 3)
    opened.record(val=1.25)
    opened.save(best=True)
    opened.wait_for_writer()
    ckpt, best = (checkpoint.read(tmp_path / name) for name in ("ckpt_000003.pt", "best.pt"))
    assert (ckpt.step, ckpt.n_sequences, ckpt.n_tokens, ckpt.scores) == (3, 6, 48, dict(val=1.25))
    assert (ckpt.stage, ckpt.tokenizer, ckpt.base, ckpt.B) == ("pretraining", "bytes", "1a2b", 4)
    resumed = open_run(tmp_path)
    assert ckpt.config["seed"] == 3 and resumed.seconds > ckpt.seconds > 0 and resumed.scores == ckpt.scores
    for other in (best, replace(ckpt, stage="sft")):  # without moments, as best.pt and prune.py's; of another stage
        checkpoint.write(tmp_path / "ckpt_000004.pt", other)
        with pytest.raises(ValueError, match=f"pretraining run cannot continue from {tmp_path}"):
            open_run(tmp_path)


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    code = "import sys; from neogpt import files; file = open(sys.argv[1], 'a'); files.lock(file)"
    command = [sys.executable, "-c", f"{code}; print(1, flush=True); sys.stdin.read()", str(tmp_path / "log.txt")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, env=harness.ENV, cwd=harness.ROOT, **pipes) as other:
        assert other.stdout.readline()
        with pytest.raises(OSError, match=f"{tmp_path}.*--out_dir"):
            open_run(tmp_path)
        other.kill()
        other.wait()
        train(open_run(tmp_path), 2)
