"""dpo.py: pairs, losses worked by hand, sums that no split changes, the cached reference, and whole runs."""

import math
import random
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import ALONE, ForkServer, losses, notes, read_log, write_rows
from torch import Tensor

import dpo
from dpo import Pair
from neogpt import checkpoint, data, model
from neogpt.chat import Example, Row

BYTES = data.get_tokenizer("bytes")
EOT = 256
LOSSES = ("sigmoid", "robust", "hinge", "ipo")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
METRICS = ("preference", *REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected")
train = partial(harness.train, dpo.main)


def tiny(seed: int = 0, scale: float = 0.3) -> model.GPT:
    """A model of one layer whose predictions are far from uniform."""
    return harness.tiny_model(seed, scale, n_layer=1, block_size=48)


# -----------------------------------------------------------------------------
# Rows


def row(prompt: str, a: str | None, b: str | None, preferred: str | None = "A") -> dict[str, Any]:
    """A row with the fields of red_teaming_reward_modeling_pairwise."""
    return dict(prompt=prompt, response_a=a, response_b=b, explanation="because", preferred=preferred)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """log.messages is what `print0` prints during a test."""
    caplog.set_level("INFO", "neogpt")
    return caplog


def test_preferred_selects_chosen_and_unusable_pairs_are_counted(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    rows = [row(" one ", "yes", "no", "A"), row("two", "yes", "no", "B"), row("three", "", "no")]
    rows += [row("four", "yes", " \n"), row("five", None, "no"), row("six", "same", "same")]
    rows += [row("seven", "yes", "no", preferred) for preferred in ("C", None, ["A"])]
    pairs = dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows))
    assert pairs == [(Row("one", "", "yes"), "no"), (Row("two", "", "no"), "yes")]
    message, unused = log.messages
    assert "explanation (9 rows)" in unused
    for text in ("7 of 9", "3 with a blank response", "1 with equal responses", "3 with a preference"):
        assert text in message


def test_rows_with_chosen_and_rejected(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    texts = [("one", "yes", "no"), ("two", " x", "y "), ("three", "x", "x")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), text)) for text in texts]
    assert dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows)) == [
        (Row(p, "", chosen), rejected) for p, chosen, rejected in texts[:2]
    ]
    assert "1 of 3" in log.messages[0]


UNUSABLE = [([dict(question="q", answer="a")], ["answer, question", "response_a", "chosen"])]
UNUSABLE += [([], ["(none)", "prompt"])]
UNUSABLE += [([row("a", "yes", "yes"), row("b", "", "no"), row("c", "x", "y", "?")], ["no usable row", "1 with equal"])]


@pytest.mark.parametrize("rows, words", UNUSABLE, ids=["unknown fields", "no rows", "all dropped"])
def test_unusable_rows_are_refused(tmp_path: Path, rows: list[dict], words: list[str]) -> None:
    source = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError) as error:
        dpo.read_pairs(source)
    assert [word for word in [source, *words] if word not in str(error.value)] == []


def test_kind_of_rows_is_decided_by_all_rows(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """A first row without a field is an incomplete row, wherever the row stands in the file."""
    incomplete, good = dict(prompt="b", response_a="yes", response_b="no", chosen="yes"), [row("a", "yes", "no")]
    for rows in ([incomplete, *good, row("c", "x", "y")], [*good, incomplete, row("c", "x", "y")]):
        assert len(dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows))) == 2
        assert "1 of 3 rows dropped: 1 with a preference other than A or B" in log.text


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
def test_conversations(fields: dict, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    different = dict(chosen=turns("Hi", "a"), rejected=turns("Ho", "b"), prompt=[])
    other = dict(chosen=turns("Q", "a"), rejected=turns("Q", "b"), prompt=[])
    if isinstance(fields["chosen"], str):
        different = dict(chosen="Human: Hi\n\nAssistant: a", rejected="Human: Ho\n\nAssistant: b")
        other = dict(chosen="Human: Q\n\nAssistant: a", rejected="Human: Q\n\nAssistant: b")
    source = write_rows(tmp_path / "rows.jsonl", [fields, different, other])
    expected = [(Row("And?", "", "Yes.", (("Hi", "Ho"),)), "No."), (Row("Q", "", "a"), "b")]
    assert dpo.read_pairs(source) == expected
    assert "1 of 3 rows dropped: 1 with different prompts" in log.text


def test_responses_that_repeat_the_prompt(tmp_path: Path) -> None:
    rows = [dict(prompt=f"Say {i}", chosen=f"Say {i}\nIt is {i}.", rejected=f"Say {i} No.") for i in range(3)]
    expected = [(Row(f"Say {i}", "", f"It is {i}."), "No.") for i in range(3)]
    assert dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows)) == expected
    rows[0]["rejected"] = "No."
    found = dpo.read_pairs(write_rows(tmp_path / "rows.jsonl", rows))
    assert found[1] == (Row("Say 1", "", "Say 1\nIt is 1."), "Say 1 No.")


