"""dpo.py: its losses worked by hand, its sums whatever the split, and whole runs, killed and resumed."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

import dpo
from checkpoints import list_checkpoints, load_checkpoint, load_model, save_checkpoint
from data import get_tokenizer
from dpo import Config, Pair, Tokens, compare, log_probs, loss_at_zero, main, micro_batches, preference_loss
from finetune import Example, Run
from model import GPT, GPTConfig
from training import Dist, autocast, parse

SCRIPT = Path(dpo.__file__)
CPU = torch.device("cpu")
ALONE = Dist(0, 1, CPU)
BYTES = get_tokenizer("bytes")
EOT = 256
LOSSES = ("sigmoid", "robust", "hinge", "ipo")


def tiny(seed: int = 0, scale: float = 0.3) -> GPT:
    """A model of 8,304 parameters for bytes, random and far from uniform."""
    raw = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=48, n_tokens=257, vocab_size=264))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in raw.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return raw


# -----------------------------------------------------------------------------
# Losses

H = math.log(3)  # sigmoid(H) = 3/4 and sigmoid(-H) = 1/4: losses can be worked by hand


@pytest.mark.parametrize(
    "loss, settings, expected",
    [
        ("sigmoid", dict(), math.log(4 / 3)),
        ("sigmoid", dict(label_smoothing=0.25), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("robust", dict(), math.log(4 / 3)),
        ("robust", dict(label_smoothing=0.25), 1.5 * math.log(4 / 3) - 0.5 * math.log(4)),
        ("hinge", dict(), 0.0),  # beta h = 1.0986 is beyond the margin
        ("hinge", dict(beta=0.25), 1 - H / 2),
        ("ipo", dict(), (1.5 * H / 3 - (-0.5 * H) / 2 - 1) ** 2),  # 3 tokens and 2; 1 / (2 beta) = 1
    ],
    ids=str,
)
def test_losses_worked_by_hand(loss: Any, settings: dict, expected: float) -> None:
    settings = dict(beta=0.5, label_smoothing=0.0) | settings
    c, r = torch.tensor([1.5 * H, 0.0]), torch.tensor([-0.5 * H, 0.0])  # h = 2 ln 3, and 0
    got = preference_loss(c, r, torch.tensor([[3, 1], [2, 1]]), loss=loss, **settings).tolist()
    assert got == pytest.approx([expected, loss_at_zero(loss, settings["beta"])], abs=1e-6)


def test_loss_at_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    lengths = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = dict(sigmoid=math.log(2), robust=math.log(2), hinge=1.0)
    for beta in (0.01, 0.1, 2.0):
        expected["ipo"] = 1 / (4 * beta**2)
        for loss in LOSSES:
            for eps in (0.0, 0.3):
                got = preference_loss(zero, zero, lengths, loss=loss, beta=beta, label_smoothing=eps)
                assert got.tolist() == pytest.approx([expected[loss]] * 3, rel=1e-12)
                assert loss_at_zero(loss, beta) == pytest.approx(expected[loss], rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_equal_numpy_in_float64(loss: Any) -> None:
    rng = np.random.default_rng(0)
    c, r = 20 * rng.standard_normal((2, 1000))
    n = rng.integers(1, 50, (2, 1000))
    for beta in (0.05, 0.5, 3.0):
        for eps in (0.0, 0.1, 0.4):
            right, wrong = np.logaddexp(0, -beta * (c - r)), np.logaddexp(0, beta * (c - r))
            expected = dict(
                sigmoid=(1 - eps) * right + eps * wrong,
                robust=((1 - eps) * right - eps * wrong) / (1 - 2 * eps),
                hinge=np.maximum(0, 1 - beta * (c - r)),
                ipo=(c / n[0] - r / n[1] - 0.5 / beta) ** 2,
            )[loss]
            tensors = [torch.from_numpy(x) for x in (c, r, n)]
            got = preference_loss(*tensors, loss=loss, beta=beta, label_smoothing=eps)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_robust_is_unbiased_under_flipped_preferences() -> None:
    """What its authors ask of it: averaged over flips with probability eps it is the loss without flips."""
    c, r, n = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 5.0]), torch.ones(2, 2)
    robust = dict(loss="robust", beta=0.7, label_smoothing=0.2)
    mean = 0.8 * preference_loss(c, r, n, **robust) + 0.2 * preference_loss(r, c, n, **robust)
    clean = preference_loss(c, r, n, loss="sigmoid", beta=0.7, label_smoothing=0.0)
    torch.testing.assert_close(mean, clean)


@pytest.mark.parametrize("loss", LOSSES)
def test_huge_log_ratios_do_not_overflow(loss: Any) -> None:
    c = torch.tensor([1e4, -1e4, 1e6, -1e6, 0.0], requires_grad=True)
    r = torch.tensor([-1e4, 1e4, -1e6, 1e6, 0.0], requires_grad=True)
    got = preference_loss(c, r, torch.ones(2, 5), loss=loss, beta=1.0, label_smoothing=0.0)
    got.sum().backward()
    for tensor in (got, c.grad, r.grad):
        assert torch.isfinite(tensor).all()
    if loss != "ipo":  # right pairs teach no more, wrong ones as much as a slope of beta allows
        assert c.grad[:4].tolist() == [0, -1, 0, -1] and r.grad[:4].tolist() == [0, 1, 0, 1]


# -----------------------------------------------------------------------------
# Log-probabilities and sums


def some_pairs(n: int, seed: int = 0) -> list[Pair]:
    """Pairs of random letters, of very different lengths."""
    rng = random.Random(seed)

    def words(longest: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, longest)))

    return [Pair(words(8), words(20), words(20) + "!") for _ in range(n)]


def with_reference(tokens: list[Tokens]) -> list[Tokens]:
    """The pairs with log-probabilities of some reference: they differ, so that a mix-up shows."""
    return [Tokens(*pair[:2], (-40.0 - i, -30.0 - 2 * i)) for i, pair in enumerate(tokens)]


def one_by_one(raw: GPT, prompt: str, response: str) -> tuple[float, int]:
    """The response's log-probability with its end-of-text, and how many tokens that is."""
    before = list(f"{prompt}\nResponse:\n".encode())
    targets = [*response.encode(), EOT]
    with torch.no_grad():
        logits = raw(torch.tensor([before + targets]))[0][0].double().numpy()
    value = 0.0
    for i, token in enumerate(targets):
        row = logits[len(before) + i - 1]  # what stands before a token predicts it
        value += row[token] - np.logaddexp.reduce(row)
    return value, len(targets)


