"""dpo.py: pairs, losses, sums that no split changes, the cached reference, whole runs. See test_finetune.py too."""

import math
import random
from contextlib import nullcontext
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
from harness import ALONE, BYTES, losses, notes, read_log, write_rows
from test_finetune import configure

import dpo
from dpo import Pair
from neogpt import checkpoint, model
from neogpt.chat import Example, Row

EOT = 256
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
METRICS = ("preference", *REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected")
train = partial(harness.train, dpo.main)


def tiny(seed: int = 0, scale: float = 0.3, **shape: Any) -> model.GPT:
    """A model of one layer whose predictions are far from uniform."""
    return harness.tiny_model(seed, scale, **dict(n_layer=1, block_size=48) | shape)


def row(prompt: str, a: str | None, b: str | None, preferred: str | None = "A") -> dict[str, Any]:
    """A row with the fields of red_teaming_reward_modeling_pairwise."""
    return dict(prompt=prompt, response_a=a, response_b=b, explanation="because", preferred=preferred)


def test_preferred_selects_chosen_and_bad_pairs_are_counted(tmp_path: Path, printed: pytest.LogCaptureFixture) -> None:
    """The first row has no preference, but the fields of all rows together decide what the rows are."""
    rows = [dict(prompt="zero", response_a="yes", response_b="no", chosen="yes")]
    rows += [row(" one ", "yes", "no", "A"), row("two", "yes", "no", "B"), row("three", "", "no")]
    rows += [row("four", "yes", " \n"), row("five", None, "no"), row("six", "same", "same")]
    rows += [row("seven", "yes", "no", preferred) for preferred in ("C", None, ["A"])]
    pairs = dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows))
    assert pairs == [(Row("one", "", "yes"), "no"), (Row("two", "", "no"), "yes")]
    message, unused = printed.messages
    assert "explanation (9 rows)" in unused
    for text in ("8 of 10", "3 with a blank response", "1 with equal responses", "4 with a preference"):
        assert text in message


def turns(*texts: str) -> list[dict[str, str]]:
    return [dict(role=role, content=text) for role, text in zip(("user", "assistant") * 2, texts)]


ANSWERS = dict(chosen=turns("Hi", "Ho", "And?", "Yes."), rejected=turns("Hi", "Ho", "And?", "No."))
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:"
CONVERSATIONS = [
    ANSWERS,  # message lists, as in TRL
    ANSWERS | dict(prompt="Hi"),  # as in ultrafeedback_binarized
    dict(prompt=turns("Hi", "Ho", "And?"), chosen=turns("", "Yes.")[1:], rejected=turns("", "No.")[1:]),
    dict(chosen=f"{TRANSCRIPT} Yes.", rejected=f"{TRANSCRIPT} No."),  # as in hh-rlhf
]


@pytest.mark.parametrize("fields", CONVERSATIONS)
def test_conversations(fields: dict, tmp_path: Path, printed: pytest.LogCaptureFixture) -> None:
    is_text = isinstance(fields["chosen"], str)
    different = fields | dict(rejected="Human: Ho\n\nAssistant: b" if is_text else turns("Ho", "b"))
    found = dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", [fields, different]))
    assert found == [(Row("And?", "", "Yes.", (("Hi", "Ho"),)), "No.")]
    assert "1 of 2 rows dropped: 1 with different prompts" in printed.text


def test_responses_that_repeat_the_prompt(tmp_path: Path, printed: pytest.LogCaptureFixture) -> None:
    rows = [dict(prompt=f"Say {i}", chosen=f"Say {i}\nIt is {i}.", rejected=f"Say {i} No.") for i in range(3)]
    expected = [(Row(f"Say {i}", "", f"It is {i}."), "No.") for i in range(3)]
    assert dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows)) == expected
    only_prompt = dict(prompt="Say", chosen="Say so.", rejected="Say")
    assert dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", [*rows, only_prompt])) == expected
    assert "3 pairs remain" in printed.messages[-1]
    rows[0]["rejected"] = "No."
    found = dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows))
    assert found[1] == (Row("Say 1", "", "Say 1\nIt is 1."), "Say 1 No.")


