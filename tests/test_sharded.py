"""Sharded runs (FSDP2) against one process, and the memory plan."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import ALONE, losses, samples
from torch import Tensor

import dpo
import grpo
import sft
import train_gpt2
from neogpt import checkpoint, lora, model, runtime, training


@pytest.fixture
def cfg(text_file: Path) -> train_gpt2.Config:
    small = dict(data=str(text_file), model="demo-w32", T=32, total_batch_size=192)
    small |= dict(max_steps=8, max_lr=1e-3, warmup_steps=2, eval_every=2, save_every=2, keep_last=9, val_tokens=160)
    small |= dict(n_samples=1, sample_tokens=8, hellaswag_every=8, hellaswag_rows=9, device="cpu", precision="fp32")
    return replace(train_gpt2.DEMO, **small, sharded=True)


def test_runs_on_any_number_of_ranks(cfg: train_gpt2.Config, server: harness.ForkServer, tmp_path: Path) -> None:
    def run(script: Any, name: str, cfg: Any, n_ranks: int, start: tuple[str, int] = ("", 0)) -> Path:
        """Train, sharded on several ranks. start: another run and the step from which this one continues it."""
        if start[0]:
            harness.resume(tmp_path / name, tmp_path / start[0], start[1])
        cfg = replace(cfg, out_dir=str(tmp_path / name), sharded=n_ranks > 1)
        server.run(script.__name__, harness.command_line(cfg), n_ranks)
        return tmp_path / name

    whole = run(train_gpt2, "whole", cfg, 1)
    for name, n_ranks, start, step in (("two", 2, "whole", 2), ("three", 3, "two", 4), ("one", 1, "three", 6)):
        folder = run(train_gpt2, name, cfg, n_ranks, (start, step))
        expected = {step_: loss for step_, loss in losses(whole).items() if step_ >= step}
        assert losses(folder) == pytest.approx(expected, abs=2e-6)
        assert losses(folder, "val")[step] == pytest.approx(losses(whole, "val")[step], abs=2e-6)
        assert losses(folder, "hella")[8] == losses(whole, "hella")[8]
        assert samples(folder)[0] in samples(tmp_path / start)  # of equal weights
    two = tmp_path / "two"
    harness.assert_same_run(run(train_gpt2, "again", cfg, 2, ("two", 4)), two, from_step=4)
    ours, plain = (checkpoint.read(folder / "ckpt_000008.pt") for folder in (two, whole))
    assert [*ours.model] == [*plain.model] and type(ours.model["lm_head.weight"]) is Tensor
    sizes = [(folder / "ckpt_000008.pt").stat().st_size for folder in (two, whole)]  # tied weights stay one tensor
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)

    row = dict(chosen="a fox", rejected="a")
    rows = [row | dict(instruction=f"{i}?", response=f"{i} red", prompt=f"{i}?") for i in range(20)]
    common = dict(data=harness.write_rows(tmp_path / "rows.jsonl", rows), val_frac=0.2, B=2, max_steps=2, max_lr=1e-3)
    common |= dict(eval_every=2, n_eval_prompts=3, prompts=("a?",), answer_tokens=4, device="cpu", precision="fp32")
    stages = {sft: sft.Config(**common), dpo: dpo.Config(**common, pairs_per_step=5)}
    stages[grpo] = grpo.Config(**common, prompts_per_step=3, samples_per_prompt=4, n_eval_samples=2, reward="ends(3)")
    start = two
    for script, stage in stages.items():
        stage = replace(stage, checkpoint=str(start))
        start, alone = (run(script, f"{script.__name__}{n}", stage, n) for n in (2, 1))
        harness.assert_close_runs(start, alone, abs=1e-5)


def test_what_cannot_be_sharded_or_does_not_fit_is_refused(
    cfg: train_gpt2.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = dict(checkpoint=str(tmp_path), device="cpu")
    harness.refused(sft.main, sft.Config(**common, sharded=True, lora_rank=4), "--sharded", "--lora_rank=4")
    monkeypatch.setattr(runtime, "device_memory", lambda device: 80e9)
    monkeypatch.setattr(train_gpt2, "build_model", None)  # it is not reached
    large = replace(cfg, model="gpt3-6.7b", optimizer="adamw")
    harness.refused(train_gpt2.main, large, "GB", "80.0", "--sharded", "devices")
    assert not Path(cfg.out_dir).exists()


def test_what_would_fit_is_named() -> None:
    raw, rt = harness.tiny_model(n_layer=8), ALONE._replace(world_size=4, device=torch.device("cuda"))
    options = dict(T=64, sharded=False, recompute=False, muon=False, compiled=False)
    total = lambda **changed: sum(training.plan_memory(raw, **dict(B=8, rt=rt) | options | changed).values())  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        for changed in (dict(recompute=True), dict(sharded=True), dict(B=2)):
            patch.setattr(runtime, "device_memory", lambda _, changed=changed: total(**changed))
            [(name, value)] = changed.items()
            assert f"--{name}={value}" in training.check_memory(raw, 8, rt, **options)
        patch.setattr(runtime, "device_memory", lambda _: total())
        assert "enough" not in training.check_memory(raw, 8, rt, **options)
        lora.add_lora(raw, 4, 8.0)
        patch.setattr(runtime, "device_memory", lambda _: total(sharded=True))
        message = training.check_memory(raw, 8, rt, **options)
        assert "enough would be --" in message and "--sharded" not in message  # adapters cannot be sharded


# -----------------------------------------------------------------------------
# The memory plan


@pytest.mark.parametrize(
    "name, B, residual, measured",  # on an H100, see bench/RESULTS.md
    [("gpt2", 64, "fp32", 31.1e9), ("gpt2", 64, "bf16", 28.6e9), ("gpt2-medium", 32, "bf16", 34.6e9)],
)
def test_memory_plan_of_a_compiled_step_on_cuda(name: str, B: int, residual: str, measured: float) -> None:
    rt = ALONE._replace(device=torch.device("cuda"), precision="bf16")
    with torch.device("meta"):
        raw = model.GPT(model.GPTConfig(**model.SIZES[name], residual=residual))
    plan = training.plan_memory(raw, B, 1024, rt, sharded=False, recompute=False, muon="medium" in name, compiled=True)
    assert sum(plan.values()) == pytest.approx(measured, rel=0.02)


def test_memory_in_the_readme() -> None:
    text, one = (harness.ROOT / "README.md").read_text(), ALONE._replace(device=torch.device("cuda"), precision="bf16")
    rows = re.findall(r"^\| `(gpt.*?)` \| (.*?) \| (.*?) \| (.*) \|$", text, re.M)
    assert len(rows) == 4
    for name, *cells in rows:
        cfg = train_gpt2.CONFIGS[name]
        with torch.device("meta"):
            raw = model.GPT(train_gpt2.expected_config(cfg, 50257, runtime.residual_dtype(one.device)))
        for n, cell in zip((1, 8, 8), cells):
            for shown, B, recompute in re.findall(r"(\d+) GB(?: with (?:B = (\d)|(`--recompute`)))?", cell):
                options = dict(sharded=cell is cells[2], recompute=bool(recompute), muon=False, compiled=True)
                plan = training.plan_memory(raw, int(B or 8), cfg.T, one._replace(world_size=n), **options)
                assert round(sum(plan.values()) / 1e9) == int(shown), (name, cell)


MEASURE = """
import json, sys, threading
import train_gpt2
from neogpt import checkpoint, config, model, training

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def build_model(*args):
    memory["before"] = peak()
    return build(*args)

