"""Sharded training (FSDP2) against one process, activation checkpointing, and the memory plan."""

import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import ALONE, losses
from torch import Tensor, nn

import dpo
import grpo
import sft
import train_gpt2
from neogpt import checkpoint, model, optim, runtime, training

# -----------------------------------------------------------------------------
# The training step

T, N_STEPS, POISONED = 12, 20, 5


def loss_fn(net: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss; `poison` makes its gradient infinite."""
    loss = net(batch["x"], batch["y"], reduction="sum")
    if batch["poison"]:
        loss.register_hook(lambda grad: grad * math.inf)
    return loss, {}


def train(rt: runtime.Runtime, optimizer: str) -> tuple[list, dict[str, Tensor], list]:
    """20 steps of a float64 model whose 257 rows of the embedding do not divide by the number of ranks; the results,
    the weights and the gathered moments. Ranks have micro-batches of different sizes.
    """
    raw = harness.tiny_model(scale=0.1, vocab_size=257, block_size=T).double()
    training.wrap(raw, rt, sharded=True, recompute=False)
    optimizers, results = optim.make_optimizers(raw, optimizer=optimizer, weight_decay=0.1), []
    for step in range(N_STEPS):
        xy = torch.randint(257, (12, T + 1), generator=torch.Generator().manual_seed(step)).tensor_split(rt.world_size)
        batches = [dict(x=r[:, :-1], y=r[:, 1:], n=len(r) * T) for r in xy[rt.rank].tensor_split([1 + rt.rank % 2])]
        for i, batch in enumerate(batches):
            batch["poison"] = step == POISONED and rt.rank == rt.world_size - 1 and i == 0
        settings = dict(lr=1e-2, grad_clip=0.1 if step % 2 else 0.0, rt=rt)
        results.append(tuple(training.train_step(raw, optimizers, batches, loss_fn, **settings)()[:3]))
    full = lambda x: x.detach().full_tensor() if runtime.is_sharded(x) else x.detach()  # noqa: E731
    moments = [full(x) for o in optimizers for state in o.state_dict()["state"].values() for x in state.values()]
    return results, {name: full(p) for name, p in raw.named_parameters()}, moments


def train_both(rt: runtime.Runtime) -> list:
    return [train(rt, optimizer) for optimizer in ("adamw", "muon")]


def test_sharded_steps_equal_one_process(tmp_path: Path, n_ranks: int = 2) -> None:
    ranks = harness.on_ranks(tmp_path, train_both, n_ranks)
    for k, (results, weights, moments) in enumerate(train_both(ALONE)):
        assert [skipped for _, _, skipped in results] == [step == POISONED for step in range(N_STEPS)]
        assert min(norm for _, norm, skipped in results if not skipped) > 0.1  # so that clipping changes a step
        for found, found_weights, found_moments in (rank[k] for rank in ranks):
            for (loss, norm, skipped), (expected_loss, expected_norm, expected_skipped) in zip(found, results):
                assert loss == pytest.approx(expected_loss, rel=3e-7)  # summed in float32
                assert (norm, skipped) == (pytest.approx(expected_norm, rel=1e-6, nan_ok=True), expected_skipped)
            for name, p in weights.items():  # a gradient of zero up to rounding is divided by at least eps
                torch.testing.assert_close(found_weights[name], p, rtol=1e-8, atol=1e-8)
            for x, expected in zip(found_moments, moments, strict=True):
                torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_bits(precision: str) -> None:
    rt, found, n_saved = ALONE._replace(precision=precision), [], []
    for recompute in (False, True):
        raw = harness.tiny_model(n_layer=4, n_embd=64)
        training.wrap(raw, rt, sharded=False, recompute=recompute)
        idx, saved = torch.arange(128).view(4, 32), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss, _ = training.backward(raw, dict(x=idx, y=idx + 1, poison=False), loss_fn, 1.0, rt)
        found.append(harness.bits([loss, [p.grad for p in raw.parameters()]]))
        n_saved.append(sum(saved))
    assert found[0] == found[1] and n_saved[1] < 0.5 * n_saved[0]


# -----------------------------------------------------------------------------
# Runs


@pytest.fixture
def cfg(tmp_path: Path) -> train_gpt2.Config:
    """A short run of the demo's model on random words."""
    rng = random.Random(0)
    text = "\n<|endoftext|>\n".join(
        " ".join(rng.choice(["a", "fox", "sees", "red"]) for _ in range(60)) for _ in range(40)
    )
    (tmp_path / "input.txt").write_text(text)
    small = dict(data=str(tmp_path / "input.txt"), out_dir=str(tmp_path / "whole"), T=32, B=1, total_batch_size=192)
    small |= dict(max_steps=9, max_lr=1e-3, warmup_steps=2, eval_every=3, save_every=3, keep_last=9, val_tokens=448)
    small |= dict(n_samples=1, sample_tokens=8, hellaswag_every=9, hellaswag_rows=9, device="cpu", precision="fp32")
    return replace(train_gpt2.DEMO, **small, sharded=True)


def test_runs_on_any_number_of_ranks(cfg: train_gpt2.Config, server: harness.ForkServer, tmp_path: Path) -> None:
    def run(script: Any, name: str, cfg: Any, n_ranks: int, **changed: Any) -> Path:
        """Train; a pretraining run continues from step 3 of the whole run."""
        (tmp_path / name).mkdir()
        if script is train_gpt2 and name != "whole":
            shutil.copy(tmp_path / "whole" / "ckpt_000003.pt", tmp_path / name)
        cfg = replace(cfg, out_dir=str(tmp_path / name), **changed)
        server.run(script.__name__, harness.command_line(cfg), n_ranks)
        return tmp_path / name

    def samples(folder: Path) -> list[str]:
        return [line for line in harness.notes(folder).splitlines() if line.startswith("#   >")]

    whole = run(train_gpt2, "whole", cfg, 2)
    harness.assert_same_run(run(train_gpt2, "two", cfg, 2), whole, from_step=3)
    for name, n_ranks, sharded in (("three", 3, True), ("alone", 1, False)):
        folder = run(train_gpt2, name, cfg, n_ranks, sharded=sharded)
        assert len(losses(folder)) == 6
        expected = {step: loss for step, loss in losses(whole).items() if step >= 3}
        assert losses(folder) == pytest.approx(expected, abs=1e-6)
        assert losses(folder, "val")[3] == pytest.approx(losses(whole, "val")[3], abs=1e-6)
        assert losses(folder, "hella")[9] == losses(whole, "hella")[9] and samples(folder)[0] == samples(whole)[0]
    ours, plain = (checkpoint.read(folder / "ckpt_000009.pt") for folder in (whole, folder))
    assert [*ours.model] == [*plain.model] and type(ours.model["lm_head.weight"]) is Tensor
    sizes = [(folder / "ckpt_000009.pt").stat().st_size for folder in (whole, folder)]  # tied weights stay one tensor
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)

    rows = [
        dict(instruction=f"{i}?", response=f"{i} red", chosen="a fox", rejected=f"{i}", prompt=f"{i}?")
        for i in range(20)
    ]
    common = dict(data=harness.write_rows(tmp_path / "rows.jsonl", rows), val_frac=0.2, B=2, max_steps=3, max_lr=1e-3)
    common |= dict(eval_every=3, n_eval_prompts=3, prompts=("a?",), answer_tokens=4, device="cpu", precision="fp32")
    stages = {sft: sft.Config(**common), dpo: dpo.Config(**common, pairs_per_step=5)}
    stages[grpo] = grpo.Config(**common, prompts_per_step=3, samples_per_prompt=4, n_eval_samples=2, reward="ends(3)")
    start = whole
    for script, stage in stages.items():
        stage = replace(stage, checkpoint=str(start))
        start, alone = (run(script, f"{script.__name__}{n}", stage, n, sharded=n > 1) for n in (2, 1))
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