def test_pairs_are_truncated_to_the_sequence_length(printed: pytest.LogCaptureFixture) -> None:
    """The template takes 11 bytes, and T inputs make T + 1 ids."""
    pairs = [
        ("abc", "12345", "12"),  # 14 + 5 + 1 = 20 ids: the longest that fit into T=19
        ("abc", "123456", "12"),  # without its end-of-text
        ("abc", "1234567", "12345678"),  # equal in the 6 bytes that are left: dropped
        ("abc", "12", "123456"),
        ("abc", "x234567", "12345678"),  # both truncated, and still different
        ("a" * 9, "1", "2"),  # the prompt has 20 ids: dropped
    ]
    pairs = [(Row(prompt, "", chosen), rejected) for prompt, chosen, rejected in pairs]
    tokenized = dpo.tokenize_pairs(pairs, 19, BYTES, "pairs.jsonl")
    chosen = ["".join(map(chr, pair.chosen.ids[pair.chosen.n_prompt :])) for pair in tokenized]
    assert chosen == ["12345\u0100", "123456", "12\u0100", "x23456"]
    assert bytes(tokenized[0].rejected.ids[:-1].tolist()) == b"abc\nResponse:\n12"
    assert [max(e.n_inputs for e in pair[:2]) for pair in tokenized] == [19] * 4
    for message, words in zip(printed.messages, (("2 rows", "dropped"), ("3 rows", "truncated")), strict=True):
        assert [word for word in ("pairs.jsonl", "19 tokens", *words) if word not in message] == []
    with pytest.raises(ValueError, match="pairs.jsonl.*19 tokens"):
        dpo.tokenize_pairs(pairs[-1:], 19, BYTES, "pairs.jsonl")


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_losses_equal_numpy_in_float64(loss: Any) -> None:
    """Also of log-ratios so large that an exponential would overflow."""
    rng = np.random.default_rng(0)
    c, r = np.hstack([[[1e4, -1e4], [-1e4, 1e4]], 20 * rng.standard_normal((2, 1000))])
    n = rng.integers(1, 50, (2, 1002))
    for beta in (0.05, 0.5, 3.0):
        for eps in (0.0, 0.1, 0.4):
            right, wrong = np.logaddexp(0, -beta * (c - r)), np.logaddexp(0, beta * (c - r))
            expected = dict(
                sigmoid=(1 - eps) * right + eps * wrong,
                robust=((1 - eps) * right - eps * wrong) / (1 - 2 * eps),
                hinge=np.maximum(0, 1 - beta * (c - r)),
                ipo=(c / n[0] - r / n[1] - 0.5 / beta) ** 2,
            )[loss]
            chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (c, r))
            cfg = dpo.Config(loss=loss, beta=beta, label_smoothing=eps)
            got = dpo.preference_loss(chosen, rejected, torch.from_numpy(n), cfg)
            np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
            got.sum().backward()
            assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def logp_one_by_one(raw: model.GPT, prompt: str, response: str) -> tuple[float, int]:
    """The log-probability of the response with its end-of-text, and the number of its tokens."""
    before, targets = list(f"{prompt}\nResponse:\n".encode()), [*response.encode(), EOT]
    with torch.no_grad():
        logits = raw(torch.tensor([before + targets]))[0].double().numpy()
    value = 0.0
    for i, token in enumerate(targets):
        at = logits[len(before) + i - 1]  # the position before a token predicts it
        value += at[token] - np.logaddexp.reduce(at)
    return value, len(targets)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_loss_with_rpo_term_and_metrics_worked_one_by_one(loss: Any) -> None:
    def letters(longest: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=rng.randint(1, longest)))

    raw, rng, total, sums, logps = tiny().double(), random.Random(0), 0.0, np.zeros(7), []
    texts = [(Row(letters(8), "", letters(20)), letters(20) + "!") for _ in range(5)]
    pairs = dpo.tokenize_pairs(texts, 48, BYTES, "texts")  # with different references, so that a mix-up is found
    pairs = [pair._replace(reference=(-40.0 - i, -30.0 - 2 * i)) for i, pair in enumerate(pairs)]
    for (row, other), pair in zip(texts, pairs, strict=True):
        chosen, n_chosen = logp_one_by_one(raw, row.instruction, row.response)
        rejected, n_rejected = logp_one_by_one(raw, row.instruction, other)
        c, r = chosen - pair.reference[0], rejected - pair.reference[1]
        ipo = (c / n_chosen - r / n_rejected - 1 / 0.6) ** 2
        value = ipo if loss == "ipo" else math.log1p(math.exp(-0.3 * (c - r)))
        total += value - 0.7 * chosen / n_chosen
        sums += [value, 0.3 * c, 0.3 * r, 0.3 * (c - r), c > r, chosen, rejected]
        logps.append([chosen, rejected])
    (batch,) = dpo.collate_pairs(pairs, 99, ALONE)
    got, metrics = dpo.dpo_loss(raw, batch, dpo.Config(loss=loss, beta=0.3, rpo_alpha=0.7))
    assert got.item() == pytest.approx(total, rel=1e-9)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(dict(zip(METRICS, sums)), rel=1e-9)
    # in the order of the pairs, computed longest first and stored in float32
    np.testing.assert_allclose(dpo.reference_logps(raw, pairs, 3, ALONE), logps, atol=1e-4)