# -----------------------------------------------------------------------------
# Tokens and micro-batches


def test_pairs_are_truncated_to_the_sequence_length(log: pytest.LogCaptureFixture) -> None:
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
    for message, words in zip(log.messages, (("2 rows", "dropped"), ("3 rows", "truncated")), strict=True):
        assert [word for word in ("pairs.jsonl", "19 tokens", *words) if word not in message] == []
    with pytest.raises(ValueError, match="pairs.jsonl.*19 tokens"):
        dpo.tokenize_pairs(pairs[-1:], 19, BYTES, "pairs.jsonl")


def test_micro_batches_are_longest_first_and_equally_many_on_every_rank() -> None:
    """Row i of the chosen half, row i of the rejected half and row i of the reference are of the same pair."""
    pairs = [Pair(Example(np.arange(n), 2), Example(np.arange(3, 7), 1), (float(-n), 0.5)) for n in (4, 9, 6, 8, 5)]
    parts = [dpo.collate_pairs(pairs, 2, ALONE._replace(rank=rank, world_size=3)) for rank in range(3)]
    assert [[batch["n"] for batch in part] for part in parts] == [[2], [2], [1]]
    for lengths, (batch,) in zip(([9, 5], [8, 4], [6]), parts):
        n, W = len(lengths), max(lengths) - 1
        assert batch["x"].shape == batch["y"].shape == (4, W)
        assert (batch["y"] >= 0).any(dim=1).tolist() == ([True] * n + [False] * (2 - n)) * 2
        assert batch["reference"].tolist() == [[-length, 0.5] for length in lengths] + [[0.0, 0.0]] * (2 - n)
        for i, length in enumerate(lengths):
            assert torch.equal(batch["y"][i], torch.tensor([-100, *range(2, length), *[-100] * (W + 1 - length)]))
            assert batch["y"][2 + i].tolist() == [4, 5, 6, *[-100] * (W - 3)]
    assert (parts[2][0]["y"][[1, 3]] == -100).all()  # the empty rows of the last rank


# -----------------------------------------------------------------------------
# Losses

LN3 = math.log(3)  # sigmoid(LN3) = 3/4 and sigmoid(-LN3) = 1/4


@pytest.mark.parametrize(
    "loss, changed, expected, at_zero",
    [
        ("sigmoid", dict(), math.log(4 / 3), math.log(2)),
        ("sigmoid", dict(label_smoothing=0.25), 0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2)),
        ("robust", dict(), math.log(4 / 3), math.log(2)),
        ("robust", dict(label_smoothing=0.25), 1.5 * math.log(4 / 3) - 0.5 * math.log(4), math.log(2)),
        ("hinge", dict(), 0.0, 1.0),  # beta times the logit is 1.0986, beyond the margin
        ("hinge", dict(beta=0.25), 1 - LN3 / 2, 1.0),
        ("ipo", dict(), (1.5 * LN3 / 3 - (-0.5 * LN3) / 2 - 1) ** 2, 1.0),  # 3 and 2 tokens; 1 / (2 beta) = 1
    ],
    ids=str,
)
def test_losses_worked_by_hand(loss: Any, changed: dict, expected: float, at_zero: float) -> None:
    cfg = dpo.Config(**dict(loss=loss, beta=0.5) | changed)
    chosen, rejected = torch.tensor([1.5 * LN3, 0.0]), torch.tensor([-0.5 * LN3, 0.0])  # logits 2 ln 3, and 0
    got = dpo.preference_loss(chosen, rejected, torch.tensor([[3, 1], [2, 1]]), cfg).tolist()
    assert got == pytest.approx([expected, at_zero], abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
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


# -----------------------------------------------------------------------------
# Log-probabilities and sums


def random_texts(n: int) -> list[tuple[Row, str]]:
    """Prompts, chosen and rejected responses of random letters, of very different lengths."""
    rng = random.Random(0)

    def letters(longest: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, longest)))

    return [(Row(letters(8), "", letters(20)), letters(20) + "!") for _ in range(n)]