# -----------------------------------------------------------------------------
# The memory plan


def test_memory_plan_of_a_compiled_step_on_cuda() -> None:
    rt = ALONE._replace(device=torch.device("cuda"), precision="bf16")
    with torch.device("meta"):
        raw = model.GPT(model.GPTConfig())
    plan = training.plan_memory(raw, 64, 1024, rt, sharded=False, recompute=False, muon=False, compiled=True)
    assert sum(plan.values()) == pytest.approx(31.1e9, rel=0.05)  # measured on an H100, see bench/RESULTS.md


MEASURE = """
import json, sys, threading
import train_gpt2
from neogpt import checkpoint, config, model, training

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def build_model(*args):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM, the peak, starts again
    memory["before"] = status("VmRSS")
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
print(json.dumps([memory["planned"], status("VmHWM") - memory["before"]]))
"""

# most memory for libraries, for activations, and for weights, moments and the checkpoint
SHAPES = [
    "257 --hellaswag_every=2 --hellaswag_rows=4",
    "257 --model=d4 --B=8 --total_batch_size=4096 --hellaswag_every=0",
    "257 --model=d6 --optimizer=adamw --B=1 --T=64 --total_batch_size=128 --hellaswag_every=0",
]
COMMON = "--precision=fp32 --device=cpu --max_steps=3 --save_every=2 --eval_every=2 --val_tokens=2048 --sample_tokens=9"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of a process on Linux")
def test_memory_plan_agrees_with_the_measured_peak(tmp_path: Path) -> None:
    def start(shape: str) -> subprocess.Popen:
        vocab_size, *args = f"{shape} --out_dir={tmp_path / str(SHAPES.index(shape))} {COMMON}".split()
        command = [sys.executable, "-c", MEASURE, vocab_size, "demo", *args]
        return subprocess.Popen(command, env=harness.ENV, cwd=harness.ROOT, stdout=subprocess.PIPE)

    for shape, process in zip(SHAPES, [start(shape) for shape in SHAPES]):
        planned, measured = json.loads(process.communicate()[0].splitlines()[-1])
        assert planned == pytest.approx(measured, rel=0.15), shape