@pytest.fixture
def cfg(tmp_path: Path) -> dpo.Config:
    """Trains in a second, on 26 prompts of one letter; the better response is response_a in every second row."""
    sides = [("no", "yes", "B"), ("yes", "no", "A")] * 13
    rows = [row(f"{letter}?", *side) for letter, side in zip("abcdefghijklmnopqrstuvwxyz", sides)]
    start = str(harness.write_model(tmp_path / "sft", tiny(scale=0.1), "sft"))
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    changed = dict(B=4, max_lr=1e-3, rpo_alpha=0.0, save_every=4, eval_every=5, n_eval_prompts=3, prompts=("a?",))
    return replace(configure("dpo", tmp_path), checkpoint=start, data=path, **changed)


def start_again(folder: Path) -> None:
    """Delete everything of a run but the cached reference."""
    for path in [*folder.glob("*.pt"), folder / "log.txt"]:
        path.unlink()


def test_rule_is_learned(cfg: dpo.Config, tmp_path: Path) -> None:
    """The better response is on either side: a mix-up of A and B would pull both ways."""
    questions = [dict(instruction="a?", response="yes"), dict(instruction="1?", response="never")]
    path = write_rows(tmp_path / "questions.jsonl", questions)
    folder = train(cfg, max_steps=60, max_lr=3e-2, rpo_alpha=1.0, eval_questions=path)
    for prefix, step in (("", 59), ("val/", 60)):
        start, end = ({name: losses(folder, prefix + name)[at] for name in METRICS} for at in (0, step))
        assert start["preference"] == pytest.approx(math.log(2), rel=1e-6)  # of equal models
        assert [start[name] for name in REWARDS] == pytest.approx([0, 0, 0], abs=1e-6)
        assert end["rewards/chosen"] > 0.5 and end["rewards/rejected"] < -0.2
        assert end["rewards/accuracies"] == 1 and end["preference"] < 0.5
    assert losses(folder, "begins")[0] == 0 and losses(folder, "begins")[60] == 0.5
    assert losses(folder, "exact")[0] == 0 and losses(folder, "exact")[60] == 1
    assert "> a? -> yes\n" in notes(folder).replace("\\n", "\n") + "\n"
    (reference,) = folder.glob("reference_*.npz")
    names = {"best.pt", "ckpt_000056.pt", "ckpt_000060.pt", "log.txt", reference.name}
    assert {path.name for path in folder.iterdir()} == names
    ckpt = checkpoint.read_newest(folder)
    # a pair is 13 tokens of prompt twice, "yes" and "no"; end-of-text is a target only: 16 + 15 inputs, without padding
    assert (ckpt.stage, ckpt.n_sequences, ckpt.n_tokens) == ("dpo", 60 * 8, 60 * 8 * 31)


