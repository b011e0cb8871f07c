"""hellaswag.py compared with a scorer of one ending at a time; invalid rows and options."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import harness
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from harness import ALONE, BYTES, write_rows

import hellaswag
from neogpt import config, data, hf, model

NORMS = ["sum", "per token", "per character", "per byte"]
GOOD = dict(activity_label="x", ctx_a="a", ctx_b="b", ctx="a b", endings=["a", "b", "c", "d"], label=2)
Capture = pytest.CaptureFixture[str]


def merging_tokenizer(*merged: bytes) -> tiktoken.Encoding:
    """The bytes and these tokens, which replace their bytes wherever they occur."""
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *merged])}
    return tiktoken.Encoding("toy", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={data.EOT: len(ranks)})


def make_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows with everything that HellaSwag has: WikiHow's markup, empty ctx_b, odd spaces, non-ASCII letters."""
    rng = random.Random(seed)
    words = "the a man woman dog Überfluß naïve runs 日本語 🙂 sits, then. up—down I'm 1,234 [step] [substeps]".split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    rows, ends = [], [".", "  ", " [title] end", " [step]", " [a\nb]."]
    for i in range(n):
        ctx_a = text(3, 25) + rng.choice([".", " [title] Go on.", "  ", " [step]"])
        ctx_b = rng.choice(["", text(1, 3)])
        endings = [f"{rng.choice('abcdef')} {text(1, 12)}" + rng.choice(ends) for _ in range(4)]
        row = dict(ind=i, activity_label=rng.choice(["Cutting [x] grass", "Ärger"]), ctx_a=ctx_a, ctx_b=ctx_b)
        rows.append(row | dict(ctx=f"{ctx_a} {ctx_b}", endings=endings, label=rng.randrange(4)))
    return rows


def make_model(**shape: Any) -> model.GPT:
    """A model with large random weights, so that log-probabilities depend on the context."""
    return harness.tiny_model(**(dict(scale=0.3, n_embd=32, block_size=1024) | shape))