def random_pairs(n: int) -> list[Pair]:
    """The tokenized texts with a different reference for each, so that a mix-up changes the result."""
    tokenized = dpo.tokenize_pairs(random_texts(n), 48, BYTES, "texts")
    assert len(tokenized) == n
    return [pair._replace(reference=(-40.0 - i, -30.0 - 2 * i)) for i, pair in enumerate(tokenized)]


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
    raw, pairs = tiny().double(), random_pairs(5)
    total, sums, logps = 0.0, np.zeros(7), []
    for (row, other), pair in zip(random_texts(5), pairs):
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


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_no_split_changes_loss_or_gradient(loss: Any) -> None:
    """Micro-batches and ranks, also more ranks than pairs, and a number of pairs that they do not divide."""
    pairs, cfg = random_pairs(5), dpo.Config(loss=loss, beta=0.2, rpo_alpha=0.5)

    def sums(world_size: int, B: int) -> tuple[int, Tensor, Tensor]:
        """The number of pairs, the loss with the metrics, and the gradient."""
        raw, n, values = tiny().double(), 0, torch.zeros(8)
        ranks = [ALONE._replace(rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [dpo.collate_pairs(pairs, B, rt) for rt in ranks]
        # ranks wait for each other after every micro-batch
        assert len({tuple(len(batch["reference"]) for batch in part) for part in parts}) == 1
        for batch in (batch for part in parts for batch in part):
            loss, metrics = dpo.dpo_loss(raw, batch, cfg)
            loss.backward()
            n, values = n + batch["n"], values + torch.stack([loss.detach(), *metrics.values()])
        return n, values, torch.cat([p.grad.flatten() for p in raw.parameters()])

    n, values, gradient = sums(1, 5)
    assert n == 5 and gradient.abs().max() > 1e-2
    for world_size, B in ((1, 1), (1, 2), (2, 1), (2, 8), (3, 2), (8, 3)):
        got = sums(world_size, B)
        assert got[0] == 5
        torch.testing.assert_close(got[1], values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[2], gradient, rtol=1e-6, atol=1e-6)


# -----------------------------------------------------------------------------
# Whole runs on a toy rule: "yes" is better than "no"


def toy_rows() -> list[dict[str, str]]:
    """26 prompts of one letter. The better response is response_a in every second row."""
    letters, sides = "abcdefghijklmnopqrstuvwxyz", [("no", "yes", "B"), ("yes", "no", "A")] * 13
    rows = [(f"{letter}?", *side) for letter, side in zip(letters, sides)]
    return [dict(prompt=prompt, response_a=a, response_b=b, preferred=p) for prompt, a, b, p in rows]


def write_start(folder: Path, seed: int = 0, stage: str = "sft") -> str:
    return str(harness.write_model(folder, tiny(seed, 0.1), stage))


@pytest.fixture
def cfg(tmp_path: Path) -> dpo.Config:
    """A configuration that trains in a second."""
    start, rows = write_start(tmp_path / "sft"), write_rows(tmp_path / "pairs.jsonl", toy_rows())
    steps = dict(B=4, pairs_per_step=8, max_steps=12, max_lr=1e-3, save_every=4, device="cpu", precision="fp32")
    evaluation = dict(val_frac=0.2, eval_every=5, n_eval_prompts=3, prompts=("a?",), answer_tokens=5)
    return dpo.Config(checkpoint=start, data=rows, out_dir=str(tmp_path / "out"), **steps, **evaluation)


def start_again(folder: Path) -> None:
    """Delete everything of a run but the cached reference."""
    for path in [*folder.glob("*.pt"), folder / "log.txt"]:
        path.unlink()


@pytest.mark.parametrize("changed", [*(dict(loss=loss) for loss in LOSSES), dict(lora_rank=8)], ids=str)
def test_first_loss_is_that_of_equal_models_and_margins_grow(cfg: dpo.Config, changed: dict) -> None:
    folder = train(cfg, max_steps=15, max_lr=3e-3, n_eval_prompts=0, prompts=(), **changed)
    at_zero = dict(hinge=1.0, ipo=25.0).get(changed.get("loss", ""), math.log(2))
    log = {name: float(value) for (step, name), value in read_log(folder).items() if step == 0}
    assert log["preference"] == log["train"] == pytest.approx(at_zero, rel=1e-6)
    assert log["val"] == log["val/preference"] == pytest.approx(at_zero, rel=1e-6)
    for name in REWARDS:
        assert log[name] == log[f"val/{name}"] == pytest.approx(0, abs=1e-6)
    assert log["norm"] > 0 and losses(folder, "val/rewards/accuracies")[15] == 1
    assert losses(folder, "val/rewards/chosen")[15] > 0 > losses(folder, "val/rewards/rejected")[15]


def test_rule_is_learned(cfg: dpo.Config, tmp_path: Path) -> None:
    """The better response is on either side: a mix-up of A and B would pull both ways."""
    questions = [dict(instruction="a?", response="yes"), dict(instruction="1?", response="never")]
    path = write_rows(tmp_path / "questions.jsonl", questions)
    folder = train(cfg, max_steps=60, max_lr=3e-2, rpo_alpha=1.0, eval_questions=path)
    for prefix, step in (("", 59), ("val/", 60)):
        value = {name: losses(folder, prefix + name)[step] for name in METRICS}
        assert value["rewards/chosen"] > 0.5 and value["rewards/rejected"] < -0.2
        assert value["rewards/accuracies"] == 1 and value["preference"] < 0.5
        assert value["rewards/margins"] == pytest.approx(value["rewards/chosen"] - value["rewards/rejected"])
    logps = losses(folder, "val/logps/chosen")  # a reward is beta times the log-ratio
    assert 0.1 * (logps[60] - logps[0]) == pytest.approx(losses(folder, "val/rewards/chosen")[60], abs=1e-4)
    assert losses(folder, "begins")[0] == 0 and losses(folder, "begins")[60] == 0.5
    assert losses(folder, "exact")[0] == 0 and losses(folder, "exact")[60] == 1
    assert "> a? -> yes\n" in notes(folder).replace("\\n", "\n") + "\n"


def test_files_and_position_of_a_run_that_is_extended(cfg: dpo.Config) -> None:
    start = {path: path.read_bytes() for path in Path(cfg.checkpoint).iterdir()}
    folder = train(cfg)
    assert {path: path.read_bytes() for path in Path(cfg.checkpoint).iterdir()} == start
    (reference,) = folder.glob("reference_*.npz")
    names = {"best.pt", "ckpt_000010.pt", "ckpt_000012.pt", "log.txt", reference.name}
    assert {path.name for path in folder.iterdir()} == names  # margins grow: the best is the last
    assert losses(folder, "val").keys() == {0, 5, 10, 12} and losses(folder, "lr").keys() == set(range(12))
    best, last = checkpoint.read(folder / "best.pt"), checkpoint.read(folder / "ckpt_000012.pt")
    assert (best.step, best.optimizers) == (12, None)
    assert (last.stage, last.step) == ("dpo", 12)
    assert last.scores["val"] == pytest.approx(losses(folder, "val")[12])
    assert checkpoint.load_model(str(folder)).step == 12
    # a pair is 13 tokens of prompt twice, "yes" and "no"; end-of-text is a target only: 16 + 15 inputs, without padding
    assert losses(folder, "tokens") == {step: step * 8 * 31 for step in (0, 5, 10, 12)}

    train(cfg)  # a finished run is only evaluated once more
    assert checkpoint.read(folder / "ckpt_000012.pt").seconds == last.seconds
    assert losses(folder).keys() == set(range(12))
    train(cfg, pairs_per_step=5, max_steps=14)  # continues at the same position
    ckpt = checkpoint.read_newest(folder)
    assert (ckpt.step, ckpt.n_sequences, ckpt.n_tokens) == (14, 106, 106 * 31)
    # checkpoints of format 1 hold the loss, the margin and the step of the best evaluation
    torch.save(vars(ckpt) | dict(format=1, scores=dict(best=(0.01, 0.5, 12))), folder / "ckpt_000014.pt")
    train(cfg, max_steps=16)
    assert checkpoint.read_newest(folder).scores["best"] == 0.01


# -----------------------------------------------------------------------------
# Reference log-probabilities


def read_reference(folder: Path) -> np.ndarray:
    (path,) = folder.glob("reference_*.npz")
    with np.load(path) as archive:
        return archive["log_probs"]


def write_reference(folder: Path, logps: np.ndarray) -> None:
    (path,) = folder.glob("reference_*.npz")
    np.savez(path, log_probs=logps)


def test_reference_is_computed_once(cfg: dpo.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(cfg)
    first = read_log(folder)
    start_again(folder)
    monkeypatch.setattr(dpo, "reference_logps", lambda *args: pytest.fail("computed again"))
    train(cfg)
    assert read_log(folder) == first and "computing the reference" not in notes(folder)
    other = write_start(tmp_path / "other", seed=1)
    for changed in (dict(T=15), dict(precision="bf16"), dict(checkpoint=other)):  # have another reference
        start_again(folder)
        with pytest.raises(pytest.fail.Exception):
            train(cfg, **changed)


def test_reference_belongs_to_the_boundaries_of_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of both sequences together are the same."""
    computed, ids = [], np.arange(5)
    monkeypatch.setattr(dpo, "reference_logps", lambda *args: computed.append(1) or np.zeros((1, 2)))
    pairs = [Pair(Example(ids[:n], n_prompt), Example(ids[n:], 1)) for n, n_prompt in ((3, 1), (3, 2), (2, 1))]
    run = SimpleNamespace(cfg=dpo.Config(), rt=ALONE, base="", out_dir=tmp_path, resumed=None, full_model=lambda: None)
    for pair in pairs * 2:
        dpo.add_reference(run, [pair])
    assert len(computed) == 3


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_only_rounding_may_differ_from_the_reference(cfg: dpo.Config, precision: Any, tolerance: float) -> None:
    """The tolerance is a log-ratio per token; both responses of a pair have 7 tokens together."""
    fp32 = read_reference(train(cfg, max_steps=1, out_dir=cfg.out_dir + "-fp32"))
    cfg = replace(cfg, max_steps=1, precision=precision)
    exact = read_reference(train(cfg))
    assert (np.abs(exact - fp32).max() > 1e-3) == (precision == "bf16")
    accepted, refused = nullcontext(), pytest.raises(AssertionError, match="log-ratio")
    shift = np.array([7 * tolerance, 0])
    for reference, outcome in ((fp32, accepted), (exact - shift / 2, accepted), (exact + 2 * shift, refused)):
        start_again(Path(cfg.out_dir))
        write_reference(Path(cfg.out_dir), reference)
        with outcome:
            train(cfg)


def test_damaged_reference_is_computed_again_from_the_start(cfg: dpo.Config) -> None:
    """Also in a resumed run, whose policy is no longer the reference."""
    cfg = replace(cfg, max_lr=1e-2, keep_last=9, n_eval_prompts=0)
    folder = train(cfg)
    (path,) = folder.glob("reference_*.npz")
    good, logps = path.read_bytes(), read_reference(folder)
    at = good.index(b"\n") + 4  # the numbers follow a header of one line
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for i, damaged in enumerate((good[: len(good) // 2], flipped, logps * np.inf, logps[1:])):
        resumed = Path(f"{cfg.out_dir}-{i}")
        resumed.mkdir()
        shutil.copy(folder / "ckpt_000008.pt", resumed)
        (resumed / path.name).write_bytes(damaged if i < 2 else good)
        if i >= 2:
            write_reference(resumed, damaged)
        assert (resumed / path.name).read_bytes() != good
        train(cfg, out_dir=str(resumed))
        assert "computing the reference" in notes(resumed) and min(losses(resumed)) == 8
        assert (resumed / path.name).read_bytes() == good
        harness.assert_same_run(resumed, folder, from_step=8)


# -----------------------------------------------------------------------------
# Interrupted runs and several ranks


@pytest.mark.parametrize("changed, moments", [(dict(), [0, 7, 13]), (dict(lora_rank=2), [2, 9])], ids=["all", "lora"])
def test_killed_and_resumed_run_equals_uninterrupted_run(
    cfg: dpo.Config, server: ForkServer, changed: dict, moments: list[int]
) -> None:
    cfg = replace(cfg, max_steps=60, eval_every=9, save_every=5, max_lr=5e-3, rpo_alpha=0.5, **changed)
    folder = harness.kill_and_resume(server, "dpo", replace(cfg, out_dir=cfg.out_dir + "-killed"), moments)
    harness.assert_same_run(folder, train(cfg))
    assert (folder / "best.pt").is_file()


def test_two_ranks_equal_one(cfg: dpo.Config, server: ForkServer) -> None:
    """With another micro-batch size and an odd number of pairs per step, so that one rank has an empty row."""
    cfg = replace(cfg, pairs_per_step=5, max_steps=8, rpo_alpha=0.5, max_lr=3e-3)
    one, two = train(cfg), Path(cfg.out_dir + "-two")
    server.run("dpo", harness.command_line(replace(cfg, B=2, out_dir=str(two))), n_ranks=2)
    assert "world_size=2" in notes(two) and losses(two).keys() == set(range(8))
    names = ("train", "val", "norm", "exact", "tokens", *METRICS, *(f"val/{name}" for name in METRICS))
    harness.assert_close_runs(two, one, names)
    np.testing.assert_allclose(read_reference(two), read_reference(one), atol=1e-4)
    assert [path.name for path in two.glob("*.npz")] == [path.name for path in one.glob("*.npz")]


# -----------------------------------------------------------------------------
# Refusals

OPTIONS = [dict(beta=0.0), dict(beta=math.nan), dict(rpo_alpha=-1.0), dict(pairs_per_step=0), dict(T=49)]
OPTIONS += [dict(label_smoothing=-0.1)] + [dict(label_smoothing=0.1, loss=loss) for loss in ("hinge", "ipo")]
OPTIONS += [dict(label_smoothing=0.5, loss=loss) for loss in ("sigmoid", "robust")]


@pytest.mark.parametrize("changed", OPTIONS, ids=str)
def test_invalid_options_are_refused(cfg: dpo.Config, changed: dict) -> None:
    name, value = next(iter(changed.items()))
    harness.refused(dpo.main, cfg, f"--{name}={value}", **changed)


def test_one_prompt_needs_held_out_pairs(cfg: dpo.Config, tmp_path: Path) -> None:
    same = write_rows(tmp_path / "same.jsonl", [row("a", "yes", "no"), row(" a", "yes", "never")])
    harness.refused(dpo.main, cfg, "2 rows have the same prompt", "--val_data", data=same)
    folder = train(cfg, data=same, val_data=cfg.data, max_steps=1)
    assert "2 pairs to train on, 26 held out" in notes(folder)


def test_checkpoints_of_other_stages_are_refused(cfg: dpo.Config, tmp_path: Path) -> None:
    pretrained = write_start(tmp_path / "pretrained", stage="pretraining")
    harness.refused(dpo.main, cfg, pretrained, "stage pretraining", "sft.py", checkpoint=pretrained)
    assert not Path(cfg.out_dir).exists()
    harness.refused(dpo.main, cfg, "of-sft", "dpo", out_dir=write_start(tmp_path / "of-sft"))


def test_changed_batch_size_continues_the_order(cfg: dpo.Config) -> None:
    harness.check_changed_batch_size(dpo.main, replace(cfg, rpo_alpha=1.0), "pairs_per_step", 1)


def test_what_changes_the_curve_is_reported(cfg: dpo.Config) -> None:
    rows = Path(cfg.data).read_text().splitlines(keepends=True)
    changes = {"beta": dict(beta=0.3), "loss sigmoid -> ipo": dict(loss="ipo"), "max_lr": dict(max_lr=0.1)}
    changes |= {"training_data": lambda: Path(cfg.data).write_text("".join(rows[1:])), "seed 1337 -> 5": dict(seed=5)}
    harness.check_changes_are_reported(dpo.main, cfg, changes)