def read_reference(folder: Path) -> np.ndarray:
    (path,) = folder.glob("reference_*.npz")
    with np.load(path) as archive:
        return archive["log_probs"]


def test_reference_is_computed_once(cfg: dpo.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(cfg)
    first = read_log(folder)
    start_again(folder)
    monkeypatch.setattr(dpo, "reference_logps", lambda *args: pytest.fail("computed again"))
    train(cfg)
    assert read_log(folder) == first and "computing the reference" not in notes(folder)
    other = str(harness.write_model(tmp_path / "other", tiny(1, 0.1), "sft"))
    for changed in (dict(T=15), dict(precision="bf16"), dict(checkpoint=other)):  # have another reference
        start_again(folder)
        with pytest.raises(pytest.fail.Exception):
            train(cfg, **changed)


def test_reference_belongs_to_the_boundaries_of_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of both sequences together are the same."""
    computed, ids = Mock(return_value=np.zeros((1, 2))), np.arange(5)
    monkeypatch.setattr(dpo, "reference_logps", computed)
    run = SimpleNamespace(cfg=dpo.Config(), rt=ALONE, base="", out_dir=tmp_path, resumed=None, full_model=lambda: None)
    for n, n_prompt in ((3, 1), (3, 2), (2, 1)) * 2:
        dpo.add_reference(run, [Pair(Example(ids[:n], n_prompt), Example(ids[n:], 1))])
    assert computed.call_count == 3


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_only_rounding_may_differ_from_the_reference(cfg: dpo.Config, precision: Any, tolerance: float) -> None:
    """The tolerance is a log-ratio per token; both responses of a pair have 7 tokens together."""
    fp32 = read_reference(train(cfg, max_steps=1, out_dir=cfg.out_dir + "-fp32"))
    cfg = replace(cfg, max_steps=1, precision=precision)
    exact = read_reference(train(cfg))
    (path,) = Path(cfg.out_dir).glob("reference_*.npz")
    assert (np.abs(exact - fp32).max() > 1e-3) == (precision == "bf16")
    accepted, refused = nullcontext(), pytest.raises(AssertionError, match="log-ratio")
    shift = np.array([7 * tolerance, 0])
    for reference, outcome in ((fp32, accepted), (exact - shift / 2, accepted), (exact + 2 * shift, refused)):
        start_again(Path(cfg.out_dir))
        np.savez(path, log_probs=reference)
        with outcome:
            train(cfg)


def test_damaged_reference_is_computed_again_from_the_start(cfg: dpo.Config) -> None:
    """Also in a resumed run, whose policy is no longer the reference."""
    cfg = replace(cfg, max_lr=1e-2, keep_last=9, n_eval_prompts=0)
    folder = train(cfg)
    (path,) = folder.glob("reference_*.npz")
    good, logps = path.read_bytes(), read_reference(folder)
    for i, damaged in enumerate((None, logps * np.inf, logps[1:])):
        resumed = harness.resume(Path(f"{cfg.out_dir}-{i}"), folder, 8)
        if damaged is None:
            (resumed / path.name).write_bytes(good[: len(good) // 2])
        else:
            np.savez(resumed / path.name, log_probs=damaged)
        train(cfg, out_dir=str(resumed))
        assert "computing the reference" in notes(resumed) and min(losses(resumed)) == 8
        assert (resumed / path.name).read_bytes() == good
        harness.assert_same_run(resumed, folder, from_step=8)