def test_log_probs_are_sums_over_response_and_end_of_text() -> None:
    raw, pairs = tiny().double(), some_pairs(7)
    tokens = dpo.prepare(pairs, 48, BYTES, "pairs", print)
    assert len(tokens) == 7
    for pair, token in zip(pairs, tokens):
        (batch,) = micro_batches([token], 1, ALONE)
        with torch.no_grad():
            alone = [x.item() for x in log_probs(raw, batch)]
        expected = [one_by_one(raw, pair.prompt, text)[0] for text in pair[1:]]
        assert alone == pytest.approx(expected, abs=1e-9)

    # together in one forward, padded, the longest first
    (batch,) = micro_batches(tokens, 99, ALONE)
    longest = sorted(range(7), key=lambda i: -max(len(e.ids) for e in tokens[i][:2]))
    with torch.no_grad():
        got = torch.stack(log_probs(raw, batch), dim=1).numpy()
    for row, i in zip(got, longest):
        assert row == pytest.approx([one_by_one(raw, pairs[i].prompt, t)[0] for t in pairs[i][1:]], abs=1e-9)

    reference = dpo.reference_log_probs(raw, tokens, torch.autocast("cpu", enabled=False), 3, ALONE)
    expected = [[one_by_one(raw, pair.prompt, text)[0] for text in pair[1:]] for pair in pairs]
    np.testing.assert_allclose(reference, expected, atol=1e-4)  # in the pairs' own order, as float32


