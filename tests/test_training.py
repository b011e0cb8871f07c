"""Command line, schedule, optimizer, the training step on one and two processes, checkpoints and the log."""

import ast
import importlib
import io
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import threading
import tokenize
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import files
import training
from checkpoints import (
    differences,
    find_resume,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    require_checkpoint_space,
    save_checkpoint,
    save_in_background,
)
from files import make_folder, require_space, written_whole
from model import GPT, GPTConfig
from optimizers import make_optimizers, newton_schulz, orthogonalize
from training import (
    Dist,
    Log,
    StepResult,
    attention_kernel,
    autocast,
    backward,
    barrier,
    check_recipe,
    cleanup,
    cosine_lr,
    count_bad,
    parse,
    pick_precision,
    require_compiler,
    setup,
    stop_on_signals,
    train_step,
    wsd_lr,
)

ROOT = Path(training.__file__).parent
ALONE = Dist(0, 1, torch.device("cpu"))
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, n_tokens=50, vocab_size=64)


# -----------------------------------------------------------------------------
# Command line


@dataclass(frozen=True)
class Config:
    max_lr: float = 6e-4  # peak learning rate
    compile: bool | None = None  # None: on CUDA
    exact: bool = True  # the same bits
    B: int | None = 8  # rows
    mode: Literal["auto", "never"] = "auto"  # one of two
    prompt: str = "Hello,"  # text


CONFIGS = {"gpt2": Config(), "demo": Config(max_lr=1e-3, B=4)}


def parsed(*args: str) -> Config:
    """The constants that a command line gives."""
    return parse(CONFIGS, "What it does.", list(args))


def test_first_configuration_is_the_default_and_names_pick_others() -> None:
    assert parsed() == CONFIGS["gpt2"]
    assert parsed("gpt2") == CONFIGS["gpt2"]
    assert parsed("demo") == CONFIGS["demo"]
    assert parsed("demo", "--max_lr=0.5") == Config(max_lr=0.5, B=4)


def test_constants_from_the_command_line() -> None:
    assert parsed("--max_lr=1e-3") == parsed("--max-lr=1e-3") == parsed("--max-lr", "1e-3")
    assert parsed("--max_lr=1e-3") == Config(max_lr=1e-3)
    assert parsed("--compile=False").compile is False
    assert parsed("--compile", "True").compile is True
    assert parsed("--compile=None").compile is None
    assert parsed("--exact=False").exact is False
    assert parsed("--B=None").B is None
    assert parsed("--B=16").B == 16
    assert parsed("--mode=never").mode == "never"
    assert parsed("--prompt=").prompt == ""
    assert parsed("--prompt=--x = 'é'\n").prompt == "--x = 'é'\n"


def test_command_line_defaults_to_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "demo", "--B=2"])
    assert parse(CONFIGS, "What it does.") == Config(max_lr=1e-3, B=2)


def test_unknown_configuration() -> None:
    with pytest.raises(SystemExit, match="'dmeo': expected one of gpt2, demo"):
        parsed("dmeo")


