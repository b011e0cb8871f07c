"""Pretraining from end to end: killed, stopped, moved to other devices and batches, misused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hellaswag
import model
import train_gpt2
import training
from checkpoints import list_checkpoints, load_checkpoint
from data import Shard, Windows, get_tokenizer, step_windows
from model import GPT, GPTConfig
from train_gpt2 import Config, main, validate
from training import Dist

SCRIPT = Path(train_gpt2.__file__)
ALONE = Dist(0, 1, torch.device("cpu"))
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16)

Log = dict[tuple[int, str], str]


def write_text(path: Path) -> Path:
    """A text of 40 documents of random words, about 12 kB."""
    rng = random.Random(0)
    words = ["the", "fox", "sees", "a", "red", "house", "and", "sleeps", "über", "night", "runs", "."]
    documents = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(40)]
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a small text."""
    return write_text(tmp_path_factory.mktemp("text") / "input.txt")


def read_log(folder: Path) -> Log:
    """The last value of every (step, name), as it is written, but for the time it took."""
    values = {}
    for line in (folder / "log.txt").read_bytes().decode().split("\n"):
        if line and not line.startswith("#") and (m := re.fullmatch(r"(\d+) (\w+) (\S+)", line)):
            values[int(m[1]), m[2]] = m[3]
    return {key: value for key, value in values.items() if key[1] != "seconds"}


def notes(folder: Path) -> str:
    """What the log says behind `#`."""
    lines = (folder / "log.txt").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def losses(folder: Path, name: str = "train") -> dict[int, float]:
    """Step -> value of one name."""
    return {step: float(value) for (step, key), value in read_log(folder).items() if key == name}


def bits(value: Any) -> Any:
    """A nested value with its tensors as bytes."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return (value.dtype, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def final_bits(folder: Path) -> Any:
    """Step, weights and moments of a folder's newest checkpoint, as bytes."""
    state = load_checkpoint(list_checkpoints(folder)[0])
    return bits({key: state[key] for key in ("step", "model", "optimizers")})


# -----------------------------------------------------------------------------
# The real script, killed and stopped

SETTINGS = dict(
    T=64,
    B=2,
    total_batch_size=256,
    max_steps=110,
    warmup_steps=10,
    eval_every=8,
    val_tokens=512,
    device="cpu",
)
SETTINGS |= dict(n_samples=1, sample_tokens=8, save_every=5, hella_every=0, plot=False)


def command(text: Path, out_dir: Path, **settings: object) -> list[str]:
    """The command line that trains on a text."""
    settings = SETTINGS | settings
    constants = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(SCRIPT), "demo", f"--data={text}", f"--out_dir={out_dir}", *constants]


def environment() -> dict[str, str]:
    """One thread: more do not pay for a tiny model, least of all on a busy machine."""
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(SCRIPT.parent))