@pytest.mark.parametrize("loss", LOSSES)
def test_compare_by_hand(loss: Any) -> None:
    """Loss with the RPO term and all metrics of a batch, from log-probabilities summed one by one."""
    raw, pairs = tiny().double(), some_pairs(5)
    tokens = with_reference(dpo.prepare(pairs, 48, BYTES, "pairs", print))
    cfg = Config(loss=loss, beta=0.3, rpo_alpha=0.7)
    total, metrics = 0.0, np.zeros(7)
    for pair, token in zip(pairs, tokens):
        (lw, nw), (lr, nr) = (one_by_one(raw, pair.prompt, text) for text in pair[1:])
        c, r = lw - token.reference[0], lr - token.reference[1]
        sigmoid = math.log1p(math.exp(-0.3 * (c - r)))
        ipo = (c / nw - r / nr - 1 / 0.6) ** 2
        value = dict(sigmoid=sigmoid, robust=sigmoid, hinge=max(0.0, 1 - 0.3 * (c - r)), ipo=ipo)[loss]
        total += value - 0.7 * lw / nw
        metrics += [value, 0.3 * c, 0.3 * r, 0.3 * (c - r), c > r, lw, lr]
    (batch,) = micro_batches(tokens, 99, ALONE)
    got, sums = compare(raw, batch, cfg)
    assert got.item() == pytest.approx(total, rel=1e-9)
    assert sums.tolist() == pytest.approx(metrics.tolist(), rel=1e-9)
    assert len(dpo.METRICS) == 7 and batch["n"] == 5


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_no_split_changes_loss_or_gradient(loss: Any) -> None:
    """Micro-batches and ranks, also more ranks than pairs, and a number of pairs that they do not divide."""
    tokens = with_reference(dpo.prepare(some_pairs(5), 48, BYTES, "pairs", print))
    cfg = Config(loss=loss, beta=0.2, rpo_alpha=0.5)

    def sums(world_size: int, B: int) -> tuple[float, Tensor, Tensor, int]:
        raw = tiny().double()
        parts = [micro_batches(tokens, B, Dist(rank, world_size, CPU)) for rank in range(world_size)]
        shapes = {tuple(len(batch["present"]) for batch in part) for part in parts}
        assert len(shapes) == 1  # ranks wait for each other after every micro-batch
        total, metrics = 0.0, torch.zeros(7)
        for batch in (batch for part in parts for batch in part):
            value, values = compare(raw, batch, cfg)
            value.backward()
            total, metrics = total + value.item(), metrics + values
        n = sum(batch["n"] for part in parts for batch in part)
        return total, metrics, torch.cat([p.grad.flatten() for p in raw.parameters()]), n

    total, metrics, gradient, n = sums(1, 5)
    assert n == 5 and gradient.abs().max() > 1e-2
    for world_size, B in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 8), (3, 2), (4, 1), (8, 3)):
        other = sums(world_size, B)
        assert other[0] == pytest.approx(total, rel=1e-6) and other[3] == 5
        torch.testing.assert_close(other[1], metrics, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other[2], gradient, rtol=1e-6, atol=1e-6)


# -----------------------------------------------------------------------------
# Pairs


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(prompt: str, a: str | None, b: str | None, preferred: str | None = "A") -> dict:
    return dict(prompt=prompt, response_a=a, response_b=b, explanation="because", preferred=preferred)


def test_preferred_says_which_is_chosen_and_the_unusable_is_counted(tmp_path: Path) -> None:
    rows = [
        row(" one ", "yes", "no", "A"),
        row("two", "yes", "no", "B"),
        row("three", "", "no"),
        row("four", "yes", " \n"),
        row("five", None, "no"),
        row("six", "same", "same"),
        row("seven", "yes", "no", "C"),
        row("eight", "yes", "no", None),
    ]
    said: list[str] = []
    got = dpo.read_pairs(str(write_rows(tmp_path / "x.jsonl", rows)), ALONE, said.append)
    assert got == [Pair("one", "yes", "no"), Pair("two", "no", "yes")]
    (message,) = said
    assert "6 of 8 pairs dropped" in message
    assert "3 with a blank response, 1 with equal ones, 2 preferring neither A nor B" in message

    rows = [dict(prompt="one", chosen="yes", rejected="no"), dict(prompt="two", chosen="x", rejected="x")]
    got = dpo.read_pairs(str(write_rows(tmp_path / "y.jsonl", rows)), ALONE, said.append)
    assert got == [Pair("one", "yes", "no")] and "1 of 2 pairs dropped" in said[1]


def test_pairs_that_do_not_fit() -> None:
    """The template takes 11 bytes; T inputs make T + 1 ids."""
    said: list[str] = []
    pairs = [
        Pair("abc", "12345", "12"),  # 14 + 5 + 1 = 20 ids: the longest that fits into T=19
        Pair("abc", "123456", "12"),  # loses its end-of-text
        Pair("abc", "1234567", "12345678"),  # different, but not in the 6 bytes that are left
        Pair("abc", "x234567", "12345678"),  # both cut, and still different
        Pair("a" * 9, "1", "2"),  # the prompt leaves no room: 20 ids
    ]
    tokens = dpo.prepare(pairs, 19, BYTES, "pairs", said.append)
    chosen = ["".join(map(chr, t.chosen.ids[t.chosen.n_prompt :])) for t in tokens]
    assert chosen == ["12345\u0100", "123456", "x23456"]
    assert bytes(tokens[0].rejected.ids[:-1].tolist()) == b"abc\nResponse:\n12"
    assert "2 pairs dropped: nothing to compare within T=19" in said[0]
    assert "2 pairs with a response cut" in said[1]
    with pytest.raises(SystemExit, match="no pair of pairs is left"):
        dpo.prepare(pairs[-1:], 19, BYTES, "pairs", said.append)


# -----------------------------------------------------------------------------
# Whole runs, on a toy rule: yes is better than no


def toy_rows(n: int = 26) -> list[dict]:
    """Prompts of one letter; the better answer stands on either side."""
    letters = [chr(ord("a") + i) for i in range(n)]
    return [
        row(f"{x}?", "yes", "no", "A") if i % 2 else row(f"{x}?", "no", "yes", "B")
        for i, x in enumerate(letters)
    ]