def load(rows: list, tmp_path: Path, style: str = "completion", tokenizer: Any = BYTES, block_size: int = 1024) -> Any:
    """Rows -> file -> questions."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return hellaswag.prepare(hellaswag.read_rows(str(path), None), tokenizer, style, block_size)


def plain_texts(row: dict, style: str) -> tuple[str, list[str]]:
    """Context and endings of build-nanogpt (completion) and of lm-evaluation-harness 0.4.13 (harness)."""

    def preprocess(text: str) -> str:
        text = text.strip()
        text = text.replace(" [title]", ". ")
        text = re.sub("\\[.*?\\]", "", text)
        return text.replace("  ", " ")

    if style == "completion":
        return row["ctx"], row["endings"]
    ctx = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    return preprocess(row["activity_label"] + ": " + ctx), [preprocess(ending) for ending in row["endings"]]


def plain_tokens(context: str, ending: str, style: str, tokenizer: tiktoken.Encoding) -> tuple[list[int], list[int]]:
    """Token ids of a context and an ending, as build-nanogpt and lm-evaluation-harness compute them."""
    ending = " " + ending
    if style == "completion":
        return tokenizer.encode_ordinary(context) or [tokenizer.eot_token], tokenizer.encode_ordinary(ending)
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        ending, context = context[-n_spaces:] + ending, context[:-n_spaces]
    head = tokenizer.encode_ordinary(context)
    return head, tokenizer.encode_ordinary(context + ending)[len(head) :]


@torch.no_grad()
def plain_scores(raw: model.GPT, rows: list[dict], style: str, tokenizer: tiktoken.Encoding) -> tuple[np.ndarray, dict]:
    """Log-probabilities (n, 4), one ending at a time and from all logits, and what each accuracy divides them by.

    A context is truncated on the left for all of its endings, so that the longest one fits.
    """
    sums, lengths, block_size = [], [], raw.config.block_size
    for row in rows:
        context, endings = plain_texts(row, style)
        pairs = [plain_tokens(context, ending, style, tokenizer) for ending in endings]
        room = max(1, block_size + 1 - max(len(tail) for _, tail in pairs))
        for (head, tail), ending in zip(pairs, endings):
            tail = tail[-block_size:]
            ids = torch.tensor(head[-room:] + tail)
            logits = raw(ids[None, :-1])[0, :, : raw.config.n_tokens]
            losses = F.cross_entropy(logits.double(), ids[1:], reduction="none")
            sums.append(-losses[-len(tail) :].sum().item())
            lengths.append((1, len(tail), len(ending), len(ending.encode())))
    return np.array(sums).reshape(-1, 4), dict(zip(NORMS, np.array(lengths).T.reshape(4, -1, 4)))


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize(
    "name, block_size, attention, dtype, tolerance",
    [
        ("bytes", 1024, "flash", torch.float32, 1e-4),
        ("bytes", 1024, "manual", torch.float64, 1e-10),
        ("bytes", 90, "flash", torch.float64, 1e-10),  # most rows are longer, and so are some endings alone
        ("gpt2", 128, "flash", torch.float32, 1e-4),
    ],
)
def test_scores_equal_a_plain_scorer(
    style: str, name: str, block_size: int, attention: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    tokenizer, rows = harness.get_tokenizer(name), make_rows(12)
    rows[0]["ctx"] = ""  # end-of-text takes its place
    n_tokens = tokenizer.n_vocab
    raw = make_model(n_tokens=n_tokens, vocab_size=n_tokens + 7, block_size=block_size, attention=attention).to(dtype)
    questions = load(rows, tmp_path, style, tokenizer, block_size)
    result, (expected, lengths) = hellaswag.evaluate(raw, questions, ALONE), plain_scores(raw, rows, style, tokenizer)
    assert result.sums.shape == (12, 4) and result.sums.std() > 10
    assert np.abs(result.sums - expected).max() < tolerance
    for by in NORMS:
        assert (questions.length[by] == lengths[by]).all()
        predictions = (expected / lengths[by]).argmax(1)
        assert (result.predictions[by] == predictions).all()
        assert result.accuracy[by] == pytest.approx(np.mean(predictions == [row["label"] for row in rows]))


def test_batches_stay_below_n_tokens_and_the_order_of_rows_changes_no_bit(tmp_path: Path) -> None:
    rows, raw, shapes, n_rows = make_rows(30), make_model(block_size=4096), [], []
    rows += [row | dict(ctx=row["ctx"][::-1]) for row in rows]  # of the same lengths
    rows.append(GOOD | dict(ctx="a" * 3000))  # longer than a batch
    order, questions = random.Random(1).sample(range(61), 61), load(rows, tmp_path, block_size=4096)
    shuffled = hellaswag.evaluate(raw, load([rows[i] for i in order], tmp_path, block_size=4096), ALONE)
    raw.transformer.wte.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    raw.lm_head.register_forward_hook(lambda module, args, out: n_rows.append(len(out)))
    result = hellaswag.evaluate(raw, questions, ALONE)
    assert (shuffled.sums == result.sums[order]).all() and shuffled.accuracy == result.accuracy
    lengths = [p.inputs.shape[1] for p in questions.packed]
    assert sum(B for B, _ in shapes) == 61 and len(shapes) > 5
    for B, T in shapes:
        batch, lengths = lengths[:B], lengths[B:]
        assert T % 8 == 0 and max(batch) <= T < max(batch) + 8 and (B * T <= 2**11 or B == 1)
    # the head runs on the tokens of the endings only, a few at a time
    assert sum(n_rows) == questions.length["per token"].sum() and max(n_rows) <= 2**7


@pytest.mark.parametrize("n_rows", [25, 1])  # 1: fewer rows than ranks
def test_two_processes_equal_one(n_rows: int, tmp_path: Path, server: harness.ForkServer) -> None:
    rows, run = write_rows(tmp_path / "rows.jsonl", make_rows(n_rows)), tmp_path / "run"
    harness.write_model(run, make_model())
    cfg = hellaswag.Config(checkpoint=str(run), data=rows, out=str(tmp_path / "one.jsonl"), device="cpu")
    hellaswag.main(cfg)
    server.run("hellaswag", harness.command_line(replace(cfg, out=str(tmp_path / "two.jsonl"))), n_ranks=2)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_truncated_contexts_are_counted(tmp_path: Path, printed: pytest.LogCaptureFixture) -> None:
    # the first two exceed 32 + 1 tokens; endings have one more token for the space
    rows = [dict(ctx="c" * 20, endings=["a" * 3, "b" * 10, "c" * n, "d"], label=0) for n in (13, 100, 12)]
    load(rows, tmp_path, block_size=32)
    assert len(printed.messages) == 1 and "2 rows exceed the model's 32 tokens" in printed.text


ENDINGS = [["a"] * 3, ["a"] * 5, "abcd", None, ["a", " \n", "c", "d"], ["a", "b", "c", 4]]
INVALID = [("completion", "endings", value) for value in ENDINGS]
INVALID += [("completion", "label", value) for value in (4, -1, "x", 1.0, True)]
INVALID += [("completion", "ctx", None), ("completion", "ctx", ["a"]), ("harness", "activity_label", None)]
INVALID += [("harness", "ctx_a", None), ("harness", "ctx_b", 3), ("harness", "endings", ["a", "[step]", "c", "d"])]


@pytest.mark.parametrize("style, field, value", INVALID)
def test_invalid_row_is_named(style: str, field: str, value: Any, tmp_path: Path) -> None:
    with harness.error(f"{tmp_path / 'rows.jsonl'}, row 3", repr(value) if field == "endings" else repr(field)):
        load([GOOD, GOOD, GOOD | {field: value}], tmp_path, style)


def test_tokens_across_the_end_of_the_context(tmp_path: Path) -> None:
    """Harness style removes as many tokens as the context has alone."""
    assert hellaswag.encode("  ", ["c"], "harness", BYTES) == ([256], [[*b" c"]])
    merging = merging_tokenizer(b"b ")
    assert hellaswag.encode("ab", ["c"], "completion", merging) == ([*b"ab"], [[*b" c"]])
    assert hellaswag.encode("ab", ["cd"], "harness", merging) == ([*b"ab"], [[*b"cd"]])  # a|b |c|d without two
    merging = merging_tokenizer(b"b ", b"b x")  # "b x" is one token, so the ending " x" has none of its own
    row = GOOD | dict(activity_label="a", ctx_a="abb", ctx_b="", endings=["x", "y", "z", "w"])
    with harness.error("row 2"):
        load([GOOD, row], tmp_path, "harness", merging)


def test_lone_surrogates_count_as_the_three_bytes_of_their_replacement() -> None:
    fields = GOOD | dict(ctx="\ud83d", endings=["\ud83d", "b", "c", "d"])  # from an escape in JSON
    row = hellaswag.Row("row 1", 0, 2, fields)
    assert hellaswag.prepare([row], BYTES, "completion", 64).length["per byte"].tolist() == [[3, 1, 1, 1]]


def test_command_line_output(tmp_path: Path, capsys: Capture) -> None:
    rows = make_rows(14)
    rows[3]["label"], rows[4]["label"], rows[5]["label"] = "", None, f" {rows[5]['label']} "
    del rows[6]["label"]
    path, raw, out = write_rows(tmp_path / "rows.jsonl", rows), make_model(block_size=512), tmp_path / "out.jsonl"
    args = [f"--checkpoint={harness.write_model(tmp_path / 'run', raw)}", f"--data={path}", f"--out={out}"]
    args += ["--limit=10", "--style=harness", "--device=cpu", "--precision=fp32"]
    hellaswag.main(config.parse(hellaswag.CONFIGS, hellaswag.__doc__, ["demo", *args]))
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 5, 7, 8, 9, 10, 11, 12]  # those with a label
    scored = [rows[line["index"]] for line in lines]
    expected, lengths = plain_scores(raw, scored, "harness", BYTES)
    assert np.abs(np.array([line["sums"] for line in lines]) - expected).max() < 1e-4
    for i, (line, row) in enumerate(zip(lines, scored)):
        assert line["label"] == int(row["label"])
        for name, by in zip(("n_tokens", "n_chars", "n_bytes"), NORMS[1:]):
            assert line[name] == lengths[by][i].tolist()
        assert line["predictions"] == {by: int((expected[i] / lengths[by][i]).argmax()) for by in NORMS}
    p = sum(line["predictions"]["per byte"] == line["label"] for line in lines) / 10
    assert f"{p:.4f} ± {math.sqrt(p * (1 - p) / 10):.4f}" in printed.splitlines()[-1]
    assert "10 rows" in printed and "per character (acc_norm)" in printed


def test_published_values_of_the_same_style(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.get_tokenizer("gpt2")
    hf.save(make_model(n_tokens=50257, vocab_size=50304, n_embd=8, block_size=64), tmp_path)
    rows, published = write_rows(tmp_path / "rows.jsonl", [GOOD] * 3), []
    load_dataset = Mock(return_value=SimpleNamespace(to_list=lambda: [GOOD] * 3))
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for style, source in (("completion", ""), ("harness", ""), ("harness", rows)):
        hellaswag.main(hellaswag.Config(checkpoint=str(tmp_path), data=source, style=style, device="cpu"))
        published.append([line.split() for line in capsys.readouterr().out.splitlines() if "124M" in line])
    completion = [["GPT-2", "124M", "0.2859", "0.2955", "-", "-"], ["GPT-3", "124M", "-", "0.3370", "-", "-"]]
    # none beside the scores of other rows
    assert published == [completion, [["GPT-2", "124M", "0.2892", "-", "0.3114", "-"]], []]
    assert load_dataset.call_args_list == [call("Rowan/hellaswag", split="validation")] * 2


def test_invalid_options_and_models(tmp_path: Path) -> None:
    run = harness.write_model(tmp_path / "run", make_model(scale=math.nan))
    cfg = hellaswag.Config(str(run), write_rows(tmp_path / "rows.jsonl", make_rows(2)), device="cpu")
    harness.refused(hellaswag.main, cfg, "--limit=0", limit=0)
    harness.refused(hellaswag.main, cfg, "--out=", "nowhere", out=f"{tmp_path}/nowhere/rows.jsonl")
    harness.refused(hellaswag.main, cfg, "--out=", out=str(tmp_path))
    harness.refused(hellaswag.main, cfg, run, "finite")
    test = write_rows(tmp_path / "test.jsonl", [GOOD | dict(label="")] * 2)
    harness.refused(hellaswag.main, cfg, test, "label", data=test)
