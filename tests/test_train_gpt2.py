"""Pretraining from end to end: killed, stopped, on several ranks, with other batches, and with invalid options."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import harness
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from harness import losses, notes, resume, samples

import hellaswag
import train_gpt2
from neogpt import checkpoint, data, model, runtime, training
from tools import plot
from train_gpt2 import Config, main

SCRIPT = "train_gpt2"
train, refused = partial(harness.train, main), partial(harness.refused, main)
newest = checkpoint.read_newest


@pytest.fixture
def cfg(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Trains a model of 10,000 parameters in a second."""
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=16)
    monkeypatch.setitem(model.SIZES, "tiny", tiny)
    monkeypatch.setitem(model.SIZES, "wider", tiny | dict(n_embd=32))
    small = dict(data=str(text_file), out_dir=str(tmp_path / "out"), model="tiny", T=16, B=2, total_batch_size=4 * 16)
    small |= dict(max_steps=12, optimizer="adamw", max_lr=2e-3, warmup_steps=3, save_every=4, eval_every=5)
    small |= dict(val_tokens=64, hellaswag_every=0, n_samples=1, sample_tokens=6, device="cpu", precision="fp32")
    return replace(train_gpt2.DEMO, **small)


@pytest.fixture(scope="module")
def long(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    small = dict(data=str(text_file), out_dir=str(tmp_path_factory.mktemp("whole")), model="demo-w32", T=64, B=2)
    small |= dict(total_batch_size=256, max_steps=110, warmup_steps=10, eval_every=8, save_every=5, val_tokens=512)
    return replace(train_gpt2.DEMO, **small, n_samples=1, sample_tokens=8, hellaswag_every=0, device="cpu")


def test_run_stopped_and_killed_equals_uninterrupted_run(
    long: Config, server: harness.ForkServer, tmp_path: Path
) -> None:
    server.run(SCRIPT, harness.command_line(long))
    stopped = replace(long, out_dir=str(tmp_path))
    for signum, n in ((signal.SIGTERM, 12), (signal.SIGINT, 21), (signal.SIGUSR1, 9)):
        n += harness.n_losses(tmp_path)
        pid, give_up = server.start(SCRIPT, harness.command_line(stopped)), time.monotonic() + 120
        while harness.n_losses(tmp_path) < n and time.monotonic() < give_up:
            time.sleep(0.005)
        os.kill(pid, signum)
        assert server.wait(pid) == 0
        step = max(losses(tmp_path)) + 1
        assert f"stopped at step {step}" in notes(tmp_path)
        assert checkpoint.list_checkpoints(tmp_path)[0].name == f"ckpt_{step:06d}.pt"
    # logged losses; 0: killed before its first step; more than 10: after its first checkpoint is written
    harness.kill_and_resume(server, SCRIPT, stopped, [5, 0, 13, 2, 12, 1, 4, 3, 6])
    assert f"from step {step}" in notes(tmp_path) and notes(tmp_path).count("continuing") >= 7
    assert list(losses(tmp_path)) == list(range(110)) and list(losses(tmp_path, "val")) == [*range(0, 110, 8), 110]
    harness.assert_same_run(tmp_path, Path(long.out_dir))


def test_two_and_four_ranks_equal_one(long: Config, server: harness.ForkServer, tmp_path: Path) -> None:
    one, two, four, resumed = (tmp_path / name for name in ("one", "two", "four", "resumed"))
    # at the demo's 1e-2, rounding grows tenfold in these steps of few tokens
    settings = dict(max_steps=8, eval_every=4, save_every=4, keep_last=9, precision="fp32", max_lr=1e-3)
    long = replace(long, **settings, model="demo", n_samples=2)  # large enough for two of DDP's groups of gradients
    server.run(SCRIPT, harness.command_line(replace(long, B=4, out_dir=str(one))))

    resume(two, one, 4)
    shutil.copy(one / "log.txt", two)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train_gpt2.__file__]
    args = harness.command_line(replace(long, B=1, out_dir=str(two)))
    out = subprocess.run([sys.executable, *launch, *args], env=harness.ENV, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "2 x cpu" in out.stdout and len(re.findall(r"step +4/8", out.stdout)) == 1  # only rank 0 prints
    assert harness.n_losses(two) == 8 + 4
    assert len(samples(one)) == 4 and samples(two)[4:6] == samples(one)[:2]  # of equal weights

    # four, because a sum of two has only one order: here DDP's groups of gradients determine the bits
    server.run(SCRIPT, harness.command_line(replace(long, B=1, out_dir=str(four))), n_ranks=4)
    resume(resumed, four, 4)
    server.run(SCRIPT, harness.command_line(replace(long, B=1, out_dir=str(resumed))), n_ranks=4)
    assert list(losses(resumed)) == list(range(4, 8))
    harness.assert_same_run(resumed, four, from_step=4)
    for folder in (two, four):
        harness.assert_close_runs(folder, one)  # other batches would differ by 1e-1
        harness.assert_close_runs(folder, one, ("norm",), abs=1e-3)  # the optimizers do not see the scale of gradients


def test_losses_are_means_over_the_windows_of_the_order(cfg: Config, text_file: Path, tmp_path: Path) -> None:
    """Also after the batch size has changed: the position continues, and every sequence counts once."""
    base = harness.tiny_model(n_layer=1, block_size=16, scale=0.3)
    cfg = replace(cfg, init_from=str(harness.write_model(tmp_path / "base", base)), max_lr=0.0)
    tokens = []
    for document in text_file.read_text(encoding="utf-8").split(f"\n{data.EOT}\n")[:36]:  # nine tenths of forty
        tokens += [256, *document.encode("utf-8")]
    windows = torch.tensor([tokens[start : start + 17] for start in range(0, len(tokens) - 16, 16)])
    with torch.no_grad():
        logits = base.double()(windows[:, :-1])
    loss = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
    order = data.windows_at(0, 4 * 4 + 4 * 6 + 2 * 3, len(windows), cfg.seed)
    means = [loss[part].mean().item() for part in np.split(order, [*range(4, 17, 4), *range(22, 41, 6), 43])]
    for name, B in (("open", None), ("given", 1)):
        out_dir = str(tmp_path / name)
        train(cfg, B=B, max_steps=4, out_dir=out_dir)
        train(cfg, B=B, max_steps=8, total_batch_size=6 * 16, out_dir=out_dir)
        folder = train(cfg, B=B, max_steps=10, total_batch_size=3 * 16, out_dir=out_dir)
        assert list(losses(folder).values()) == pytest.approx(means, abs=1e-5)
        assert newest(folder).n_sequences == 46 and newest(folder).n_tokens == 46 * 16
        assert losses(folder, "tokens") == {0: 0, 4: 256, 5: 352, 8: 640, 10: 736}


def test_validation_uses_the_compiled_step(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    monkeypatch.setattr(runtime, "require_compiler", lambda device: None)
    expected = train(cfg)
    folder = train(cfg, compile=True, val_tokens=3 * cfg.T, out_dir=cfg.out_dir + "2")
    assert graphs.frame_count == 2  # of training and of validation, whose last batch is not full
    assert losses(folder) == losses(expected)


def test_largest_micro_batch_that_fits_is_chosen(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rt = harness.ALONE._replace(device=torch.device("cuda"))
    run = SimpleNamespace(cfg=replace(cfg, B=None), rt=rt, resumed=None, raw=harness.tiny_model())
    options = dict(T=16, sharded=False, recompute=False, muon=False, compiled=False)
    needed = sum(training.plan_memory(run.raw, 6, rt=run.rt, **options).values())
    for memory, B in ((needed / 0.84, 6), (needed / 0.86, 4), (1, 1), (math.inf, 12)):
        monkeypatch.setattr(runtime, "device_memory", lambda _, memory=memory: memory)
        assert training.pick_B(run, 12, **options) == B
    for world_size, resumed_B, B in ((1, 3, 3), (1, 5, 12), (2, 3, 12)):  # kept: the same B gives the same bits
        run.resumed = SimpleNamespace(world_size=world_size, B=resumed_B)
        assert training.pick_B(run, 12, **options) == B


def test_evaluation_samples_and_checkpoints_do_not_disturb_training(cfg: Config) -> None:
    cfg = replace(cfg, schedule="wsd", decay_frac=0.25)
    often = train(cfg, eval_every=1, save_every=1, n_samples=3, sample_tokens=20, hellaswag_every=1)
    never = train(cfg, eval_every=100, save_every=100, n_samples=0, out_dir=cfg.out_dir + "2")
    lr = [2e-3 / 3, 4e-3 / 3, *[2e-3] * 8, 2e-3 * 2 / 3, 2e-3 / 3]  # 3 steps up, constant, 3 of 12 steps down
    assert list(losses(often, "lr").values()) == pytest.approx(lr)
    assert losses(often)[11] < losses(often)[0] - 0.1  # it learns
    assert len(samples(often)) == 12 * 3  # none of the untrained model
    assert [path.name for path in checkpoint.list_checkpoints(often)] == ["ckpt_000012.pt", "ckpt_000011.pt"]
    for name in ("train", "norm", "lr"):
        assert len(losses(often, name)) == 12
        assert losses(often, name) == losses(never, name)
    assert harness.final_bits(often) == harness.final_bits(never)


def test_finished_run_only_shows_its_table_and_can_be_extended(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train(cfg)
    log, bits = harness.read_log(folder), harness.final_bits(folder)
    capsys.readouterr()
    train(cfg)
    printed = capsys.readouterr().out
    assert "HellaSwag" in printed and "continuing" in printed and "tok/s |" not in printed
    assert (harness.read_log(folder), harness.final_bits(folder)) == (log, bits)
    train(cfg, max_steps=15, max_lr=1e-3)
    assert list(losses(folder)) == list(range(15))
    assert log.items() <= harness.read_log(folder).items()
    assert re.search(r"from step 12; changed: .*max_steps 12 -> 15, .*max_lr 0.002 -> 0.001", notes(folder))


def test_hellaswag_during_training(cfg: Config) -> None:
    folder = train(cfg, hellaswag_every=5, hellaswag_rows=50)
    scores = losses(folder, "hella")
    assert list(scores) == [0, 5, 10, 12]
    tokenizer = data.get_tokenizer("bytes")
    rows = hellaswag.read_rows(cfg.hellaswag_data, 50)
    questions = hellaswag.prepare(rows, tokenizer, "completion", cfg.T)
    result = hellaswag.evaluate(checkpoint.load_model(str(folder)).raw, questions, harness.ALONE)
    assert scores[12] == pytest.approx(result.accuracy["per token"]) == newest(folder).scores["hella"]
    assert newest(folder).scores["val"] == pytest.approx(losses(folder, "val")[12])
    assert [path.name for path in plot.draw([plot.read_log(folder)], folder)] == ["Loss.png", "Hellaswag.png"]


def test_hellaswag_that_cannot_be_read(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(cfg, "missing.jsonl", hellaswag_every=5, hellaswag_data="missing.jsonl")
    monkeypatch.setattr(hellaswag, "read_rows", Mock(side_effect=OSError("no network")))
    folder = train(cfg, hellaswag_every=5)  # training goes on without it
    assert len(losses(folder)) == 12 and "no network" in notes(folder)


def test_results_table() -> None:
    done = SimpleNamespace(raw=harness.tiny_model(), n_tokens=5_242_880, seconds=7200, scores=dict(val=3.25, hella=0.3))
    table = train_gpt2.results_table(Config(out_dir="mine"), done)
    cells = "mine 3.2500 0.3000 2.00 5,242,880 728 3.2924 0.2955".split()
    assert set(cells) <= set(table.split()) and "GPT-2 124M" in table and "GPT-3 124M" in table
    done.scores = {}
    assert "GPT" not in train_gpt2.results_table(Config(tokenizer="bytes"), done)


def test_what_changes_the_curve_is_reported(cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)  # saves a minute
    text = Path(cfg.data).read_text(encoding="utf-8")
    changes = {}
    for name, other in (("training_data", text.replace("the", "tha", 3)), ("validation_data", text[:-1])):
        (tmp_path / name).write_text(other, encoding="utf-8")
        changes[name] = dict(data=str(tmp_path / name))
    rows = [dict(ctx=f"the {i}", endings=["a", "red", "house", "fox"], label=0) for i in range(10)]
    questions = [harness.write_rows(tmp_path / f"{n}.jsonl", rows[:n]) for n in (10, 9)]
    changes |= {"seed 1337 -> 5": dict(seed=5), "max_lr": dict(max_lr=0.1), "B 2 -> 4": dict(B=4)}
    changes |= {"hellaswag ": dict(hellaswag_data=questions[1]), "kernel flash": dict(attention="manual")}
    changes |= {"residual auto -> bf16": dict(residual="bf16"), "compiled False -> True": dict(compile=True)}
    cfg = replace(cfg, hellaswag_data=questions[0], hellaswag_every=50, eval_every=50)
    harness.check_changes_are_reported(main, cfg, changes)


def test_the_residual_stream_of_a_run_is_kept(cfg: Config, tmp_path: Path) -> None:
    bf16, fp32 = replace(cfg, residual="bf16"), replace(cfg, out_dir=str(tmp_path / "fp32"))
    for start, residual in ((bf16, "bf16"), (fp32, "fp32")):
        folder = train(replace(start, max_steps=4, schedule="wsd", decay_frac=0.0))
        assert checkpoint.load_model(str(folder)).raw.config.residual == residual
        train(replace(start, residual="auto", max_steps=6, schedule="wsd", decay_frac=0.0))
        assert checkpoint.load_model(str(folder)).raw.config.residual == residual
    run = Mock(cfg=cfg, resumed=None, rt=harness.ALONE._replace(device=torch.device("cuda")))
    run.tokenizer.n_vocab = 257
    assert train_gpt2.build_model(run).config.residual == "bf16"


def test_weights_of_another_shape_are_refused(cfg: Config, tmp_path: Path) -> None:
    folder = train(cfg)
    log, bits = harness.read_log(folder), harness.final_bits(folder)
    refused(cfg, "--model=wider", "n_embd 16 -> 32", "--out_dir", model="wider")
    refused(cfg, "block_size 16 -> 32", T=32)
    refused(cfg, "optimizer adamw -> muon", optimizer="muon")
    refused(cfg, "--max_steps=11", "step 12", max_steps=11)
    assert (harness.read_log(folder), harness.final_bits(folder)) == (log, bits)
    other = replace(cfg, out_dir=str(tmp_path / "other"), init_from=str(folder))
    refused(other, "n_embd 16 -> 32", str(folder), model="wider")
    run = Mock(cfg=other, resumed=None, rt=harness.ALONE)
    run.tokenizer.n_vocab = 999  # more than the model's vocab_size
    with harness.error("n_tokens 257 -> 999", str(folder)):
        train_gpt2.build_model(run)


def test_options_data_and_disk_are_checked_before_the_first_step(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("beta2", 1.0), ("device", "gpu"), ("model", "gpt5"), ("B", 3), ("total_batch_size", 100)):
        refused(cfg, f"--{name}={value}", **{name: value})
    for name in ("x_val_000000.npy", "x_train_000001.npy"):
        np.save(tmp_path / name, np.arange(300, dtype=np.uint16))
    refused(cfg, "x_train_000001.npy", "299", "257", data=str(tmp_path))
    (tmp_path / "a.txt").write_text("short")
    refused(cfg, "a.txt", "T + 1 = 17", data=str(tmp_path / "a.txt"))
    assert not Path(cfg.out_dir).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    refused(cfg, "--keep_last=2", "0.00 GB free")
    assert losses(Path(cfg.out_dir)) == {}


PROMPTS = [dict(prompt=""), dict(n_samples=0), dict(sample_tokens=0), dict(prompt="a\nb <|endoftext|> 日本")]
PROMPTS += [dict(prompt="longer than the sixteen tokens of a sequence", sample_tokens=20), dict(val_tokens=1)]


@pytest.mark.parametrize("changed", PROMPTS, ids=str)
def test_unusual_prompts_and_counts(cfg: Config, changed: dict[str, Any]) -> None:
    folder = train(cfg, **dict(max_steps=2) | changed)
    assert list(losses(folder)) == [0, 1]
    assert all(np.isfinite(value) for value in losses(folder, "val").values())
    assert len(samples(folder)) == changed.get("n_samples", 1)
    prompt = changed.get("prompt", cfg.prompt).replace("\n", "\\n")
    assert all(prompt in line for line in samples(folder))


def test_warning_if_a_step_is_too_slow_for_a_cpu(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--total_batch_size" not in notes(train(cfg, max_steps=1))
    monkeypatch.setattr(model.GPT, "flops_per_token", lambda self, T: 2e11)
    assert "--total_batch_size" in notes(train(cfg, max_steps=1, out_dir=cfg.out_dir + "2"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_run_killed_and_resumed_on_cuda(long: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = replace(long, device="cuda", compile=True, T=128, total_batch_size=1024, n_samples=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with harness.fork_server() as server:
        server.run(SCRIPT, harness.command_line(replace(long, out_dir=str(whole))))
    assert "compile=True" in notes(whole)
    monkeypatch.setitem(harness.ENV, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # as on another node
    with harness.fork_server() as server:
        harness.kill_and_resume(server, SCRIPT, replace(long, out_dir=str(killed)), [7, 23])
    harness.assert_same_run(killed, whole)


def test_a_branch_equals_the_run_of_that_length(cfg: Config, tmp_path: Path) -> None:
    wsd = replace(cfg, schedule="wsd", decay_frac=0.25, optimizer="muon", max_lr=1e-2, eval_every=4, momentum=0.9)
    trunk = train(wsd, out_dir=str(tmp_path / "trunk"), max_steps=40, save_every=6, keep_last=9)
    whole = train(wsd, out_dir=str(tmp_path / "whole"), max_steps=24)
    start = trunk / "ckpt_000018.pt"
    branch = replace(wsd, out_dir=str(tmp_path / "branch"), branch_from=str(start), max_steps=24, save_every=2)
    train(branch)
    harness.assert_same_run(tmp_path / "branch", whole)
    assert harness.read_log(tmp_path / "branch") == harness.read_log(whole)
    assert list(plot.read_log(tmp_path / "branch").curves["tokens"][1]) == [64 * step for step in range(0, 25, 4)]

    # interrupted, it continues its own newest checkpoint, without the trunk
    stopped = resume(tmp_path / "stopped", tmp_path / "branch", 22)
    shutil.copy(tmp_path / "branch" / "log.txt", stopped)
    shutil.rmtree(trunk)
    train(branch, out_dir=str(stopped))
    assert "from step 22" in notes(stopped)
    harness.assert_same_run(stopped, whole)
    train(branch, out_dir=str(stopped), max_steps=26)  # extended as any run, also after its decay has begun
    assert list(losses(stopped))[-1] == 25


def test_a_branch_that_is_not_the_run_of_that_length_is_refused(cfg: Config, tmp_path: Path) -> None:
    wsd = replace(cfg, schedule="wsd", decay_frac=0.5, save_every=5)
    trunk = train(wsd, out_dir=str(tmp_path / "trunk"), max_steps=20, keep_last=9)
    branch = replace(wsd, out_dir=str(tmp_path / "branch"), branch_from=str(trunk / "ckpt_000010.pt"), max_steps=20)
    for step, changed in ((7, dict(max_steps=13)), (0, dict(max_lr=1e-3)), (4, dict(schedule="cosine"))):
        refused(branch, f"step {step}", branch.branch_from, **changed)
    refused(branch, "step 11", "wsd", branch_from=str(trunk / "ckpt_000015.pt"), max_steps=25)
    refused(branch, "step 9", max_steps=9, decay_frac=0.0)
    refused(branch, "missing.pt", branch_from=str(trunk / "missing.pt"))
    refused(branch, "optimizer adamw -> muon", branch.branch_from, optimizer="muon")
    refused(branch, "n_layer", f"in {branch.branch_from}", model="demo")
    refused(branch, "--out_dir", out_dir=f"{trunk}/../trunk")
    refused(cfg, "--out_dir", out_dir=str(trunk), init_from=str(trunk))
    refused(branch, "--init_from", "--branch_from", init_from=str(trunk))
    old = checkpoint.read(trunk / "ckpt_000010.pt")
    checkpoint.write(tmp_path / "old.pt", replace(old, config=dict(optimizer=cfg.optimizer)))
    refused(branch, "old.pt", "decay_frac", branch_from=str(tmp_path / "old.pt"))
    assert not checkpoint.list_checkpoints(tmp_path / "branch")
    (trunk / "log.txt").unlink()
    assert list(losses(train(branch))) == list(range(10, 20))