def write_start(folder: Path, raw: GPT, stage: str = "sft") -> Path:
    """A checkpoint as sft.py writes it."""
    state = dict(stage=stage, step=3, model=raw.state_dict(), model_config=asdict(raw.config))
    state |= dict(config={}, tokenizer="bytes", base="", scores={}, optimizers=[])
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, state, keep=1)
    return folder


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[Config]:
    """A configuration that trains in a second. Signal handlers are put back afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield Config(
        checkpoint=str(write_start(tmp_path / "sft", tiny(scale=0.1))),
        data=str(write_rows(tmp_path / "pairs.jsonl", toy_rows())),
        val_frac=0.2,
        out_dir=str(tmp_path / "out"),
        B=4,
        pairs_per_step=8,
        max_steps=12,
        max_lr=1e-3,
        eval_every=5,
        answer_rows=3,
        prompts=("a?",),
        answer_tokens=5,
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


def test_the_step_can_be_compiled(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the compiler's door: its own work is its makers' to test."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda raw, **options: asked.append(options) or raw)
    monkeypatch.setattr("finetune.require_compiler", lambda device: None)
    train(cfg, compile=True, max_steps=1)
    assert asked == [dict(dynamic=True)]


def read_log(folder: Path) -> dict[tuple[int, str], str]:
    """The last value of every (step, name), as it is written."""
    values = {}
    for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines():
        if m := re.fullmatch(r"(\d+) ([\w/]+) (\S+)", line):
            values[int(m[1]), m[2]] = m[3]
    return values


def column(folder: Path, name: str) -> dict[int, float]:
    """Step -> value of one name."""
    return {step: float(value) for (step, key), value in read_log(folder).items() if key == name}


def notes(folder: Path) -> str:
    """What the log says behind `#`."""
    lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def bits(value: Any) -> Any:
    """A nested value with its tensors as bytes."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return (value.dtype, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def final_bits(folder: Path) -> Any:
    """What a folder's newest checkpoint holds, as bytes, but for the configuration."""
    state = load_checkpoint(list_checkpoints(folder)[0])
    return bits({key: value for key, value in state.items() if key != "config"})


def same_run(folder: Path, other: Path) -> None:
    """Check that two runs have the same log, to the last digit, and the same last checkpoint."""
    got, expected = read_log(folder), read_log(other)
    assert {key: (got.get(key), value) for key, value in expected.items() if got.get(key) != value} == {}
    assert got.keys() == expected.keys()
    assert final_bits(folder) == final_bits(other)