def run(args: list[str]) -> str:
    """Run a command to its end and return what it printed."""
    out = subprocess.run(args, env=environment(), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(command(text, folder))
    return folder


def same_run(folder: Path, uninterrupted: Path) -> None:
    """Check a run against the undisturbed one: every digit of the log, every bit of the last checkpoint."""
    got, expected = read_log(folder), read_log(uninterrupted)
    assert {key for key in expected if key[1] == "train"} == {(s, "train") for s in range(110)}
    assert {key for key in expected if key[1] == "val"} == {(s, "val") for s in [*range(0, 110, 8), 110]}
    differing = {key: (got.get(key), value) for key, value in expected.items() if got.get(key) != value}
    assert differing == {}
    assert got.keys() == expected.keys()
    assert final_bits(folder) == final_bits(uninterrupted)
    assert not list(folder.glob("*.tmp"))


def n_losses(folder: Path) -> int:
    """How many training losses a log holds, those of steps done twice counted twice."""
    path = folder / "log.txt"
    return path.read_bytes().count(b" train ") if path.exists() else 0


def wait_for(folder: Path, n: int, running: Callable[[], bool]) -> None:
    """Return when a log holds `n` training losses, or when nothing runs that could write them."""
    give_up = time.monotonic() + 120
    while n_losses(folder) < n and running():
        assert time.monotonic() < give_up, f"{n_losses(folder)} of {n} losses after two minutes"
        time.sleep(0.005)


# Starting Python and torch takes seconds. Ten lives are forked from one process that has only imported them.
NURSERY = """
import json, os, sys
import torch._dynamo
import train_gpt2
from training import parse

for line in sys.stdin:
    sys.argv = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train_gpt2.main(parse(train_gpt2.CONFIGS, train_gpt2.__doc__))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs that it kills")
def test_killed_ten_times_equals_never_killed(text: Path, tmp_path: Path, uninterrupted: Path) -> None:
    args = command(text, tmp_path)
    rng = random.Random(1)
    lives = [0, 1, 2, 4, 5, 7, 9, 11, 13, 16]  # losses that a life logs: one dies before its first step
    rng.shuffle(lives)
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([args[0], "-c", NURSERY], env=environment(), **pipes) as nursery:
        for n in lives:
            before = n_losses(tmp_path)
            nursery.stdin.write(json.dumps(args[1:]) + "\n")
            nursery.stdin.flush()
            pid = int(nursery.stdout.readline())
            try:
                wait_for(tmp_path, before + n, lambda: nursery.poll() is None)
                time.sleep(rng.uniform(0, 0.1))
            finally:
                os.kill(pid, signal.SIGKILL)
            assert nursery.stdout.readline() == f"{-signal.SIGKILL}\n"  # it did not end by itself
        nursery.stdin.close()
    assert notes(tmp_path).count("continuing") >= 5
    assert "from step" in run(args)
    same_run(tmp_path, uninterrupted)


def test_stopped_by_signals_equals_never_stopped(text: Path, tmp_path: Path, uninterrupted: Path) -> None:
    args = command(text, tmp_path)
    for signum, n in ((signal.SIGTERM, 12), (signal.SIGINT, 21)):
        process = subprocess.Popen(args, env=environment(), stdout=subprocess.PIPE, text=True)
        try:
            wait_for(tmp_path, n_losses(tmp_path) + n, lambda process=process: process.poll() is None)
            process.send_signal(signum)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0
        (stopped,) = re.findall(r"stopped at step (\d+); the same command continues", printed)
        assert list_checkpoints(tmp_path)[0].name == f"ckpt_{int(stopped):06d}.pt"
        assert max(losses(tmp_path)) == int(stopped) - 1
    assert f"from step {stopped}" in run(args)
    same_run(tmp_path, uninterrupted)


# -----------------------------------------------------------------------------
# The real script on several processes


def torchrun(args: list[str], n_processes: int = 2) -> str:
    """Run a training command on several processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    return run([args[0], *launch, *args[1:]])


def close(folder: Path, reference: Path, steps: range, tolerance: float) -> None:
    """Check that two runs have the same losses at these steps."""
    for name in ("train", "val"):
        got, expected = losses(folder, name), losses(reference, name)
        there = [step for step in steps if step in expected]
        assert there
        apart = {step: got[step] - expected[step] for step in there}
        assert max(map(abs, apart.values())) < tolerance, (name, apart)


def sampled(folder: Path, step: int) -> list[str]:
    """The samples that a log shows for a step."""
    after = notes(folder).split(f"step {step}: validation loss")[-1].splitlines()[1:]
    return [line for line in after if line.startswith("#   > ")][:2]


def test_two_processes_equal_one(cfg: Config, text: Path, tmp_path: Path) -> None:
    settings = dict(max_steps=20, eval_every=10, save_every=10, keep=9, precision="fp32", n_samples=2)
    settings |= dict(max_lr=1e-3)  # at the demo's 1e-2 rounding grows tenfold in these steps of few tokens
    one, two, moved = (tmp_path / name for name in ("one", "two", "moved"))
    train(train_gpt2.CONFIGS["demo"], **SETTINGS | settings | dict(B=4, data=str(text), out_dir=str(one)))
    printed = torchrun(command(text, two, B=1, **settings))
    assert "2 x cpu" in printed and printed.count("step      0/20") == 1  # only rank 0 speaks
    # 1e-5: float32 sums in another order; without the same batches losses differ by 1e-1
    close(two, one, range(21), 1e-5)
    assert len(sampled(one, 0)) == 2 and sampled(one, 0) == sampled(two, 0)

    moved.mkdir()
    shutil.copy(one / "ckpt_000010.pt", moved)
    torchrun(command(text, moved, B=2, **settings))
    assert min(losses(moved)) == 10
    close(moved, one, range(10, 21), 1e-5)
    assert sampled(moved, 10) == sampled(one, 10)


def test_three_processes_resumed_equal_uninterrupted_bit_for_bit(text: Path, tmp_path: Path) -> None:
    """Three, because the sum of two has one order only: here DDP's groups of gradients decide about bits."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = dict(total_batch_size=384, max_steps=10, save_every=4, keep=9)
    torchrun(command(text, whole, **settings), 3)
    resumed.mkdir()
    shutil.copy(whole / "ckpt_000004.pt", resumed)
    torchrun(command(text, resumed, **settings), 3)
    got, expected = read_log(resumed), read_log(whole)
    assert got == {(step, name): value for (step, name), value in expected.items() if step >= 4}
    assert {(step, "train") for step in range(4, 10)} < got.keys()
    assert final_bits(resumed) == final_bits(whole)


# -----------------------------------------------------------------------------
# In this process, on a model of 5,000 parameters


@pytest.fixture
def cfg(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A configuration that trains in a second. Signal handlers are put back afterwards."""
    monkeypatch.setitem(model.SIZES, "tiny", TINY)
    monkeypatch.setitem(model.SIZES, "wider", TINY | dict(n_embd=32))
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield replace(
        train_gpt2.CONFIGS["demo"],
        data=str(text),
        out_dir=str(tmp_path / "out"),
        model="tiny",
        T=16,
        B=2,
        total_batch_size=4 * 16,
        max_steps=12,
        optimizer="adamw",
        max_lr=2e-3,
        warmup_steps=3,
        eval_every=5,
        val_tokens=64,
        hella_every=0,
        n_samples=1,
        sample_tokens=6,
        plot=False,
        save_every=4,
        device="cpu",
        precision="fp32",
    )
    for signum, handler in before.items():
        signal.signal(signum, handler)


def train(cfg: Config, **changed: Any) -> Path:
    """Train with some constants changed; return the folder."""
    cfg = replace(cfg, **changed)
    main(cfg)
    return Path(cfg.out_dir)


def refused(cfg: Config, message: str, **changed: Any) -> None:
    """Check that training ends with a message of one line."""
    with pytest.raises(SystemExit, match=message) as error:
        train(cfg, **changed)
    assert "\n" not in str(error.value)


def test_batches_are_those_of_the_order_whatever_b(
    cfg: Config, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    documents = text.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    for document in documents[:36]:  # nine tenths of forty
        tokens += [256, *document.encode("utf-8")]
    windows = [tokens[start : start + 17] for start in range(0, len(tokens) - 16, 16)]
    step_of = training.train_step
    seen: list[list[dict]] = []

    def record(*args: Any, **settings: Any) -> Any:
        seen.append(args[2])
        return step_of(*args, **settings)

    monkeypatch.setattr(train_gpt2, "train_step", record)
    for B in (1, 2, 4):
        seen.clear()
        train(cfg, B=B, max_steps=3, out_dir=f"{cfg.out_dir}{B}")
        assert len(seen) == 3
        for step, batches in enumerate(seen):
            expected = [windows[i] for i in step_windows(step, 4, len(windows), cfg.seed)]
            assert [tuple(b["x"].shape) for b in batches] == [(B, 16)] * (4 // B)
            assert [row for b in batches for row in b["x"].tolist()] == [w[:-1] for w in expected]
            assert [row for b in batches for row in b["y"].tolist()] == [w[1:] for w in expected]
            assert [b["n"] for b in batches] == [B * 16] * (4 // B)


def test_the_micro_batch_does_not_change_the_curve(cfg: Config) -> None:
    reference = train(cfg, B=4)
    for B in (1, 2, None):
        close(train(cfg, B=B, out_dir=f"{cfg.out_dir}{B}"), reference, range(13), 1e-5)


def test_evaluation_samples_and_checkpoints_do_not_disturb_training(cfg: Config) -> None:
    often = train(cfg, eval_every=1, save_every=1, n_samples=3, sample_tokens=20)
    never = train(cfg, eval_every=100, save_every=100, n_samples=0, out_dir=cfg.out_dir + "2")
    for name in ("train", "norm", "lr"):
        assert losses(often, name) == losses(never, name)
        assert len(losses(often, name)) == 12
    assert final_bits(often) == final_bits(never)


def test_what_a_run_leaves_behind(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train(cfg)
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt_000008.pt", "ckpt_000012.pt", "log.txt"]
    assert losses(folder, "val").keys() == {0, 5, 10, 12}
    lr = losses(folder, "lr")
    assert lr.keys() == set(range(12))
    assert lr[0] == pytest.approx(2e-3 / 3) and lr[3] == pytest.approx(2e-3)
    state = load_checkpoint(folder / "ckpt_000012.pt")
    assert (state["step"], state["tokenizer"]) == (12, "bytes")
    assert state["scores"]["val"] == pytest.approx(losses(folder, "val")[12])
    assert not [name for name in state["model"] if name.startswith(("_orig_mod.", "module."))]
    GPT.from_weights(GPTConfig(**state["model_config"]), state["model"])  # all that sampling needs
    assert state["model_config"]["n_tokens"] == 257 and state["model_config"]["vocab_size"] == 320
    printed = capsys.readouterr().out
    assert "validation loss" in printed.splitlines()[-2] and "GPT-2" not in printed  # bytes do not compare
    assert losses(folder)[11] < losses(folder)[0] - 0.1  # it learns


def test_hellaswag_during_training(cfg: Config) -> None:
    folder = train(cfg, hella_every=5, plot=True)
    hella = losses(folder, "hella")
    assert hella.keys() == {0, 5, 10, 12}
    state = load_checkpoint(folder / "ckpt_000012.pt")
    raw = GPT.from_weights(GPTConfig(**state["model_config"]), state["model"])
    rows = hellaswag.read_rows(cfg.hella_data, cfg.hella_rows, print)
    questions = hellaswag.prepare(rows, get_tokenizer("bytes"), "completion", cfg.T, print)
    result = hellaswag.evaluate(raw, questions, training.autocast("fp32", ALONE.device), ALONE)
    assert hella[12] == pytest.approx(result.accuracy["per token"]) == state["scores"]["hella"]
    assert (folder / "Loss.png").read_bytes()[1:4] == (folder / "Hellaswag.png").read_bytes()[1:4] == b"PNG"


def test_the_table_compares_what_can_be_compared() -> None:
    raw = GPT(GPTConfig(**TINY, n_tokens=257, vocab_size=320))
    scores = dict(val=3.25, hella=0.3)
    shown = train_gpt2.table(Config(out_dir="mine"), raw, 10 * 2**19, scores, seconds=7200)
    for part in (
        "mine",
        "3.2500",
        "0.3000",
        "2.00",
        "5,242,880",
        "GPT-2 124M",
        "3.2924",
        "0.2955",
        "GPT-3 124M",
    ):
        assert part in shown
    assert "GPT" not in train_gpt2.table(Config(tokenizer="bytes"), raw, 10, {}, seconds=1)


def test_a_finished_run_only_shows_its_table(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train(cfg)
    before = read_log(folder), final_bits(folder)
    capsys.readouterr()
    train(cfg)
    assert (read_log(folder), final_bits(folder)) == before
    printed = capsys.readouterr().out
    assert "HellaSwag" in printed and "continuing" in printed and "tok/s |" not in printed


def test_more_steps_continue_a_finished_run(cfg: Config) -> None:
    folder = train(cfg)
    first = losses(folder)
    train(cfg, max_steps=15, max_lr=1e-3)
    assert losses(folder).keys() == set(range(15))
    assert all(losses(folder)[step] == loss for step, loss in first.items())
    assert re.search(r"from step 12; changed: .*max_steps 12 -> 15, max_lr 0.002 -> 0.001", notes(folder))


def test_resuming_another_model_shows_the_difference(cfg: Config) -> None:
    folder = train(cfg)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(cfg, r"another model \(n_embd 16 -> 32\).*--out_dir", model="wider")
    refused(cfg, r"another model \(block_size 16 -> 32\)", T=32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resuming_with_another_optimizer(cfg: Config) -> None:
    train(cfg, optimizer="adamw")
    refused(cfg, "--optimizer=adamw", optimizer="muon")


def test_muon_continues_exactly(cfg: Config) -> None:
    whole = train(cfg, optimizer="muon", keep=9)
    folder = Path(cfg.out_dir + "2")
    folder.mkdir()
    shutil.copy(whole / "ckpt_000004.pt", folder)
    train(cfg, optimizer="muon", out_dir=str(folder))
    assert all(read_log(whole)[key] == value for key, value in read_log(folder).items())
    assert final_bits(folder) == final_bits(whole)


def test_reading_the_numbers_late_changes_nothing(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the next step is queued before the numbers of the one before are read."""
    at_once = train(cfg, keep=9)
    monkeypatch.setitem(train_gpt2.LAG, "cpu", 1)
    late = train(cfg, keep=9, out_dir=cfg.out_dir + "2")
    assert read_log(late) == read_log(at_once)
    assert final_bits(late) == final_bits(at_once)
    folder = Path(cfg.out_dir + "3")
    folder.mkdir()
    shutil.copy(late / "ckpt_000004.pt", folder)
    train(cfg, out_dir=str(folder))
    assert all(read_log(late)[key] == value for key, value in read_log(folder).items())
    assert final_bits(folder) == final_bits(late)


def test_a_stop_that_is_read_late_saves_all_that_was_done(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_gpt2.LAG, "cpu", 1)
    steps = iter(range(10**6))
    monkeypatch.setattr(train_gpt2, "stop_on_signals", lambda: lambda: next(steps) == 5)
    folder = train(cfg, eval_every=100, save_every=100)
    # asked for in step 5, read when step 6 is queued, which therefore counts too
    assert sorted(losses(folder)) == list(range(7))
    assert list_checkpoints(folder)[0].name == "ckpt_000007.pt"
    monkeypatch.undo()
    monkeypatch.setitem(model.SIZES, "tiny", TINY)
    train(cfg, eval_every=100, save_every=100)
    whole = train(cfg, eval_every=100, save_every=100, out_dir=cfg.out_dir + "2")
    assert losses(folder) == losses(whole)
    assert final_bits(folder) == final_bits(whole)


def test_nan_read_late_is_skipped_all_the_same(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_gpt2.LAG, "cpu", 1)
    poison(monkeypatch, {3, 4, *range(9, 40)})
    refused(cfg, "10 steps in a row", max_steps=40, eval_every=100, save_every=1, keep=50)
    folder = Path(cfg.out_dir)
    assert [step for step, loss in losses(folder).items() if loss == loss] == [0, 1, 2, 5, 6, 7, 8]
    state = load_checkpoint(list_checkpoints(folder)[0])
    assert all(torch.isfinite(p).all() for p in state["model"].values())


def test_warmup_stable_decay(cfg: Config) -> None:
    folder = train(cfg, schedule="wsd", decay_frac=0.25, min_lr_frac=0.1, max_steps=12)
    level, down = [2e-3] * 7, [2e-3, 1.4e-3, 0.8e-3]  # 3 steps up, level, 3 of 12 steps down
    expected = [2e-3 / 3, 4e-3 / 3, *level, *down]
    assert list(losses(folder, "lr").values()) == pytest.approx(expected, rel=1e-6)
    # level until the decay begins: a longer run has the same steps until then
    longer = train(cfg, schedule="wsd", decay_frac=0.25, max_steps=40, out_dir=cfg.out_dir + "2")
    for step in range(9):
        assert losses(longer)[step] == losses(folder)[step]


def test_a_full_disk_in_the_background_ends_the_run(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    refused(cfg, "ckpt_000004.pt: No space left", max_steps=12)
    refused(cfg, "ckpt_000004.pt: No space left", max_steps=4, out_dir=cfg.out_dir + "2")  # the last one too


def test_resume_never(cfg: Config) -> None:
    train(cfg, resume="never", max_steps=4)
    refused(cfg, "holds checkpoints, and --resume=never", resume="never")


def test_damaged_checkpoint_falls_back_and_the_log_says_so(cfg: Config) -> None:
    whole = train(cfg)
    folder = Path(cfg.out_dir + "2")
    shutil.copytree(whole, folder)
    (folder / "log.txt").unlink()
    newest = folder / "ckpt_000012.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    train(cfg, out_dir=str(folder))
    assert re.search(r"ckpt_000012.pt.*falling back to ckpt_000008.pt", notes(folder))
    assert losses(folder).keys() == {8, 9, 10, 11}
    assert all(read_log(whole)[key] == value for key, value in read_log(folder).items())
    assert final_bits(folder) == final_bits(whole)

    for path in list_checkpoints(folder):
        path.write_bytes(b"")
    refused(cfg, "cannot use the checkpoint", out_dir=str(folder))


def test_total_batch_size_may_change_at_resume(cfg: Config) -> None:
    """Left open, B is chosen anew where the old one no longer divides: every row must count once."""
    runs = []
    for name, B in (("open", None), ("given", 1)):
        folder = train(cfg, B=None, max_steps=4, out_dir=cfg.out_dir + name)
        train(cfg, B=B, max_steps=8, total_batch_size=6 * 16, out_dir=cfg.out_dir + name)
        runs.append(folder)
        assert losses(folder, "tokens")[8] == load_checkpoint(list_checkpoints(folder)[0])["tokens"]
        assert losses(folder, "tokens")[8] == 4 * 4 * 16 + 4 * 6 * 16
    close(*runs, range(4, 9), 1e-5)


# -----------------------------------------------------------------------------
# Steps that are not finite


def poison(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the loss of these steps NaN."""
    step_of, calls = training.train_step, iter(range(10**6))

    def poisoned(model: Any, optimizers: Any, batches: Any, loss_fn: Any, **settings: Any) -> Any:
        factor = float("nan") if next(calls) in bad else 1.0
        return step_of(model, optimizers, batches, lambda m, b: loss_fn(m, b) * factor, **settings)

    monkeypatch.setattr(train_gpt2, "train_step", poisoned)


def test_nan_is_skipped_and_training_goes_on(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clean = train(cfg)
    poison(monkeypatch, {4, 5})
    folder = train(cfg, out_dir=cfg.out_dir + "2", save_every=1, keep=20)
    assert [step for step, loss in losses(folder).items() if loss != loss] == [4, 5]
    assert capsys.readouterr().out.count("skipped: not finite") == 2
    for step in range(4):
        assert losses(folder)[step] == losses(clean)[step]
    weights = [bits(load_checkpoint(folder / f"ckpt_{step:06d}.pt")["model"]) for step in (4, 5, 6, 7)]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    assert losses(folder)[11] < losses(folder)[0] - 0.1


def test_nan_ten_times_in_a_row_ends_the_run(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, *range(5, 50)})
    refused(cfg, "10 steps in a row", max_steps=40)
    folder = Path(cfg.out_dir)
    assert max(losses(folder)) == 14  # 5 … 14: the one at 3 does not count
    for path in list_checkpoints(folder):
        assert all(torch.isfinite(p).all() for p in load_checkpoint(path)["model"].values())


# -----------------------------------------------------------------------------
# Misuse


def test_sizes_that_do_not_divide(cfg: Config) -> None:
    refused(cfg, r"total_batch_size=100 is not divisible by T=16 x 1 .*: 112$", total_batch_size=100)
    refused(cfg, r"B=3 does not divide .* 4 sequences", B=3)


@pytest.mark.parametrize(
    "changed",
    [
        dict(total_batch_size=0),
        dict(total_batch_size=-64),
        dict(T=0),
        dict(B=-2),
        dict(B=0),
        dict(max_steps=0),
        dict(eval_every=0),
        dict(save_every=0),
        dict(keep=0),
        dict(seed=-1),
        dict(device="gpu"),
    ],
    ids=str,
)
def test_a_constant_out_of_range_is_named_or_harmless(cfg: Config, changed: dict[str, Any]) -> None:
    ((name, value),) = changed.items()
    try:
        folder = train(cfg, **changed)
    except (SystemExit, ValueError) as error:
        assert name in str(error) and str(value) in str(error)
    else:
        assert list_checkpoints(folder)  # nothing is lost
        assert losses(folder).keys() == set(range(12))


RECIPES = [dict(momentum=2.0), dict(grad_clip=-1.0), dict(eps=-1.0), dict(seed=2**64), dict(n_samples=-1)]


@pytest.mark.parametrize("changed", RECIPES, ids=str)
def test_a_recipe_out_of_range_is_named_before_anything_is_written(
    cfg: Config, changed: dict[str, float]
) -> None:
    ((name, value),) = changed.items()
    refused(cfg, f"^{name}={value} must be ", **changed)
    assert not Path(cfg.out_dir).exists()


def test_a_warmup_that_does_not_end_is_said(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    train(cfg, warmup_steps=12)
    assert "the warmup of 12 steps is as long as the run" in capsys.readouterr().out
    train(cfg, warmup_steps=11, out_dir=cfg.out_dir + "1")
    assert "the warmup" not in capsys.readouterr().out


def test_unknown_model(cfg: Config) -> None:
    refused(cfg, "unknown model 'gpt5': expected one of .*gpt2", model="gpt5")


def test_no_data(cfg: Config, tmp_path: Path) -> None:
    refused(cfg, "no shards in .*nowhere.*fineweb.py.*demo", data=str(tmp_path / "nowhere"))
    assert not Path(cfg.out_dir).exists()


def test_text_too_short_for_a_window(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    refused(cfg, "a.txt has .* fewer than one window", data=str(tmp_path / "a.txt"))


def write_shards(folder: Path, high: int, manifest: str | None = None) -> Path:
    """A folder of two shards with ids below `high`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("x_val_000000.npy", "x_train_000001.npy"):
        np.save(folder / name, rng.integers(0, high, 2000).astype(np.uint16))
    if manifest:
        (folder / "manifest.json").write_text(manifest)
    return folder


def test_training_on_shards(cfg: Config, tmp_path: Path) -> None:
    folder = train(cfg, data=str(write_shards(tmp_path / "good", 257)))
    assert losses(folder).keys() == set(range(12))


def test_shards_with_ids_beyond_the_vocabulary(cfg: Config, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "large", 300)
    refused(cfg, "holds the id 299, but the tokenizer has only 257", data=str(folder))
    assert not Path(cfg.out_dir).exists()


def test_shards_of_another_tokenizer(cfg: Config, tmp_path: Path) -> None:
    manifest = '{"tokenizer": "gpt2", "complete": true, "shards": []}'
    folder = write_shards(tmp_path / "gpt2", 50257, manifest)
    refused(cfg, "written with the tokenizer 'gpt2', not 'bytes'", data=str(folder))


def test_truncated_shard_is_found_before_the_first_step(cfg: Config, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "cut", 257)
    os.truncate(folder / "x_train_000001.npy", 3000)
    refused(cfg, "x_train_000001.npy is truncated", data=str(folder))


def test_too_little_disk_is_found_before_the_first_step(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    refused(cfg, "keeping 2 checkpoints")
    assert losses(Path(cfg.out_dir)) == {}


@pytest.mark.parametrize(
    "changed",
    [
        dict(prompt=""),
        dict(n_samples=0),
        dict(sample_tokens=0),
        dict(prompt="longer than the sixteen tokens of a sequence", sample_tokens=20),
        dict(prompt="a\nb <|endoftext|> 日本"),
        dict(val_tokens=1),
    ],
    ids=str,
)
def test_odd_prompts_and_counts(cfg: Config, changed: dict[str, Any]) -> None:
    folder = train(cfg, **dict(max_steps=2) | changed)
    assert losses(folder).keys() == {0, 1}
    assert all(value == value for value in losses(folder, "val").values())
    shown = [line for line in notes(folder).splitlines() if line.startswith("#   > ")]
    assert len(shown) == 2 * changed.get("n_samples", 1)
    assert all(changed.get("prompt", "Once upon a time").replace("\n", "\\n") in line for line in shown)


# -----------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize("n_windows", [1, 2, 7, 40])
def test_validation_is_the_mean_over_the_first_windows(
    n_windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    T = 16
    tokens = np.random.default_rng(n_windows).integers(0, 257, 40 * T + 5).astype(np.uint16)
    val = Windows([Shard(Path("x"), len(tokens), 0, tokens)], T)
    torch.manual_seed(0)
    raw = GPT(GPTConfig(**TINY, n_tokens=257, vocab_size=320))
    with torch.no_grad():
        for p in raw.parameters():
            p.add_(0.2 * torch.randn_like(p))  # losses that differ from window to window
        exact = GPT.from_weights(raw.config, {k: v.double() for k, v in raw.state_dict().items()})
        summed = 0.0
        for i in range(n_windows):
            window = torch.from_numpy(tokens[i * T : i * T + T + 1].astype(np.int64))
            logits = exact(window[None, :-1])[0][0]
            summed += F.cross_entropy(logits, window[1:], reduction="sum").item()
    expected = summed / (n_windows * T)

    amp = training.autocast("fp32", torch.device("cpu"))
    monkeypatch.setattr(training, "total", lambda x, dist: x)  # each rank's share, summed below
    for world_size in (1, 2, 3, 50):
        for rows in (1, 64) if world_size == 50 else (1, 3, 64):
            n_tokens = n_windows * T + T - 1  # not a whole number of windows
            shares = [
                validate(raw, val, n_tokens, rows, amp, Dist(rank, world_size, torch.device("cpu")))
                for rank in range(world_size)
            ]
            assert sum(shares) == pytest.approx(expected, rel=1e-6)  # float32 rounding of the logits


def test_validation_takes_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 257, 100).astype(np.uint16)
    val = Windows([Shard(Path("x"), 100, 0, tokens)], 16)
    raw = GPT(GPTConfig(**TINY, n_tokens=257, vocab_size=320))
    amp = training.autocast("fp32", torch.device("cpu"))
    all_there_are = validate(raw, val, 10**7, 4, amp, ALONE)
    assert all_there_are == validate(raw, val, 6 * 16, 4, amp, ALONE)
    assert all_there_are != validate(raw, val, 5 * 16, 4, amp, ALONE)


def test_a_step_that_would_take_a_cpu_an_hour_is_named() -> None:
    with torch.device("meta"):
        raw = GPT(GPTConfig())
    # 854.7 MFLOP a token (PaLM's count) times 2^19 tokens at 1e11 a second
    assert "1:14:41" in train_gpt2.slow_on_cpu(Config(), raw)
    assert not train_gpt2.slow_on_cpu(Config(total_batch_size=2**13), raw)


# -----------------------------------------------------------------------------
# On a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_compiled_on_cuda_killed_and_resumed_is_exact(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(device="cuda", compile=True, T=128, B=2, total_batch_size=1024, n_samples=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "compiled" in run(command(text, whole, **settings))
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor")
    )  # compiled anew, as on another node
    args = command(text, killed, **settings)
    for n in (7, 23):
        process = subprocess.Popen(args, env=environment(), stdout=subprocess.DEVNULL)
        try:
            wait_for(killed, n_losses(killed) + n, lambda process=process: process.poll() is None)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    run(args)
    same_run(killed, whole)


@pytest.mark.gpu
@needs_cuda
def test_the_largest_micro_batch_that_fits_is_found(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    device = torch.device("cuda:0")
    row = 2**20  # bytes

    def run_rows(rows: int) -> None:
        torch.empty(rows * row, dtype=torch.uint8, device=device)

    free, whole = torch.cuda.mem_get_info(device)
    for share in (0.5, 0.1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, s=share: (int(s * free), whole))
        room = 0.9 * (share * free + torch.cuda.memory_allocated(device))
        found = training.fit_micro_batch(run_rows, list(range(1, 2**18)), 0, device)
        assert 0.95 * room < found * row <= room
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, whole))
    with pytest.raises(SystemExit, match="not even B=1 fits"):
        training.fit_micro_batch(run_rows, [1, 2, 4], 0, device)
    monkeypatch.undo()

    monkeypatch.setitem(model.SIZES, "tiny", TINY)
    folder = train(cfg, B=None, device="cuda", compile=False)
    assert "1 x B=4 sequences" in capsys.readouterr().out
    close(folder, train(cfg, B=1, device="cuda", compile=False, out_dir=cfg.out_dir + "1"), range(13), 1e-4)