def check_memory(raw, B, rt, **options):
    memory["planned"] = sum(training.plan_memory(raw, B, rt=rt, **options).values())
    return ""

def train_step(*args, **options):
    result = step(*args, **options)
    stepped.set()
    return result

def save(folder, ckpt, *args):
    if ckpt.step == 2:  # a slow disk: the copy stays in memory during the next step
        stepped.clear()
        stepped.wait()
    write(folder, ckpt, *args)

memory, stepped = {}, threading.Event()
build, step, write = train_gpt2.build_model, training.train_step, checkpoint.save
train_gpt2.build_model, training.check_memory = build_model, check_memory
training.train_step, checkpoint.save = train_step, save
model.pad_vocab = lambda n: int(sys.argv[1])
train_gpt2.main(config.parse(train_gpt2.CONFIGS, "", sys.argv[2:]))
print(json.dumps([memory["planned"], peak() - memory["before"]]))
"""

# most memory for libraries, for activations, and for weights, moments and the checkpoint
SHAPES = [
    "257 --hellaswag_every=2 --hellaswag_rows=4",
    "257 --model=d4 --B=8 --total_batch_size=4096 --hellaswag_every=0",
    "257 --model=d6 --optimizer=adamw --B=1 --T=64 --total_batch_size=128 --hellaswag_every=0",
]
COMMON = "--precision=fp32 --device=cpu --max_steps=3 --save_every=2 --eval_every=2 --val_tokens=2048 --sample_tokens=9"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory of a process on Linux")
def test_memory_plan_agrees_with_the_measured_peak(tmp_path: Path) -> None:
    def start(shape: str) -> subprocess.Popen:
        vocab_size, *args = f"{shape} --out_dir={tmp_path / str(SHAPES.index(shape))} {COMMON}".split()
        command = [sys.executable, "-c", MEASURE, vocab_size, "demo", *args]
        return subprocess.Popen(command, env=harness.ENV, cwd=harness.ROOT, stdout=subprocess.PIPE)

    for shape, process in zip(SHAPES, [start(shape) for shape in SHAPES]):
        planned, measured = json.loads(process.communicate()[0].splitlines()[-1])
        assert planned == pytest.approx(measured, rel=0.15), shape