@pytest.mark.parametrize("changed", [*(dict(loss=loss) for loss in LOSSES), dict(lora_rank=2)], ids=str)
def test_a_run_starts_at_the_loss_of_no_difference(cfg: Config, changed: dict) -> None:
    folder = train(cfg, max_steps=1, answer_rows=0, prompts=(), **changed)
    at_zero = dict(sigmoid=math.log(2), robust=math.log(2), hinge=1.0, ipo=25.0)[
        changed.get("loss", "sigmoid")
    ]
    log = {name: float(value) for (step, name), value in read_log(folder).items() if step == 0}
    assert log["preference"] == log["train"] == pytest.approx(at_zero, rel=1e-6)
    assert log["val"] == log["val/preference"] == pytest.approx(at_zero, rel=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert log[name] == log[f"val/{name}"] == pytest.approx(0, abs=1e-6)
    assert log["norm"] > 0


def test_bf16_starts_near_it(cfg: Config) -> None:
    folder = train(cfg, max_steps=1, answer_rows=0, prompts=(), precision="bf16")
    assert column(folder, "preference")[0] == pytest.approx(math.log(2), rel=0.02)


def test_the_rule_is_learned(cfg: Config, tmp_path: Path) -> None:
    """From rows with the better answer on either side: mixing up A and B would pull both ways."""
    asked = [dict(instruction="a?", response="yes"), dict(instruction="1?", response="never")]
    questions = str(write_rows(tmp_path / "questions.jsonl", asked))
    folder = train(cfg, max_steps=60, max_lr=3e-2, rpo_alpha=1.0, questions=questions)
    for prefix in ("", "val/"):
        last = max(column(folder, f"{prefix}rewards/chosen"))
        value = {name: column(folder, prefix + name)[last] for name in dpo.METRICS}
        assert value["rewards/chosen"] > 0.5 and value["rewards/rejected"] < -0.2
        assert value["rewards/accuracies"] == 1
        assert value["rewards/margins"] == pytest.approx(value["rewards/chosen"] - value["rewards/rejected"])
        assert value["preference"] < 0.5
    first, last = column(folder, "val/logps/chosen")[0], column(folder, "val/logps/chosen")[60]
    # a reward is beta times the log-ratio
    assert 0.1 * (last - first) == pytest.approx(column(folder, "val/rewards/chosen")[60], abs=1e-4)
    assert column(folder, "right")[0] == 0 and column(folder, "right")[60] == 0.5
    assert column(folder, "chosen")[0] == 0 and column(folder, "chosen")[60] == 1  # exactly so, and ended
    assert "#   > a? -> yes\n" in notes(folder) + "\n"


def test_hinge_robust_and_ipo_learn_too(cfg: Config) -> None:
    for loss in ("hinge", "robust", "ipo"):
        folder = train(
            cfg,
            loss=loss,
            max_steps=15,
            max_lr=3e-3,
            label_smoothing=0.1 * (loss == "robust"),
            answer_rows=0,
            out_dir=f"{cfg.out_dir}{loss}",
        )
        assert column(folder, "val/rewards/accuracies")[15] == 1
        assert column(folder, "val/rewards/chosen")[15] > 0 > column(folder, "val/rewards/rejected")[15]


def test_what_a_run_leaves_behind(cfg: Config) -> None:
    folder = train(cfg)
    (reference,) = folder.glob("reference_*.npz")
    names = {"best.pt", "ckpt_000008.pt", "ckpt_000012.pt", "log.txt", reference.name}
    assert {path.name for path in folder.iterdir()} <= names | {"ckpt_000010.pt"}
    assert (folder / "best.pt").is_file() and (folder / "ckpt_000012.pt").is_file()
    assert column(folder, "val").keys() == {0, 5, 10, 12} and column(folder, "lr").keys() == set(range(12))
    best, last = load_checkpoint(folder / "best.pt"), load_checkpoint(folder / "ckpt_000012.pt")
    assert best["step"] == min(column(folder, "val"), key=column(folder, "val").get)
    assert "optimizers" not in best and (last["stage"], last["step"]) == ("dpo", 12)
    assert last["scores"]["val/loss"] == pytest.approx(column(folder, "val")[12])
    load_model(str(folder), "", lambda text: None)  # what sample.py does

    before = final_bits(folder)  # a finished run only measures once more
    train(cfg)
    assert final_bits(folder) == before and column(folder, "train").keys() == set(range(12))


def test_the_micro_batch_does_not_change_the_curve(cfg: Config) -> None:
    reference = train(cfg, answer_rows=0)
    for B in (1, 3, 8):
        folder = train(cfg, B=B, answer_rows=0, out_dir=f"{cfg.out_dir}{B}")
        for name in ("train", "val"):
            assert column(folder, name) == pytest.approx(column(reference, name), abs=1e-5)


def test_a_run_leaves_no_trace_in_its_start(cfg: Config) -> None:
    before = {path.name: path.read_bytes() for path in Path(cfg.checkpoint).iterdir()}
    train(cfg)
    assert {path.name: path.read_bytes() for path in Path(cfg.checkpoint).iterdir()} == before


def test_the_best_is_kept_when_it_gets_worse(cfg: Config, tmp_path: Path) -> None:
    """What is held out prefers the other answer: every step makes it worse."""
    rows = toy_rows()
    for i in dpo.split_rows([row["prompt"] for row in rows], cfg.val_frac, cfg.seed)[1]:
        rows[i]["preferred"] = "AB"[rows[i]["preferred"] == "A"]
    folder = train(cfg, data=str(write_rows(tmp_path / "against.jsonl", rows)))
    val = column(folder, "val")
    assert val[0] < val[5] < val[10] < val[12]
    assert load_checkpoint(folder / "best.pt")["step"] == 5  # of those after the start
    assert (folder / "ckpt_000012.pt").is_file()


def test_patience(cfg: Config) -> None:
    """At a learning rate of nothing no margin is larger than the first: the third evaluation after it ends
    the run, whether or not it was resumed on the way."""
    still = dict(max_lr=0.0, eval_every=2, save_every=2, patience=3, keep=9, max_steps=40)
    folder = train(cfg, **still)
    assert column(folder, "val").keys() == {0, 2, 4, 6} and max(column(folder, "train")) == 5
    assert list_checkpoints(folder)[0].name == "ckpt_000006.pt"
    resumed = Path(cfg.out_dir + "2")
    resumed.mkdir()
    shutil.copy(folder / "ckpt_000004.pt", resumed)
    train(cfg, **still, out_dir=str(resumed))
    assert column(resumed, "val").keys() == {4, 6}
    assert final_bits(resumed) == final_bits(folder)
    train(cfg, **still)  # it had enough, and still has
    assert max(column(folder, "train")) == 5

    learning = train(cfg, eval_every=2, patience=1, out_dir=cfg.out_dir + "3")
    assert max(column(learning, "val")) == 12  # margins grow: never enough


@pytest.mark.parametrize("lora", [dict(), dict(lora_rank=2)], ids=str)
def test_stopped_and_resumed_equals_never_stopped(
    cfg: Config, lora: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(cfg, max_lr=1e-2, **lora)
    stopped = Path(cfg.out_dir + "2")
    for steps in (4, 1):  # in a step that is not saved anyhow, and in one that is measured next
        asked = iter([False] * (steps - 1) + [True])
        with monkeypatch.context() as patch:
            patch.setattr(dpo, "stop_on_signals", lambda asked=asked: lambda: next(asked))
            train(cfg, max_lr=1e-2, out_dir=str(stopped), **lora)
    assert re.findall(r"stopped at step (\d+)", notes(stopped)) == ["4", "5"]
    assert column(stopped, "train").keys() == set(range(5))
    train(cfg, max_lr=1e-2, out_dir=str(stopped), **lora)
    same_run(stopped, whole)


# -----------------------------------------------------------------------------
# The reference's log-probabilities


def test_the_reference_is_computed_once(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("computed again")

    folder = train(cfg)
    first = read_log(folder)
    for path in folder.glob("*.pt"):
        path.unlink()
    (folder / "log.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "reference_log_probs", never)
        train(cfg)
        assert read_log(folder) == first and "computing the reference" not in notes(folder)
        with pytest.raises(AssertionError, match="computed again"):  # other sequences have others
            train(cfg, T=15)


def test_another_start_has_another_reference(cfg: Config, tmp_path: Path) -> None:
    folder = train(cfg, max_steps=1)
    for path in folder.glob("*.pt"):
        path.unlink()
    train(cfg, max_steps=1, checkpoint=str(write_start(tmp_path / "other", tiny(seed=1))))
    assert len(list(folder.glob("reference_*.npz"))) == 2
    assert column(folder, "preference")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_other_tokens_or_another_precision_have_another_reference(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the same ids stand behind one another, only divided otherwise."""
    computed = []
    monkeypatch.setattr(dpo, "reference_log_probs", lambda *args: computed.append(1) or np.zeros((1, 2)))
    Path(cfg.out_dir).mkdir()
    ids = np.arange(5)
    pairs = [
        Tokens(Example(ids[:cut], n_prompt), Example(ids[cut:], 1))
        for cut, n_prompt in ((3, 1), (3, 2), (2, 1))
    ]
    amps = [
        autocast("fp32", CPU),
        *(torch.autocast("cpu", dtype) for dtype in (torch.bfloat16, torch.float16)),
    ]
    for amp in amps * 2:
        run = Run(tiny(), tiny(), BYTES, [], None, "base", amp, False)
        for pair in pairs:
            dpo.add_reference(run, [[pair]], cfg, ALONE, print)
    assert len(computed) == 9


def test_a_wrong_reference_is_noticed(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(cfg, max_steps=1)
    (path,) = folder.glob("reference_*.npz")
    with np.load(path) as archive:
        found = archive["log_probs"]
    found[:, 0] += 1
    np.savez(path, log_probs=found)
    for checkpoint in folder.glob("*.pt"):
        checkpoint.unlink()
    with pytest.raises(AssertionError, match="the policy does not start as the reference"):
        train(cfg, max_steps=1)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit of the first number."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\n") + 1 + 3] ^= 1  # the numbers stand behind a header of one line
    path.write_bytes(data)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def infinite(path: Path) -> None:
    with np.load(path) as archive:
        found = archive["log_probs"]
    found[0, 0] = np.inf
    np.savez(path, log_probs=found)


def too_few(path: Path) -> None:
    with np.load(path) as archive:
        found = archive["log_probs"]
    np.savez(path, log_probs=found[1:])


@pytest.mark.parametrize("damage", [cut, flip, nothing, infinite, too_few])
def test_a_damaged_reference_is_computed_again_from_the_start(cfg: Config, damage: Callable) -> None:
    """On a resumed run too, where the policy has long moved away from it."""
    folder = train(cfg, max_lr=1e-2, keep=9, answer_rows=0)
    (path,) = folder.glob("reference_*.npz")
    kept = path.read_bytes()
    resumed = Path(cfg.out_dir + "2")
    resumed.mkdir()
    shutil.copy(folder / "ckpt_000008.pt", resumed)
    shutil.copy(path, resumed)
    damage(resumed / path.name)
    assert (resumed / path.name).read_bytes() != kept
    train(cfg, max_lr=1e-2, keep=9, answer_rows=0, out_dir=str(resumed))
    assert "computing the reference" in notes(resumed)
    assert (resumed / path.name).read_bytes() == kept
    log = read_log(resumed)
    assert min(step for step, name in log if name == "train") == 8
    assert log == {key: value for key, value in read_log(folder).items() if key in log}
    assert final_bits(resumed) == final_bits(folder)


# -----------------------------------------------------------------------------
# Killed, and on two processes. Starting Python and torch takes seconds: runs are forked from one process that
# has only imported them.

NURSERY = """
import json, os, sys
import torch._dynamo
import dpo
from training import barrier, parse

for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = order["argv"]
        os.environ.update(order["env"])
        # straight out behind the last barrier: a store's server thread may never join in a forked process
        dpo.cleanup = lambda dist: (barrier(dist), os._exit(0))
        dpo.main(parse(dpo.CONFIGS, dpo.__doc__))
        os._exit(0)
    print(pid, flush=True)
"""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs")


class Nursery:
    """Starts runs of dpo.py."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def ask(self, order: Any) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, cfg: Config, **env: str) -> int:
        """The process id of a run."""
        constants = {key: value for key, value in asdict(cfg).items() if value != getattr(Config(), key)}
        prompts = constants.pop("prompts")
        argv = [f"--{key}={value}" for key, value in constants.items()] + ["--prompts", *prompts]
        return self.ask(dict(argv=[str(SCRIPT), *argv], env=env))

    def wait(self, pid: int) -> int:
        """The exit status of a run, when it has ended."""
        return self.ask(pid)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(SCRIPT.parent))
    with subprocess.Popen([sys.executable, "-c", NURSERY], env=env, **pipes) as process:
        yield Nursery(process)
        process.stdin.close()


def n_losses(folder: Path) -> int:
    """How many training losses a log holds, those of steps done twice counted twice."""
    path = folder / "log.txt"
    return path.read_bytes().count(b" train ") if path.exists() else 0


@forks
@pytest.mark.parametrize("lora", [dict(), dict(lora_rank=2, lora_merge=False)], ids=str)
def test_killed_and_resumed_equals_never_killed(cfg: Config, nursery: Nursery, lora: dict) -> None:
    cfg = replace(cfg, max_steps=60, eval_every=9, save_every=5, max_lr=5e-3, rpo_alpha=0.5, **lora)
    whole = train(cfg)
    killed = replace(cfg, out_dir=cfg.out_dir + "-killed")
    folder, rng = Path(killed.out_dir), random.Random(len(lora))
    for n in rng.sample([0, 2, 7, 13], 3):
        pid = nursery.start(killed)
        wanted, give_up = n_losses(folder) + n, time.monotonic() + 60
        while n_losses(folder) < wanted:
            assert time.monotonic() < give_up, f"{n_losses(folder)} of {wanted} losses after a minute"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait(pid) == -signal.SIGKILL  # it did not end by itself
    assert nursery.wait(nursery.start(killed)) == 0
    assert "continuing" in notes(folder)
    same_run(folder, whole)
    assert (folder / "best.pt").is_file() and not list(folder.glob("*.tmp"))


@forks
def test_two_processes_equal_one(cfg: Config, nursery: Nursery) -> None:
    """With an odd number of pairs a step, so that one process runs out of them."""
    cfg = replace(cfg, pairs_per_step=5, B=2, max_steps=8, rpo_alpha=0.5, max_lr=3e-3)
    one = train(cfg)
    two = replace(cfg, out_dir=cfg.out_dir + "-two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    pids = [nursery.start(two, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(2)]
    assert [nursery.wait(pid) for pid in pids] == [0, 0]
    folder = Path(two.out_dir)
    assert "devices=2" in notes(folder)
    for name in ("train", "val", "norm", "chosen", *dpo.METRICS, *(f"val/{name}" for name in dpo.METRICS)):
        # float32 sums in another order; log-probabilities are of the order of ten
        assert column(folder, name) == pytest.approx(column(one, name), rel=1e-5, abs=1e-5), name
    assert column(folder, "train").keys() == set(range(8))
    (mine,), (other,) = (path.glob("reference_*.npz") for path in (folder, one))
    assert mine.name == other.name
    np.testing.assert_allclose(np.load(mine)["log_probs"], np.load(other)["log_probs"], atol=1e-4)


# -----------------------------------------------------------------------------
# Mistakes


def refused(cfg: Config, message: str, **changed: Any) -> None:
    """Check that training ends with a message of one line."""
    with pytest.raises(SystemExit, match=message) as error:
        train(cfg, **changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(beta=0.0), "beta=0.0 must be above 0"),
        (dict(beta=-1.0), "beta=-1.0"),
        (dict(beta=math.nan), "beta=nan"),
        (dict(label_smoothing=-0.1), "label_smoothing=-0.1"),
        (dict(label_smoothing=0.5), "label_smoothing=0.5 must be .* below 0.5"),
        (
            dict(label_smoothing=0.1, loss="hinge"),
            "label_smoothing is for --loss=sigmoid and robust, not hinge",
        ),
        (dict(label_smoothing=0.1, loss="ipo"), "not ipo"),
        (dict(T=49), "T=49 .*block_size=48"),
        (dict(T=0), "T=0 must be at least 1"),
        (dict(T=-1), "T=-1"),
        (dict(T=5), "no pair of .* is left"),
        (dict(B=0), "B=0 must be at least 1"),
        (dict(pairs_per_step=0), "pairs_per_step=0"),
        (dict(max_steps=0), "max_steps=0 must be at least 1"),
        (dict(answer_rows=-1), "answer_rows=-1 must be at least 0"),
        (dict(patience=-1), "patience=-1"),
        (dict(data="nowhere.jsonl"), "no file nowhere.jsonl"),
        (dict(checkpoint="nowhere"), "nowhere"),
    ],
    ids=str,
)
def test_constants_out_of_range(cfg: Config, changed: dict, message: str) -> None:
    refused(cfg, message, **changed)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([dict(question="q", answer="a")], r"fields question, answer: expected prompt, response_a, .*chosen"),
        ([], r"fields \(none\): expected prompt"),
        ([row("a", "yes", "no"), dict(prompt="b")], "row 2: no field 'response_a'"),
        (
            [row("a", "yes", "no"), dict(prompt="b", response_a=3, response_b="no", preferred="A")],
            "row 2: .* int",
        ),
        ([row("a", "yes", "yes"), row("b", "", "no"), row("c", "yes", "no", "?")], "leaves 0 pairs"),
        ([row("a", "yes", "no"), row("a", "yes", "never")], "leaves 2 pairs: at least two prompts"),
    ],
    ids=["unknown fields", "no rows", "missing", "not text", "all dropped", "one prompt"],
)
def test_rows_that_cannot_be_used(cfg: Config, rows: list[dict], message: str, tmp_path: Path) -> None:
    refused(cfg, message, data=str(write_rows(tmp_path / "bad.jsonl", rows)))


def test_a_dataset_that_cannot_be_reached(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **settings: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = "cannot get some/pairs from the Hugging Face hub .no route to the hub.: .*local .json"
    refused(cfg, message, data="some/pairs")


def test_a_dataset_on_the_hub(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **settings: Any) -> datasets.Dataset:
        asked.append((args, settings))
        return datasets.Dataset.from_list(toy_rows())

    monkeypatch.setattr(datasets, "load_dataset", load)
    folder = train(cfg, data=Config().data, max_steps=1)
    assert asked == [(("andersonbcdefg/red_teaming_reward_modeling_pairwise",), dict(split="train"))]
    assert "21 pairs to learn from, 5 held out" in notes(folder)


def test_starts_that_do_not_fit(cfg: Config, tmp_path: Path) -> None:
    start = write_start(tmp_path / "pretrained", tiny(), stage="pretraining")
    refused(cfg, r"of pretraining: start from one of sft \(sft.py\)", checkpoint=str(start))
    refused(cfg, "holds the checkpoint to start from: choose another --out_dir", out_dir=cfg.checkpoint)
    file = list_checkpoints(Path(cfg.checkpoint))[0]
    refused(cfg, "choose another --out_dir", checkpoint=str(file), out_dir=cfg.checkpoint)
    assert not Path(cfg.out_dir).exists()

    train(cfg, max_steps=1)
    refused(cfg, "holds checkpoints, and --resume=never", resume="never")
    refused(cfg, "has --lora_rank=0", lora_rank=2)
    other = write_start(tmp_path / "other", tiny(seed=1))
    refused(cfg, "started from other weights than .*other has now", checkpoint=str(other))
    shutil.copytree(other, tmp_path / "of-sft")
    refused(cfg, "is not of dpo: choose another", out_dir=str(tmp_path / "of-sft"))


def test_every_configuration_parses() -> None:
    for name, configured in dpo.CONFIGS.items():
        assert parse(dpo.CONFIGS, "doc", [name]) == configured
    changed = parse(
        dpo.CONFIGS, "doc", ["demo", "--beta=0.5", "--loss=ipo", "--T=64", "--compile", "--lora_merge=False"]
    )
    assert (changed.beta, changed.loss, changed.T, changed.compile, changed.lora_merge) == (
        0.5,
        "ipo",
        64,
        True,
        False,
    )
    for args, hint in ((["--bta=1"], "--beta"), (["--loss=kto"], "hinge"), (["demmo"], "demo")):
        with pytest.raises(SystemExit) as refusal:
            parse(dpo.CONFIGS, "doc", args)
        assert refusal.value.code not in (0, None)
        assert not isinstance(refusal.value.code, str) or hint in refusal.value.code