@pytest.mark.parametrize(
    "args", [["--max_lrr=1"], ["--max-lrr=1"], ["--max_lrr", "1"], ["demo", "--max_l=1"]], ids=" ".join
)
def test_unknown_constant_gets_a_suggestion(args: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        parsed(*args)
    printed = "".join(capsys.readouterr())
    assert error.value.code == 2 or isinstance(error.value.code, str)
    told = printed + str(error.value.code)
    assert args[-1].split("=")[0] in told or args[0] in told
    assert re.search(r"--max[-_]lr\b", told)


@pytest.mark.parametrize("args", [["--B=x"], ["--max_lr"], ["--mode=sometimes"], ["--B=2", "demo"]])
def test_a_wrong_value_ends_with_code_2(args: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        parsed(*args)
    assert error.value.code == 2
    assert "".join(capsys.readouterr())


def trailing_comments(path: Path) -> dict[str, str]:
    """The comment on the lines of each field of the class Config of a file ("" where there is none)."""
    source = path.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (config,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    return {
        field.target.id: " ".join(
            comments[line] for line in range(field.lineno, field.end_lineno + 1) if line in comments
        )
        for field in config.body
        if isinstance(field, ast.AnnAssign)
    }


SCRIPTS = [p.stem for p in sorted(ROOT.glob("*.py")) if "\nCONFIGS = {" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_comment_of_every_constant(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as error:
        parse(module.CONFIGS, module.__doc__, ["--help"])
    assert error.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    comments = trailing_comments(Path(module.__file__))
    assert {name: text for name, text in comments.items() if not text or text not in shown} == {}
    for name in module.CONFIGS:
        assert name in shown


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    for args in (["--help"], ["--max_lrr=1"]):
        with pytest.raises(SystemExit):
            parsed(*args)
        assert "".join(capsys.readouterr()) == ""


# -----------------------------------------------------------------------------
# Devices, precision, signals


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert [pick_precision(p, cpu) for p in ("bf16", "fp32")] == ["bf16", "fp32"]
    for has_amx, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert pick_precision("auto", cpu) == expected
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with training.autocast(precision, cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert training.peak_flops(cpu) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        setup("cuda", deterministic=True)


def test_first_signal_asks_to_stop_and_the_second_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        for signum in before:
            requested = stop_on_signals()
            assert not requested()
            os.kill(os.getpid(), signum)
            assert requested()
            if signum == signal.SIGINT:
                assert signal.getsignal(signum) == signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)  # at once: a launcher's and a scheduler's are one
        monkeypatch.setattr(training, "SAME_STOP", 0.0)
        monkeypatch.setattr(
            os, "kill", lambda *args: killed.append((signal.getsignal(signal.SIGTERM), *args))
        )
        signal.raise_signal(signal.SIGTERM)
        assert killed == [(signal.SIG_DFL, os.getpid(), signal.SIGTERM)]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# -----------------------------------------------------------------------------
# Schedule, optimizer


@pytest.mark.parametrize(
    "step, lr",
    [
        (0, 0.1),  # the first step already moves
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (35, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),  # a quarter of the way: cos 45°
        (60, 0.55),  # half-way, half of the range
        (110, 0.1),
        (500, 0.1),
    ],
)
def test_cosine_lr(step: int, lr: float) -> None:
    settings = dict(max_steps=110, warmup_steps=10, min_lr_frac=0.1)
    assert cosine_lr(step, max_lr=1.0, **settings) == pytest.approx(lr, rel=1e-12)
    assert cosine_lr(step, max_lr=6e-4, **settings) == pytest.approx(6e-4 * lr, rel=1e-12)


@pytest.mark.parametrize(
    "step, lr",
    [(0, 0.25), (3, 1.0), (4, 1.0), (59, 1.0), (80, 1.0), (85, 0.775), (90, 0.55), (100, 0.1), (200, 0.1)],
)
def test_wsd_lr(step: int, lr: float) -> None:
    settings = dict(max_steps=100, warmup_steps=4, min_lr_frac=0.1, decay_frac=0.2)
    assert wsd_lr(step, max_lr=1.0, **settings) == pytest.approx(lr, rel=1e-12)
    assert wsd_lr(step, max_lr=6e-4, **settings) == pytest.approx(6e-4 * lr, rel=1e-12)


def test_wsd_lr_at_its_edges() -> None:
    settings = dict(max_lr=1.0, min_lr_frac=0.0)
    assert wsd_lr(9, max_steps=10, warmup_steps=0, decay_frac=0.0, **settings) == 1.0  # nothing goes down
    assert wsd_lr(10, max_steps=10, warmup_steps=0, decay_frac=0.0, **settings) == 0.0
    assert wsd_lr(5, max_steps=10, warmup_steps=0, decay_frac=1.0, **settings) == 0.5  # all of it does


def test_cosine_lr_at_its_edges() -> None:
    settings = dict(max_lr=1.0, min_lr_frac=0.0)
    assert cosine_lr(0, max_steps=4, warmup_steps=0, **settings) == 1.0
    assert cosine_lr(4, max_steps=4, warmup_steps=0, **settings) == 0.0
    assert cosine_lr(3, max_steps=4, warmup_steps=4, **settings) == 1.0
    assert cosine_lr(4, max_steps=4, warmup_steps=4, **settings) == 1.0  # no step is left to go down in


ADAMW = dict(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(kind: str) -> None:
    raw = GPT(TINY)
    raw.transformer.wpe.weight.requires_grad_(False)
    optimizers = make_optimizers(raw, optimizer=kind, **ADAMW)
    names = {id(p): name for name, p in raw.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    sets = [{names[id(p)] for p in group["params"]} for group in groups]
    embedding = {"transformer.wte.weight"}
    matrices = {n for n in names.values() if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    plain = {n for n in names.values() if n.endswith(".bias") or ".ln_" in n}
    assert len(matrices) == 2 * 4
    expected = {"adamw": [embedding | matrices, plain], "muon": [embedding, plain, matrices]}
    assert sets == expected[kind]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1][: len(groups)]
    for group in optimizers[0].param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 24), (2, 24, 6)], ids=str)
def test_orthogonalize_keeps_singular_vectors(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = 1e-3 * torch.randn(shape, generator=draw, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    s = S / S.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):  # the same five steps, on the singular values alone
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = U @ torch.diag_embed(s) @ Vh
    others = [torch.randn(8, 30, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)]  # in between
    got = orthogonalize([*x[:1], *others, *x[1:]])
    for a, b in zip([got[0], *got[3:]], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)  # float64 rounding
    assert all(a.isfinite().all() for a in orthogonalize(list(torch.zeros(shape))))
    # the way of CUDA
    wide = (x.mT if shape[1] > shape[2] else x) / x.norm(dim=(1, 2), keepdim=True)
    expected = expected.mT if shape[1] > shape[2] else expected
    torch.testing.assert_close(newton_schulz(wide), expected, rtol=1e-8, atol=1e-8)


def test_orthogonalize_in_float32_of_nearly_singular_matrices() -> None:
    """The product of polynomials in X Xᵀ squares the singular values: small ones must survive float32."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=draw) @ torch.randn(4, 128, generator=draw)
    x = x + 1e-3 * torch.randn(32, 128, generator=draw)
    exact = newton_schulz(x.double()[None] / x.double().norm())[0]
    [found] = orthogonalize([x])
    assert (found - exact).norm() < 1e-3 * exact.norm()


def test_muon_equals_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's orthogonalises in bf16, which would hide everything behind the second digit: here in float64
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x)
    raw = GPT(TINY).double()
    other = deepcopy(raw)
    matrices = [name for name, p in raw.named_parameters() if p.dim() == 2 and ".h." in name]
    muon = make_optimizers(raw, optimizer="muon", **ADAMW)[1]
    settings = dict(lr=0.02, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    reference = torch.optim.Muon([other.get_parameter(n) for n in matrices], weight_decay=0.1, **settings)
    muon.param_groups[0]["lr"] = 0.02
    start = {name: raw.get_parameter(name).detach().clone() for name in matrices}
    for step in range(4):
        for number, name in enumerate(matrices):
            shape, draw = raw.get_parameter(name).shape, torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(shape, generator=draw, dtype=torch.float64)
            raw.get_parameter(name).grad, other.get_parameter(name).grad = gradient, gradient.clone()
        muon.step()
        reference.step()
    for name in matrices:
        ours = raw.get_parameter(name).detach() - start[name]
        theirs = other.get_parameter(name).detach() - start[name]
        assert (ours - theirs).norm() < 1e-9 * theirs.norm()  # rounding, five times through cubes and fifths


# -----------------------------------------------------------------------------
# The training step


def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The batch's summed loss; `poison` spoils the loss or only its gradient."""
    loss = model(batch["x"], batch["y"], reduction="sum")[1]
    if batch.get("poison") == "loss":
        loss = loss * math.nan
    if batch.get("poison") == "gradient":
        loss.register_hook(lambda grad: grad * math.inf)
    return loss


def rows(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of which about half, a different share in each row, are -100."""
    draw = torch.Generator().manual_seed(seed)
    xy = torch.randint(TINY.n_tokens, (n_rows, 13), generator=draw)
    x, y = xy[:, :-1], xy[:, 1:].clone()
    y[torch.rand(y.shape, generator=draw) < torch.rand(n_rows, 1, generator=draw)] = -100
    y[0], y[1, 1:] = torch.randint(TINY.n_tokens, (12,), generator=draw), -100  # all, and at most one
    return x, y


def micro_batches(x: Tensor, y: Tensor, sizes: list[int]) -> list[dict[str, Any]]:
    """Rows cut into micro-batches of these sizes."""
    return [dict(x=xs, y=ys, n=int((ys != -100).sum())) for xs, ys in zip(x.split(sizes), y.split(sizes))]


def tiny(seed: int = 0) -> GPT:
    """A tiny model in float64, where 1e-9 is far above rounding and far below any mistake."""
    torch.manual_seed(seed)
    raw = GPT(TINY).double()
    with torch.no_grad():
        for p in raw.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return raw


def big_batch_update(raw: GPT, x: Tensor, y: Tensor, lr: float, clip: float) -> tuple[dict, float, float]:
    """One plain SGD step on the mean over all targets: (parameters after it, loss, gradient norm)."""
    logits, _ = raw(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
    params = dict(raw.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()))
    norm = math.sqrt(sum(float(g.detach().square().sum()) for g in grads))
    scale = min(1.0, clip / norm) if clip else 1.0
    after = {name: (p - lr * scale * g).detach() for (name, p), g in zip(params.items(), grads)}
    return after, loss.item(), norm


SPLITS = [[8], [4, 4], [1] * 8, [1, 5, 2], [6, 1, 1]]


@pytest.mark.parametrize("clip", [0, 1e-2, 1e3], ids=["no clipping", "clipped", "below the limit"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_step_equals_one_big_batch(sizes: list[int], clip: float) -> None:
    raw = tiny()
    x, y = rows(8, seed=1)
    after, loss, norm = big_batch_update(raw, x, y, lr=0.5, clip=clip)
    optimizers = [torch.optim.SGD(raw.parameters(), lr=123.0, fused=True)]
    read = train_step(
        raw, optimizers, micro_batches(x, y, sizes), loss_fn, lr=0.5, grad_clip=clip, dist=ALONE
    )
    out = read()
    for name, p in raw.named_parameters():
        # 1e-6: clip_grad_norm_ adds 1e-6 to the norm; otherwise float64 rounding
        torch.testing.assert_close(p.detach(), after[name], rtol=1e-9, atol=2e-6 * (clip or 1e-4))
    assert out.loss == pytest.approx(loss, rel=1e-6)  # summed in float32
    assert out.grad_norm == pytest.approx(norm, rel=1e-6)
    assert (out.skipped, out.stop) == (False, False)
    assert all(p.grad is None or not p.grad.any() for p in raw.parameters())


def test_several_adamw_steps_equal_pytorchs_own() -> None:
    raw = tiny()
    other = deepcopy(raw)
    settings = dict(betas=(0.9, 0.95), eps=1e-8)
    optimizers = make_optimizers(raw, optimizer="adamw", weight_decay=0.1, **settings)
    decayed = [p for p in other.parameters() if p.dim() > 1]
    plain = [p for p in other.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.1), dict(params=plain, weight_decay=0.0)],
        **settings,
        foreach=False,
        fused=False,
    )
    for step in range(4):
        x, y = rows(8, seed=step)
        lr = 1e-2 / (step + 1)
        train_step(
            raw, optimizers, micro_batches(x, y, SPLITS[step + 1]), loss_fn, lr=lr, grad_clip=0, dist=ALONE
        )
        for group in reference.param_groups:
            group["lr"] = lr
        logits, _ = other(x)
        F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100).backward()
        reference.step()
        reference.zero_grad()
    for a, b in zip(raw.parameters(), other.parameters()):
        # a gradient that is 0 but for rounding (the keys' bias) is divided by eps at most: 1e-17 / 1e-8
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def snapshot(raw: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[bytes]:
    """All parameters and all optimizer state, as bytes."""
    tensors = list(raw.state_dict().values())
    for state in [state for o in optimizers for state in o.state_dict()["state"].values()]:
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [t.detach().numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("where, kind", [(0, "adamw"), (1, "muon"), (2, "muon")])
def test_a_step_that_is_not_finite_changes_nothing(poison: str, where: int, kind: str) -> None:
    raw = tiny()
    optimizers = make_optimizers(raw, optimizer=kind, **ADAMW)
    x, y = rows(8, seed=1)

    def step(spoiled: bool, lr: float) -> StepResult:
        batches = micro_batches(x, y, [3, 3, 2])
        if spoiled:
            batches[where]["poison"] = poison
        return train_step(raw, optimizers, batches, loss_fn, lr=lr, grad_clip=1.0, dist=ALONE)()

    assert not step(False, 1e-3).skipped
    before = snapshot(raw, optimizers)
    clean = deepcopy(raw), [deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    out = step(True, 1e-3)
    assert out.skipped
    assert math.isfinite(out.loss) == (poison == "gradient")
    assert not math.isfinite(out.grad_norm)
    assert snapshot(raw, optimizers) == before

    assert not step(False, 2e-3).skipped  # nothing of the bad gradient is left for the next step
    after = snapshot(raw, optimizers)
    raw = clean[0]
    optimizers = make_optimizers(raw, optimizer=kind, **ADAMW)
    for optimizer, state in zip(optimizers, clean[1]):
        optimizer.load_state_dict(state)
    step(False, 2e-3)
    assert snapshot(raw, optimizers) == after


def test_step_sets_the_learning_rate_of_every_group() -> None:
    raw = tiny()
    optimizers = make_optimizers(raw, optimizer="muon", **ADAMW)
    x, y = rows(4, seed=1)
    train_step(raw, optimizers, micro_batches(x, y, [4]), loss_fn, lr=0.25, grad_clip=1.0, dist=ALONE)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [0.25] * 3


def test_step_passes_on_a_request_to_stop() -> None:
    raw = tiny()
    optimizers = [torch.optim.SGD(raw.parameters(), fused=True)]
    x, y = rows(4, seed=1)
    for stop in (True, False):
        batches = micro_batches(x, y, [4])
        read = train_step(raw, optimizers, batches, loss_fn, lr=0.1, grad_clip=1.0, dist=ALONE, stop=stop)
        assert read().stop is stop


@pytest.mark.parametrize("attention, kernel", [("flash", "flash attention"), ("manual", "written-out")])
def test_the_attention_kernel_is_named(attention: str, kernel: str) -> None:
    amp = autocast("fp32", ALONE.device)
    found = attention_kernel(replace(TINY, attention=attention), 2, 16, amp, ALONE.device)
    assert kernel in found and "slow" not in found


def test_bad_steps_in_a_row_are_counted() -> None:
    bad, good = StepResult(math.nan, math.nan, True, False), StepResult(1.0, 1.0, False, False)
    count = 0
    for _ in range(9):
        count = count_bad(count, bad)
    assert count == 9
    assert count_bad(count, good) == 0
    with pytest.raises(SystemExit, match="10 steps in a row.*max_lr"):
        count_bad(count, bad)


# -----------------------------------------------------------------------------
# Two processes

CUTS = {"even": ([3, 2, 1], [1, 4, 1]), "one and five": ([6], [1, 2, 1, 1, 1]), "uneven rows": ([9, 1], [2])}


def ddp_worker(rank: int, port: int, folder: Path) -> None:
    """One of two processes: takes its part of each step and writes down what came out."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist = setup("cpu", deterministic=True)
    assert (dist.rank, dist.world_size, dist.device.type) == (rank, 2, "cpu")
    x, y = rows(12, seed=3)
    results: dict[str, Any] = {}

    def step(sizes: tuple[list[int], list[int]], poison: str | None = None, **more: Any) -> dict[str, Any]:
        raw = tiny()
        model = DistributedDataParallel(raw)
        optimizers = [torch.optim.SGD(raw.parameters(), fused=True)]
        mine = slice(0, sum(sizes[0])) if rank == 0 else slice(sum(sizes[0]), 12)
        batches = micro_batches(x[mine], y[mine], sizes[rank])
        if rank == 1 and poison:
            batches[0]["poison"] = poison
        read = train_step(model, optimizers, batches, loss_fn, lr=0.5, grad_clip=1e-2, dist=dist, **more)
        return dict(out=tuple(read()), params={n: p.detach().clone() for n, p in raw.named_parameters()})

    for name, sizes in CUTS.items():
        results[name] = step(sizes)
    for poison in ("loss", "gradient"):
        results[poison] = step(CUTS["even"], poison)
    results["stop"] = step(CUTS["even"], stop=rank == 1)

    for what, own in (("shared", "c"), ("apart", f"c{rank}")):
        try:
            state = find_resume(folder / own, "auto", dist, lambda text: None)
            results[what] = state and state["step"]
        except SystemExit as error:
            results[what] = str(error)
    barrier(dist)
    torch.save(results, folder / f"rank{rank}.pt")
    cleanup(dist)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks of `ddp_worker` wrote down."""
    folder = tmp_path_factory.mktemp("ddp")
    for name, step in (("c", 7), ("c0", 3), ("c1", 4)):
        (folder / name).mkdir()
        save_checkpoint(folder / name, checkpoint(step), keep=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(ddp_worker, (port, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("cut", CUTS)
def test_two_processes_equal_one_big_batch(two_ranks: list[dict[str, Any]], cut: str) -> None:
    after, loss, norm = big_batch_update(tiny(), *rows(12, seed=3), lr=0.5, clip=1e-2)
    for result in two_ranks:
        for name, p in result[cut]["params"].items():
            torch.testing.assert_close(p, after[name], rtol=1e-9, atol=2e-8)  # as on one process
        out = StepResult(*result[cut]["out"])
        assert out.loss == pytest.approx(loss, rel=1e-6)
        assert out.grad_norm == pytest.approx(norm, rel=1e-6)
        assert (out.skipped, out.stop) == (False, False)
    for name, p in two_ranks[0][cut]["params"].items():
        assert torch.equal(p, two_ranks[1][cut]["params"][name])


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_one_bad_rank_skips_the_step_on_all(two_ranks: list[dict[str, Any]], poison: str) -> None:
    start = dict(tiny().named_parameters())
    for result in two_ranks:
        assert StepResult(*result[poison]["out"]).skipped
        assert all(torch.equal(p, start[name]) for name, p in result[poison]["params"].items())


def test_a_stop_on_one_rank_arrives_at_all(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        out = StepResult(*result["stop"]["out"])
        assert out.stop and not out.skipped


def test_all_ranks_must_see_the_same_checkpoint(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        assert result["shared"] == 7
        assert "different checkpoints (steps [3, 4])" in result["apart"]


# -----------------------------------------------------------------------------
# Checkpoints


def checkpoint(step: int, n: int = 5000) -> dict[str, Any]:
    """A small state with every kind of value that belongs into one."""
    draw = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(n, generator=draw), "b": torch.randn(7, generator=draw).bfloat16()}
    moments = {0: dict(step=torch.tensor(3.0), exp_avg=torch.randn(n, generator=draw))}
    return dict(
        step=step,
        model=weights,
        optimizer=moments,
        model_config=dict(n_layer=2, attention="flash"),
        tokenizer="bytes",
        config=dict(B=None, max_lr=6e-4, names=["a", "b"], on=True),
        val_loss=math.nan,
    )


def same(a: Any, b: Any) -> bool:
    """Equal, tensors by dtype and bits, NaN to NaN."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            if a.dim()
            else same(a[None], b[None])
        )
    return type(a) is type(b) and (a == b or a != a and b != b)


def saved(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps in a folder, all kept."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        save_checkpoint(folder, checkpoint(step), keep=100)
    return [folder / f"ckpt_{step:06d}.pt" for step in steps]


def flip(path: Path, place: int) -> None:
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 16
    path.write_bytes(raw)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 500)
    state = load_checkpoint(path)
    assert state.pop("format") == checkpoints.FORMAT
    assert same(state, checkpoint(500))
    assert os.listdir(tmp_path) == ["ckpt_000500.pt"]
    assert open_checkpoint(path)["step"] == open_checkpoint(tmp_path)["step"] == 500


def test_a_checkpoint_in_the_background_is_of_its_moment(tmp_path: Path) -> None:
    state = checkpoint(500)
    state["model"]["tied"] = state["model"]["w"]
    state["optimizers"] = [{0: dict(exp_avg=torch.ones(3))}]
    expected = deepcopy(state)
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait)
        writing = save_in_background(pool, tmp_path, state, keep=1)
        for tensor in (state["model"]["w"], state["model"]["b"], state["optimizers"][0][0]["exp_avg"]):
            tensor.add_(1)  # the steps that follow
        state["step"] = 501
        assert not list_checkpoints(tmp_path)
        release.set()
        writing.result()
    found = load_checkpoint(tmp_path / "ckpt_000500.pt")
    del found["format"]
    assert same(found["model"], expected["model"]) and same(found["optimizer"], expected["optimizer"])
    assert same(found["optimizers"][0], expected["optimizers"][0])
    weights = found["model"]
    assert weights["tied"].data_ptr() == weights["w"].data_ptr()  # tied weights are written once


def test_a_failure_in_the_background_arrives(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        writing = save_in_background(pool, tmp_path / "missing", checkpoint(1), keep=1)
        with pytest.raises(SystemExit, match="cannot write .*ckpt_000001.pt"):
            writing.result()


def test_the_newest_are_kept_and_newest_is_by_number(tmp_path: Path) -> None:
    saved(tmp_path, 9000, 12000, 999_999)
    save_checkpoint(tmp_path, checkpoint(1_000_000), keep=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["ckpt_1000000.pt", "ckpt_999999.pt"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert open_checkpoint(tmp_path)["step"] == 1_000_000


def test_only_checkpoints_are_listed_and_removed(tmp_path: Path) -> None:
    for name in ("ckpt_best.pt", "ckpt_000001.pt.tmp", "ckpt_000002.pt.bak", "log.txt", "my_ckpt_000003.pt"):
        (tmp_path / name).write_text("mine")
    save_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_000005.pt"]
    assert len(os.listdir(tmp_path)) == 6


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()], ids=repr
)
def test_failed_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    saved(tmp_path, 1, 2)

    def fail(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half a checkpoint")
        file.flush()
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    for step in (2, 3):  # over an old one, and anew
        with pytest.raises(SystemExit if isinstance(failure, OSError) else type(failure)) as error:
            save_checkpoint(tmp_path, checkpoint(step), keep=1)
        if isinstance(failure, OSError):
            assert f"ckpt_{step:06d}.pt: No space left" in str(error.value)
        assert sorted(os.listdir(tmp_path)) == ["ckpt_000001.pt", "ckpt_000002.pt"]
        assert same(load_checkpoint(tmp_path / "ckpt_000002.pt")["model"], checkpoint(2)["model"])


@pytest.mark.parametrize("limit", [100, 300_000, 800_500], ids=["at once", "in a tensor", "at the end"])
def test_full_disk_is_one_line_and_leaves_the_old_one(tmp_path: Path, limit: int) -> None:
    resource = pytest.importorskip("resource", reason="limits on file size are a POSIX matter")
    saved(tmp_path, 1, 2)
    state = checkpoint(3, 100_000)  # two tensors of 400 kB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(SystemExit) as error:
            save_checkpoint(tmp_path, state, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["ckpt_000001.pt", "ckpt_000002.pt"]
    assert load_checkpoint(tmp_path / "ckpt_000002.pt")["step"] == 2
    assert re.fullmatch(r"cannot write .*ckpt_000003.pt: .*", str(error.value))


def damage(path: Path, how: str) -> None:
    """Damage a checkpoint."""
    size = path.stat().st_size
    if how == "truncated":
        os.truncate(path, size // 2)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "last byte missing":
        os.truncate(path, size - 1)
    elif how == "a bit of a tensor":
        weights = checkpoint(int(path.stem.split("_")[1]))["model"]["w"].numpy().tobytes()
        place = path.read_bytes().find(weights)
        assert place > 0
        flip(path, place + len(weights) // 2)
    elif how == "zeros":
        path.write_bytes(bytes(size))


@pytest.mark.parametrize("how", ["truncated", "empty", "last byte missing", "a bit of a tensor", "zeros"])
def test_damaged_checkpoint_falls_back(tmp_path: Path, how: str) -> None:
    paths = saved(tmp_path, 1, 2, 3)
    damage(paths[2], how)
    said: list[str] = []
    state = open_checkpoint(tmp_path, said.append)
    assert state["step"] == 2
    assert len(said) == 1 and str(paths[2]) in said[0] and "ckpt_000002.pt" in said[0]
    assert "\n" not in said[0]
    with pytest.raises(SystemExit, match="ckpt_000003.pt"):
        open_checkpoint(paths[2])  # asked for by name: no other will do

    damage(paths[1], how)
    damage(paths[0], how)
    said.clear()
    with pytest.raises(SystemExit, match="ckpt_000001.pt"):
        open_checkpoint(tmp_path, said.append)
    assert len(said) == 2


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    good = path.read_bytes()
    expected = load_checkpoint(path)
    rng = random.Random(0)
    for _ in range(150):
        path.write_bytes(good)
        flip(path, rng.randrange(len(good)))
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert same(state, expected)


class Creates:
    """Unpickled, it makes a folder: a stand-in for worse."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["in a checkpoint", "old torch.save", "pickle"])
def test_objects_are_refused_and_not_run(tmp_path: Path, form: str) -> None:
    made = tmp_path / "made"
    path = tmp_path / "ckpt_000009.pt"
    state = {"format": 1} | checkpoint(9) | {"extra": Creates(made)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "in a checkpoint")
    with pytest.raises(ValueError, match="ckpt_000009.pt") as error:
        load_checkpoint(path)
    if form == "in a checkpoint":
        assert "Python objects" in str(error.value)
    with pytest.raises(SystemExit):
        open_checkpoint(tmp_path)
    assert not made.exists()
    with open(path, "rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert made.exists()  # it would have


@pytest.mark.parametrize(
    "content, complaint",
    [
        ({"format": 2} | checkpoint(1), "format 2, not 1"),
        (checkpoint(1), "not written by NeoGPT"),
        ({"format": 1, "model": {}}, "not written by NeoGPT"),
        ([1, 2], "not written by NeoGPT"),
        (torch.ones(3), "not written by NeoGPT"),
    ],
    ids=["newer format", "no format", "other keys", "a list", "a tensor"],
)
def test_foreign_checkpoint(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "ckpt_000001.pt")
    with pytest.raises(ValueError, match=complaint) as error:
        load_checkpoint(tmp_path / "ckpt_000001.pt")
    assert "ckpt_000001.pt" in str(error.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match=r"no checkpoint in .*train_gpt2.py demo"):
            open_checkpoint(path)


def test_find_resume(tmp_path: Path) -> None:
    said: list[str] = []
    assert find_resume(tmp_path, "auto", ALONE, said.append) is None
    assert find_resume(tmp_path, "never", ALONE, said.append) is None
    saved(tmp_path, 9, 10)
    (tmp_path / "ckpt_000011.pt.tmp").write_text("killed while it was written")
    (tmp_path / "notes.tmp").write_text("not ours")
    assert find_resume(tmp_path, "auto", ALONE, said.append)["step"] == 10
    assert sorted(os.listdir(tmp_path)) == ["ckpt_000009.pt", "ckpt_000010.pt", "notes.tmp"]
    assert said == []
    with pytest.raises(SystemExit, match="--resume=never"):
        find_resume(tmp_path, "never", ALONE, said.append)


def test_differences() -> None:
    old = dict(max_lr=6e-4, B=None, T=1024, gone=1)
    assert differences(old, dict(max_lr=6e-4, B=None, T=1024)) == ""
    assert differences(old, dict(max_lr=1e-3, B=8, T=1024)) == "max_lr 0.0006 -> 0.001, B None -> 8"
    assert differences(old, dict(new="x", T=1024)) == "new None -> x"


# -----------------------------------------------------------------------------
# Log


def test_log_appends_and_keeps_what_is_there(tmp_path: Path) -> None:
    for step in range(3):
        log = Log(tmp_path, ALONE)
        log.note(f"run {step}", quiet=True)
        log.scalars(step, train=1.5, lr=0.1)
        assert (tmp_path / "log.txt").read_text().endswith(f"{step} train 1.5\n{step} lr 0.1\n")  # no delay
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == [line for s in range(3) for line in (f"# run {s}", f"{s} train 1.5", f"{s} lr 0.1")]


def test_log_repairs_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("1 train 2.5\n2 tra")
    Log(tmp_path, ALONE).scalars(2, train=2.25)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == "1 train 2.5" and lines[-1] == "2 train 2.25"


def test_logged_values_are_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0.1, 1 / 3, 1e-45, 3.4e38, 0.0])])
    log = Log(tmp_path, ALONE)
    for step, value in enumerate(values.tolist()):
        log.scalars(step, train=value)
    got = np.float32([float(line.split()[2]) for line in (tmp_path / "log.txt").read_text().splitlines()])
    assert got.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "text", ["a\nb", "a\rb", "a\r\n5 train 1.0", "5 train 1.0", "\n", "\x85\u2028\x0b", "\ufffd"]
)
def test_a_note_is_one_line_behind_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    log = Log(tmp_path, ALONE)
    log.note(text)
    log.scalars(7, val=2.0)
    with open(tmp_path / "log.txt", encoding="utf-8") as file:
        lines = file.readlines()  # any of \n, \r\n and \r ends a line, as for every reader of text
    assert len(lines) == 2
    assert lines[0].startswith("# ")
    assert lines[1] == "7 val 2\n"
    assert capsys.readouterr().out.startswith(text.splitlines()[0][:1])


def test_a_note_carries_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Log(tmp_path, ALONE).note("a\x1b[31m\x00b\tc é")  # what a young model of bytes may well sample
    expected = "a\ufffd[31m\ufffdb\ufffdc é\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "# " + expected


def test_a_console_that_cannot_show_a_character_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows redirected to a file; an untrained model on bytes samples U+FFFD all the time
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    setup("cpu", deterministic=False)
    Log(tmp_path, ALONE).note("a\ufffdb")
    assert "a\ufffdb" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_header_names_configuration_and_versions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Log(tmp_path, ALONE).header(Config(prompt="a\nb"), device="cpu", B=4)
    text = (tmp_path / "log.txt").read_text()
    assert all(line.startswith("# ") for line in text.splitlines())
    for part in (torch.__version__, "device=cpu", "B=4", "max_lr=0.0006", "exact=True"):
        assert part in text
    assert capsys.readouterr().out == ""


def test_only_rank_0_logs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = Log(tmp_path, Dist(1, 2, torch.device("cpu")))
    log.note("x")
    log.scalars(1, train=1.0)
    log.header(Config())
    log.line(1, 2, StepResult(1.0, 1.0, False, False), 0.1, 0.1, 10, None)
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""


def test_console_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = Log(tmp_path, ALONE)
    log.line(10, 110, StepResult(2.5, 0.75, False, False), 6e-4, 0.25, 1000, 0.5)
    line = capsys.readouterr().out
    for part in (
        "10/110",
        "2.50000",
        "6.00e-04",
        "0.7500",
        "250.0 ms",
        "4,000 tok/s",
        "50.0%",
        "0:00:25 left",
    ):
        assert part in line
    assert "skipped" not in line
    log.line(11, 110, StepResult(math.nan, math.inf, True, False), 6e-4, 0.25, 1000, None)
    line = capsys.readouterr().out
    assert "skipped" in line and "MFU" not in line
    assert os.listdir(tmp_path) == ["log.txt"] and (tmp_path / "log.txt").read_text() == ""


# -----------------------------------------------------------------------------
# Files


def test_space_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 3 * 10**9))
    require_space(tmp_path, 3 * 10**9, "this")
    with pytest.raises(SystemExit, match=r"this needs 4\.00 GB.* 3\.00 GB free") as error:
        require_space(tmp_path, 4 * 10**9, "this")
    assert str(tmp_path) in str(error.value)


def test_space_for_checkpoints_counts_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    for name, n_bytes in (
        ("ckpt_000001.pt", 70),
        ("ckpt_000002.pt", 50),
        ("ckpt_000003.pt", 40),
        ("best.pt", 9),
    ):
        (tmp_path / name).write_bytes(bytes(n_bytes))
    for n_best, needed in ((0, 3 * 12 * 10 - 50 - 40 - 9), (1, 4 * 12 * 10 - 50 - 40 - 9)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=needed: usage(10**12, 0, n))
        require_checkpoint_space(tmp_path, 10, keep=2, n_best=n_best)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=needed: usage(10**12, 0, n - 1))
        with pytest.raises(SystemExit, match="keeping 2 checkpoints"):
            require_checkpoint_space(tmp_path, 10, keep=2, n_best=n_best)


def test_a_checkpoint_is_not_removed_for_a_later_one_that_cannot_be_read(tmp_path: Path) -> None:
    for step in (8, 16):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    (tmp_path / "ckpt_000016.pt").write_bytes(b"half")
    save_checkpoint(tmp_path, checkpoint(9), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["ckpt_000009.pt", "ckpt_000016.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_log_on_a_full_disk_ends_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    for write in (lambda log: log.scalars(1, train=2.0), lambda log: log.note("a note", quiet=True)):
        log = Log(tmp_path, ALONE)
        with pytest.raises(SystemExit, match="cannot write .*log.txt: No space left on device"):
            write(log)


def test_written_whole_flushes_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: done.append("fsync") or fsync(fd))
    monkeypatch.setattr(files.os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent and path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    assert done[:2] == ["fsync", "replace"]


@pytest.mark.parametrize(
    "failure", [KeyError("x"), KeyboardInterrupt(), OSError(28, "No space left")], ids=repr
)
def test_written_whole_or_not_at_all(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(SystemExit if isinstance(failure, OSError) else type(failure)) as error:
        with written_whole(path) as temporary:
            temporary.write_text("ne")
            raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    if isinstance(failure, OSError):
        assert f"cannot write {path}: No space left" in str(error.value)


def test_written_whole_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot write .*a.txt"):
        with written_whole(tmp_path / "no" / "a.txt") as temporary:
            temporary.write_text("new")


@pytest.mark.parametrize("enabled", [True, False])
def test_training_is_strict_about_determinism(enabled: bool) -> None:
    seen = []

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        seen.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return model(batch["x"]).sum()

    torch.use_deterministic_algorithms(enabled, warn_only=enabled)
    try:
        backward(nn.Linear(2, 2), dict(x=torch.ones(1, 2)), loss_fn, 1.0)
        assert seen == [enabled, False]
        assert torch.are_deterministic_algorithms_enabled() == enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() == enabled
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(SystemExit, match=f"cannot make the folder {folder}"):
            make_folder(folder)


@pytest.mark.parametrize("epochs", [0.0, -1.0, math.nan, math.inf])
def test_epochs_out_of_range(epochs: float) -> None:
    with pytest.raises(SystemExit, match="^epochs=.* must be above 0"):
        check_recipe(SimpleNamespace(epochs=epochs))


def test_no_compiler_is_said_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    require_compiler(torch.device("mps"))
    with pytest.raises(SystemExit, match="needs a C\\+\\+ compiler.*--compile=False"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("PATH", "")
    require_compiler(torch.device("cuda"))
    monkeypatch.delenv("CC")
    with pytest.raises(SystemExit, match="needs a C compiler.*--compile=False"):
        require_compiler(torch.device("cuda"))
