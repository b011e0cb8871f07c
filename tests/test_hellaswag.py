"""hellaswag.py against a plain scorer of one ending at a time, by hand, and on rows that users get wrong."""

import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hellaswag
from checkpoints import save_checkpoint
from data import EOT, get_tokenizer
from hellaswag import CONFIGS, Config, Questions, Result, clean, encode, evaluate, main, prepare, read_rows
from hf import to_hf
from model import GPT, GPTConfig
from training import Dist, autocast, parse

ROOT = Path(__file__).parent.parent
ALONE = Dist(0, 1, torch.device("cpu"))
AMP = autocast("fp32", ALONE.device)
WAYS = ["sum", "per token", "per character", "per byte"]


def tokenizer_of(name: str) -> tiktoken.Encoding:
    """The tokenizer, or a skipped test."""
    try:
        return get_tokenizer(name)
    except SystemExit as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {error}")


def make_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows with all that HellaSwag's have: WikiHow's markup, empty ctx_b, odd spaces, non-ASCII letters."""
    rng = random.Random(seed)
    words = "the a man woman dog Überfluß naïve runs 日本語 🙂 sits, then. up—down I'm 1,234".split()
    words += ["[step]", "[substeps]"]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    rows = []
    for i in range(n):
        ctx_a, ctx_b = (
            text(3, 25) + rng.choice([".", " [title] Go on.", "  ", " [step]"]),
            rng.choice(["", text(1, 3)]),
        )
        endings = [
            f"{rng.choice('abcdef')} {text(1, 12)}" + rng.choice([".", "  ", " [title] end"])
            for _ in range(4)
        ]
        row = dict(ind=i, activity_label=rng.choice(["Cutting [x] grass", "Ärger"]), ctx_a=ctx_a, ctx_b=ctx_b)
        rows.append(row | dict(ctx=f"{ctx_a} {ctx_b}", endings=endings, label=rng.randrange(4)))
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as the original file has them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def model(n_tokens: int = 257, block_size: int = 1024, attention: str = "flash") -> GPT:
    """A model of random weights, large enough that what it says depends on what it was told."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=block_size)
    raw = GPT(GPTConfig(**sizes, n_tokens=n_tokens, vocab_size=n_tokens + 7, attention=attention))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in raw.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return raw


def nothing(text: str) -> None:
    """Say nothing."""


def questions_of(
    rows: list[dict], tmp_path: Path, style: str = "completion", name: str = "bytes", block_size: int = 1024
) -> Questions:
    """Rows through the file and the tokenizer."""
    read = read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), 0, nothing)
    return prepare(read, tokenizer_of(name), style, block_size, nothing)


# -----------------------------------------------------------------------------
# The numbers


def plain_text(row: dict, style: str) -> tuple[str, list[str]]:
    """A context and its endings, as build-nanogpt and as lm-evaluation-harness 0.4.13 word them."""

    def preprocess(text: str) -> str:
        text = text.strip()
        text = text.replace(" [title]", ". ")
        text = re.sub("\\[.*?\\]", "", text)
        return text.replace("  ", " ")

    if style == "completion":
        return row["ctx"], row["endings"]
    ctx = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    return preprocess(row["activity_label"] + ": " + ctx), [preprocess(ending) for ending in row["endings"]]


def plain_tokens(
    context: str, ending: str, style: str, tokenizer: tiktoken.Encoding
) -> tuple[list[int], list[int]]:
    """Their token ids, as the two tokenise them."""
    ending = " " + ending
    if style == "completion":
        return tokenizer.encode_ordinary(context), tokenizer.encode_ordinary(ending)
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        ending, context = context[-n_spaces:] + ending, context[:-n_spaces]
    head = tokenizer.encode_ordinary(context)
    return head, tokenizer.encode_ordinary(context + ending)[len(head) :]


@torch.no_grad()
def plain_sums(raw: GPT, rows: list[dict], style: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Score one ending at a time, with all logits, cutting a sequence on the left where it is too long."""
    sums = []
    for row in rows:
        context, endings = plain_text(row, style)
        for ending in endings:
            head, tail = plain_tokens(context, ending, style, tokenizer)
            ids = torch.tensor((head + tail)[-raw.config.block_size - 1 :])
            logits = raw(ids[None, :-1])[0][0, :, : raw.config.n_tokens]
            losses = F.cross_entropy(logits.double(), ids[1:], reduction="none")
            sums.append(-losses[-len(tail) :].sum().item())
    return np.array(sums).reshape(-1, 4)


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize(
    "name, block_size, attention, dtype, tolerance",
    [
        ("bytes", 1024, "flash", torch.float32, 1e-4),
        ("bytes", 1024, "flash", torch.float64, 1e-10),
        ("bytes", 1024, "manual", torch.float64, 1e-10),
        ("bytes", 90, "flash", torch.float64, 1e-10),  # most rows are longer, and some endings alone
        ("gpt2", 128, "flash", torch.float32, 1e-4),
    ],
)
def test_sums_are_those_of_a_plain_scorer(
    style: str,
    name: str,
    block_size: int,
    attention: str,
    dtype: torch.dtype,
    tolerance: float,
    tmp_path: Path,
) -> None:
    tokenizer, rows = tokenizer_of(name), make_rows(30)
    raw = model(tokenizer.n_vocab, block_size, attention).to(dtype)
    questions = questions_of(rows, tmp_path, style, name, block_size)
    result, expected = evaluate(raw, questions, AMP, ALONE), plain_sums(raw, rows, style, tokenizer)
    assert result.sums.shape == (30, 4) and result.sums.std() > 10
    assert np.abs(result.sums - expected).max() < tolerance

    endings = [plain_text(row, style)[1] for row in rows]
    n_chars = [[len(e) for e in row] for row in endings]
    n_bytes = [[len(e.encode()) for e in row] for row in endings]
    pairs = [
        [plain_tokens(plain_text(r, style)[0], e, style, tokenizer) for e in es]
        for r, es in zip(rows, endings)
    ]
    n_tokens = [
        [min(len(tail), block_size, len(head) + len(tail) - 1) for head, tail in row] for row in pairs
    ]
    for way, lengths in zip(WAYS, (np.ones((30, 4)), n_tokens, n_chars, n_bytes), strict=True):
        assert (questions.length[way] == lengths).all()
        picks = (expected / np.array(lengths)).argmax(1)
        assert (result.picks[way] == picks).all()
        p = float(np.mean(picks == [row["label"] for row in rows]))
        assert result.accuracy[way] == pytest.approx(p)
        assert result.error[way] == pytest.approx(math.sqrt(p * (1 - p) / 30))


def test_an_empty_context_is_end_of_text(tmp_path: Path) -> None:
    row = make_rows(1)[0] | dict(ctx="")
    raw, tokenizer = model().double(), get_tokenizer("bytes")
    got = evaluate(raw, questions_of([row], tmp_path), AMP, ALONE).sums[0]
    for ending, found in zip(row["endings"], got):
        ids = torch.tensor([tokenizer.eot_token, *(" " + ending).encode()])
        logits = raw(ids[None, :-1])[0][0, :, :257]
        assert found == pytest.approx(-F.cross_entropy(logits, ids[1:], reduction="sum").item())


class Prices(nn.Module):
    """A model to which the price of a token, in units of ln 4, is all that counts, whatever stands before."""

    def __init__(self, prices: dict[int, int], n_tokens: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_tokens=n_tokens)
        probs = torch.full((n_tokens,), 1e-12)
        for token, price in prices.items():
            probs[token] = 4.0**-price
        probs[-1] = 1 - probs[:-1].sum()
        # the padded ids are likelier than all others, and must not matter
        self.lm_head = nn.Linear(1, n_tokens + 7, bias=False)
        self.lm_head.weight.data = torch.cat([probs.log(), torch.full((7,), 5.0)])[:, None]

    def hidden(self, idx: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        """One channel that is always 1."""
        return torch.ones(*idx.shape, 1)


def test_every_way_to_normalise_by_hand(tmp_path: Path) -> None:
    # bytes, and three merges: "dd" 256, "日" 258
    ranks = {bytes([i]): i for i in range(256)} | {b"dd": 256, "日".encode()[:2]: 257, "日".encode(): 258}
    tokenizer = tiktoken.Encoding("toy", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={EOT: 259})
    e2, x82, ac = "€".encode()
    raw = Prices({ord(" "): 1, ord("a"): 3, e2: 2, x82: 2, ac: 2, 256: 5, 258: 4}, 260)
    #           price  tokens  characters  bytes
    # " a"          4       2           1      1    cheapest: 4
    # " €"          7       4           1      3    cheapest per token: 7/4, then 4/2, 5/2, 6/2
    # " dd"         6       2           2      2    cheapest per character: 6/2, then 4/1, 5/1, 7/1
    # " 日"         5       2           1      3    cheapest per byte: 5/3, then 7/3, 6/2, 4/1
    rows = [dict(ctx="So", endings=["a", "€", "dd", "日"], label=label) for label in (0, 0, 0, 1, 1, 2)]
    read = read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), 0, nothing)
    result = evaluate(raw, prepare(read, tokenizer, "completion", 64, nothing), AMP, ALONE)
    assert result.sums == pytest.approx(np.array([[4, 7, 6, 5]] * 6) * -math.log(4), rel=1e-5)
    assert {way: set(pick) for way, pick in result.picks.items()} == dict(zip(WAYS, ({0}, {1}, {2}, {3})))
    assert list(result.accuracy.values()) == [3 / 6, 2 / 6, 1 / 6, 0]
    assert result.error["sum"] == pytest.approx(math.sqrt(0.25 / 6)) and result.error["per byte"] == 0


def test_the_first_of_equals_is_picked(tmp_path: Path) -> None:
    rows = [dict(ctx="So", endings=["x", "a", "a", "x"], label=1)]
    raw = Prices({ord(" "): 1, ord("a"): 2, ord("x"): 3}, 257)
    result = evaluate(raw, questions_of(rows, tmp_path), AMP, ALONE)
    assert {way: pick.tolist() for way, pick in result.picks.items()} == dict.fromkeys(WAYS, [1])


# -----------------------------------------------------------------------------
# Batches, order, ranks


def test_the_batch_does_not_matter(tmp_path: Path) -> None:
    raw, questions = model(), questions_of(make_rows(40), tmp_path)
    results = [evaluate(raw, questions, AMP, ALONE, n_tokens=n) for n in (1, 3000, 10**9)]
    for result in results[1:]:
        assert np.abs(result.sums - results[0].sums).max() < 1e-4
        assert result.accuracy == results[0].accuracy
        assert all((result.picks[way] == results[0].picks[way]).all() for way in WAYS)


def test_a_batch_holds_to_its_budget(tmp_path: Path) -> None:
    questions = questions_of(make_rows(60), tmp_path)
    batches = hellaswag.split_batches(questions.packed, 600)
    assert [id(p) for _, batch in batches for p in batch] == [id(p) for p in questions.packed]
    assert len(batches) > 5 and len({T for T, _ in batches}) < len(batches)
    for T, batch in batches:
        assert T % 8 == 0 and max(len(p.tokens) for p in batch) <= T < max(len(p.tokens) for p in batch) + 8
        assert len(batch) * T <= 600 or len(batch) == 1


def test_the_head_sees_the_endings_only_and_a_few_rows_at_a_time(tmp_path: Path) -> None:
    raw, questions, seen = model(), questions_of(make_rows(40), tmp_path), []
    raw.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape))
    evaluate(raw, questions, AMP, ALONE, n_tokens=10**9)
    assert sum(n for n, _ in seen) == questions.length["per token"].sum() and max(n for n, _ in seen) <= 2**7


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    rows, raw = make_rows(20), model()
    rows += [row | dict(ctx=row["ctx"][::-1]) for row in rows]  # of the same lengths
    order = random.Random(1).sample(range(40), 40)
    straight = questions_of(rows, tmp_path)
    mixed = questions_of([rows[i] for i in order], tmp_path)
    assert [p.tokens.tolist() for p in mixed.packed] == [p.tokens.tolist() for p in straight.packed]
    a, b = (evaluate(raw, questions, AMP, ALONE, n_tokens=3000) for questions in (straight, mixed))
    assert (b.sums == a.sums[order]).all() and b.accuracy == a.accuracy


@pytest.mark.parametrize("n_rows, world_size", [(40, 2), (40, 3), (1, 2), (3, 50)])
def test_ranks_share_the_work_exactly(n_rows: int, world_size: int, tmp_path: Path, monkeypatch: Any) -> None:
    raw, questions = model(), questions_of(make_rows(n_rows), tmp_path, block_size=90)
    alone, parts = evaluate(raw, questions, AMP, ALONE, n_tokens=1000), []

    def total(x: Tensor, dist: Dist) -> Tensor:
        parts.append(x.clone())
        return x

    monkeypatch.setattr(hellaswag, "total", total)
    for rank in range(world_size):
        evaluate(raw, questions, AMP, Dist(rank, world_size, ALONE.device), n_tokens=1000)
    assert (sum(parts).numpy().reshape(-1, 4) == alone.sums).all()
    assert ((torch.stack(parts) != 0).sum(0) == 1).all()  # no sum is computed twice


def save_model(folder: Path, raw: GPT, tokenizer: str = "bytes") -> Path:
    """The model as a checkpoint in a folder of its own."""
    folder.mkdir()
    state = dict(step=7, model=raw.state_dict(), model_config=asdict(raw.config), tokenizer=tokenizer)
    save_checkpoint(folder, state, keep=1)
    return folder


def test_two_processes_write_what_one_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, run = write_jsonl(tmp_path / "rows.jsonl", make_rows(25)), save_model(tmp_path / "run", model())
    main(Config(checkpoint=str(run), data=str(data), out=str(tmp_path / "one.jsonl"), device="cpu"))
    printed = capsys.readouterr().out.splitlines()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [f"--checkpoint={run}", f"--data={data}", f"--out={tmp_path / 'two.jsonl'}", "--device=cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run([*launch, "hellaswag.py", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    lines = [line for line in two.stdout.splitlines() if "Gloo" not in line]
    assert lines == printed  # once, not once a rank


# -----------------------------------------------------------------------------
# Words and tokens


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("plain", "plain"),
        ("  spaces around ", "spaces around"),
        ("[header] How to go [title] Stand up. [step] Walk", " How to go. Stand up. Walk"),
        ("ends with [step]", "ends with "),  # stripped before, not after
        ("[substeps] Go", " Go"),
        ("two  three   four    ", "two three  four"),
        ("a [b] [c] d", "a  d"),  # three spaces became two
        ("open [ bracket", "open [ bracket"),
        ("a [x\ny] b", "a [x\ny] b"),  # `.` stops at line ends
        ("Où est la forêt ? [title] Là", "Où est la forêt ?. Là"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def words_of(style: str, tmp_path: Path, **fields: object) -> tuple[str, list[str]]:
    """A row's context and endings in the words of a style."""
    row = dict(ctx="He sits. then he", endings=["a", "b [x]", "c  d", "ß"], label=1) | fields
    (read,) = read_rows(write_jsonl(tmp_path / "rows.jsonl", [row]), 0, nothing)
    return hellaswag.texts(read, style)


def test_the_words_of_both_styles(tmp_path: Path) -> None:
    assert words_of("completion", tmp_path) == ("He sits. then he", ["a", "b [x]", "c  d", "ß"])
    fields = dict(activity_label="Sitting", ctx_a="He sits.", ctx_b="then HE")
    context, endings = words_of("harness", tmp_path, **fields)
    assert context == "Sitting: He sits. Then he"  # str.capitalize also lowers the rest
    assert endings == ["a", "b ", "c d", "ß"]
    assert words_of("harness", tmp_path, **(fields | dict(ctx_b="")))[0] == "Sitting: He sits."
    assert words_of("harness", tmp_path, **(fields | dict(ctx_b="ÉTÉ")))[0] == "Sitting: He sits. Été"


def test_harness_style_without_ctx_a_and_ctx_b(tmp_path: Path) -> None:
    assert words_of("harness", tmp_path, activity_label="Sitting")[0] == "Sitting: He sits. then he"
    rows = [dict(ctx="c", activity_label="x", endings=list("abcd"), label=0)] * 3
    read, said = read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), 0, nothing), []
    prepare(read, get_tokenizer("bytes"), "harness", 64, said.append)
    assert len(said) == 1 and said[0].startswith("3 rows have no ctx_a and ctx_b")
    said.clear()
    prepare(read, get_tokenizer("bytes"), "completion", 64, said.append)
    assert said == []


def test_tokens_of_both_styles() -> None:
    tokenizer = get_tokenizer("bytes")
    assert encode("ab ", ["c"], "completion", tokenizer) == ([*b"ab "], [[*b" c"]])
    assert encode("ab ", ["c", "d "], "harness", tokenizer) == ([*b"ab"], [[*b"  c"], [*b"  d "]])
    assert encode("", ["c"], "completion", tokenizer) == ([256], [[*b" c"]])
    # a token across the border: what the context alone makes one token is counted to the context
    ranks = {bytes([i]): i for i in range(256)} | {b"b ": 256}
    merging = tiktoken.Encoding("toy", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={EOT: 257})
    assert encode("ab", ["c"], "completion", merging) == ([*b"ab"], [[*b" c"]])
    assert encode("ab", ["cd"], "harness", merging) == ([*b"ab"], [[*b"cd"]])  # a|b |c|d, less two


def test_a_long_row_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    rows = [dict(ctx="c" * 20, endings=["a" * 3, "b" * 30, "c" * 100, "d"], label=0)]
    rows += [dict(ctx="c" * 20, endings=["a" * 3, "b" * 10, "c" * 12, "d"], label=0)]  # 20 + 13 = 32 + 1
    read, said = read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), 0, nothing), []
    questions = prepare(read, get_tokenizer("bytes"), "completion", 32, said.append)
    assert said == ["1 rows exceed the model's 32 tokens: their contexts lost the beginning"]
    assert len(questions.packed) == 5
    assert questions.length["per token"].tolist() == [[4, 31, 32, 2], [4, 11, 13, 2]]
    for p in questions.packed:
        assert p.pos.max() < 32


# -----------------------------------------------------------------------------
# What users get wrong


GOOD = dict(activity_label="x", ctx_a="a", ctx_b="b", ctx="a b", endings=["a", "b", "c", "d"], label=2)


def score(
    rows: list[Any], tmp_path: Path, style: str = "completion", limit: int = 0
) -> tuple[Questions, list[str]]:
    """What becomes of rows, and what is said about them."""
    said: list[str] = []
    read = read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), limit, said.append)
    return prepare(read, get_tokenizer("bytes"), style, 64, said.append), said


@pytest.mark.parametrize(
    "style, changes, message",
    [
        ("completion", dict(endings=["a", "b", "c"]), "expected 4 endings, found 3"),
        ("completion", dict(endings=["a", "b", "c", "d", "e"]), "expected 4 endings, found 5"),
        ("completion", dict(endings="abcd"), "expected 4 endings, found no list"),
        ("completion", dict(endings=None), "expected 4 endings, found no list"),
        ("completion", dict(endings=["a", "b", "", "d"]), "ending 2 has no text: ''"),
        ("completion", dict(endings=["a", " \n", "c", "d"]), "ending 1 has no text"),
        ("completion", dict(endings=["a", "b", "c", 4]), "ending 3 has no text: 4"),
        ("completion", dict(label=4), "the label 4 is none of 0 … 3"),
        ("completion", dict(label=-1), "the label -1"),
        ("completion", dict(label="x"), "the label 'x'"),
        ("completion", dict(label="-1"), "the label '-1'"),
        ("completion", dict(label=1.0), "the label 1.0"),
        ("completion", dict(label=True), "the label True"),
        ("completion", dict(ctx=None), "completion style needs a text in the field 'ctx'"),
        ("completion", dict(ctx=["a"]), "the field 'ctx'"),
        ("harness", dict(activity_label=None), "harness style needs a text in the field 'activity_label'"),
        ("harness", dict(ctx_a=None), "the field 'ctx_a'"),
        ("harness", dict(ctx_b=3), "the field 'ctx_b'"),
        ("harness", dict(endings=["a", "[step]", "c", "d"]), "an ending has no text behind its markup"),
    ],
)
def test_a_bad_row_is_named(style: str, changes: dict, message: str, tmp_path: Path) -> None:
    row = {name: value for name, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(SystemExit) as error:
        score([GOOD, GOOD, row], tmp_path, style)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:3") and message in str(error.value)


def test_an_ending_without_tokens_is_named(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"b ": 256, b"b x": 257}
    merging = tiktoken.Encoding("toy", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={EOT: 258})
    row = GOOD | dict(activity_label="a", ctx_a="abb", ctx_b="", endings=["x", "y", "z", "w"])
    read = read_rows(write_jsonl(tmp_path / "rows.jsonl", [GOOD, row]), 0, nothing)
    context, tails = encode("abb", ["x"], "harness", merging)
    assert len(context) == 3 and tails == [[]]
    with pytest.raises(SystemExit, match="rows.jsonl:2: ending 0 has no tokens"):
        prepare(read, merging, "harness", 64, nothing)


def test_labels_as_text_and_rows_without_label(tmp_path: Path) -> None:
    bare = {name: value for name, value in GOOD.items() if name != "label"}
    labels = ["3", "", 1, None, " 0 "]
    questions, said = score([GOOD | dict(label=label) for label in labels] + [bare], tmp_path)
    assert questions.label.tolist() == [3, 1, 0] and questions.index.tolist() == [0, 2, 4]
    assert said == [f"{tmp_path / 'rows.jsonl'}: left out 3 rows without a label"]
    questions, said = score([GOOD | dict(label=label) for label in labels], tmp_path, limit=2)
    assert questions.index.tolist() == [0, 2] and "left out 1 rows" in said[0]
    with pytest.raises(SystemExit, match="none of the 2 rows of .* has a label"):
        score([bare, GOOD | dict(label="")], tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "none of the 0 rows"),
        (json.dumps(GOOD).encode()[:-20], "rows.jsonl:1 is not JSON .* is the file whole"),
        (json.dumps(GOOD).encode() + b"\n\n[1, 2]\n", "rows.jsonl:3 is not an object"),
        (b"\xff\xfe\x00", "cannot read rows from .*rows.jsonl"),
    ],
)
def test_a_bad_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        read_rows(tmp_path / "rows.jsonl", 0, nothing)
    with pytest.raises(SystemExit, match="cannot read rows from .*nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl", 0, nothing)


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path: Path) -> None:
    row = GOOD | dict(ctx="one\u2028two\x85three")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert len(read_rows(tmp_path / "rows.jsonl", 0, nothing)) == 1


# -----------------------------------------------------------------------------
# Download


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: Any) -> Iterator[Callable]:
    """serve(body, sent=…, status=…, length=…): a server that sends the first `sent` bytes and hangs up."""
    answer: dict[str, Any] = {}
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(answer["status"])
            if answer["length"]:
                self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"][: answer["sent"]])

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    monkeypatch.setattr(hellaswag, "DOWNLOADED", tmp_path / "cache" / "hellaswag" / "val.jsonl")
    monkeypatch.setattr(hellaswag, "N_ROWS", 50)

    def start(body: bytes, sent: int | None = None, status: int = 200, length: bool = True) -> list[str]:
        answer.update(body=body, sent=sent, status=status, length=length)
        return requests

    yield start
    server.shutdown()
    server.server_close()


def body_of(n: int) -> bytes:
    """A file of n rows."""
    return "".join(json.dumps(row) + "\n" for row in make_rows(n)).encode()


def test_the_rows_are_downloaded_once(serve: Callable) -> None:
    requests = serve(body_of(50))
    for _ in range(2):
        path = hellaswag.find_rows("", ALONE)
        assert path.read_bytes() == body_of(50) and os.listdir(path.parent) == ["val.jsonl"]
    assert requests == ["/val.jsonl"]
    assert len(read_rows(path, 0, nothing)) == 50


@pytest.mark.parametrize(
    "answer, message",
    [
        (dict(sent=9000), "cannot download http://127.*val.jsonl"),  # the connection breaks
        (dict(sent=9000, length=False), "sent .* of 50 rows: try again"),  # it breaks, and nobody can tell
        (dict(status=404), "cannot download .*HTTPError"),
    ],
)
def test_half_a_download_never_counts(serve: Callable, answer: dict, message: str) -> None:
    serve(body_of(50), **answer)
    with pytest.raises(SystemExit, match=message) as error:
        hellaswag.find_rows("", ALONE)
    assert str(hellaswag.DOWNLOADED) in str(error.value) and "--data=" in str(error.value)
    assert "\n" not in str(error.value) and os.listdir(hellaswag.DOWNLOADED.parent) == []
    serve(body_of(50))
    assert hellaswag.find_rows("", ALONE).read_bytes() == body_of(50)


def test_no_network(serve: Callable, monkeypatch: Any) -> None:
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/val.jsonl")
    with pytest.raises(
        SystemExit, match="cannot download http://127.0.0.1:9/val.jsonl .ConnectionError.*--data="
    ):
        hellaswag.find_rows("", ALONE)
    assert not hellaswag.DOWNLOADED.exists()


def test_a_file_put_there_by_hand_is_checked(serve: Callable) -> None:
    hellaswag.DOWNLOADED.parent.mkdir(parents=True)
    hellaswag.DOWNLOADED.write_bytes(body_of(50)[:-30])
    with pytest.raises(SystemExit, match="val.jsonl has 49 of 50 rows: remove it"):
        hellaswag.find_rows("", ALONE)
    hellaswag.DOWNLOADED.write_bytes(body_of(50).rstrip())  # whole, without the last line's end
    assert hellaswag.find_rows("", ALONE) == hellaswag.DOWNLOADED


# -----------------------------------------------------------------------------
# Command line


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = make_rows(12)
    rows[3]["label"] = ""
    data, raw = write_jsonl(tmp_path / "rows.jsonl", rows), model(block_size=512)
    run, out = save_model(tmp_path / "run", raw), tmp_path / "out.jsonl"
    args = ["demo", f"--checkpoint={run}", f"--data={data}", f"--out={out}", "--limit=10", "--style=harness"]
    main(parse(CONFIGS, hellaswag.__doc__, [*args, "--device=cpu", "--precision=fp32"]))
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    kept = [rows[line["index"]] for line in lines]
    assert (
        np.abs(
            [line["sums"] for line in lines] - plain_sums(raw, kept, "harness", get_tokenizer("bytes"))
        ).max()
        < 1e-4
    )
    for line, row in zip(lines, kept):
        endings = plain_text(row, "harness")[1]
        assert line["label"] == row["label"]
        assert line["n_chars"] == [len(e) for e in endings]
        assert line["n_bytes"] == [len(e.encode()) for e in endings]
        best = max(range(4), key=lambda i: line["sums"][i] / line["n_chars"][i])
        assert line["predictions"]["per character"] == best and list(line["predictions"]) == WAYS
    right = sum(line["predictions"]["per byte"] == line["label"] for line in lines)
    assert "left out 1 rows without a label" in printed and "10 rows of" in printed
    assert "per character (acc_norm)" in printed and "GPT-2" not in printed  # these are not HellaSwag's rows
    assert (
        f"{right / 10:.4f} ± {math.sqrt(right / 10 * (1 - right / 10) / 10):.4f}" in printed.splitlines()[-1]
    )


def test_published_figures_are_of_the_same_style() -> None:
    result = Result(np.zeros((1, 4)), {}, dict.fromkeys(WAYS, 0.25), dict.fromkeys(WAYS, 0.0046))
    completion = hellaswag.table("us", result, "completion", published=True).splitlines()
    assert "per token (acc_norm)" in completion[0] and len({len(line) for line in completion}) == 1
    assert completion[1].split() == ["us", *["0.2500", "±", "0.0046"] * 4]
    assert completion[2].split() == ["GPT-2", "124M", "0.2859", "0.2955", "-", "-"]
    assert completion[3].split() == ["GPT-3", "124M", "-", "0.3370", "-", "-"]
    harness = hellaswag.table("us", result, "harness", published=True).splitlines()
    assert harness[2].split() == ["GPT-2", "124M", "0.2892", "-", "0.3114", "-"] and len(harness) == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(limit=-1), "limit=-1 must be 0"),
        (dict(out="nowhere/rows.jsonl"), "cannot write nowhere/rows.jsonl: there is no folder nowhere"),
        (dict(checkpoint="nowhere"), "no checkpoint in nowhere"),
        (dict(data="nowhere.jsonl"), "cannot read rows from nowhere.jsonl"),
        (dict(hf="/nowhere/at/all"), "cannot load '/nowhere/at/all'"),
    ],
)
def test_bad_constants(changes: dict, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = dict(checkpoint=str(save_model(tmp_path / "run", model())), device="cpu")
    cfg["data"] = str(write_jsonl(tmp_path / "rows.jsonl", make_rows(2)))
    with pytest.raises(SystemExit, match=message):
        main(Config(**(cfg | changes)))


def test_a_model_of_nothing_is_refused(tmp_path: Path) -> None:
    raw = model()
    raw.transformer.ln_f.weight.data[0] = math.nan
    data, run = write_jsonl(tmp_path / "rows.jsonl", make_rows(2)), save_model(tmp_path / "run", raw)
    with pytest.raises(SystemExit, match="not finite"):
        main(Config(checkpoint=str(run), data=str(data), device="cpu"))


def test_hf_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = model(block_size=512)
    to_hf(raw, tmp_path / "hf")
    data, run = write_jsonl(tmp_path / "rows.jsonl", make_rows(8)), save_model(tmp_path / "run", raw)
    for name, cfg in dict(a=dict(hf=str(tmp_path / "hf")), b=dict(checkpoint=str(run))).items():
        main(Config(**cfg, data=str(data), out=str(tmp_path / name), device="cpu"))
    # the export has no padded ids, and gives the same numbers
    a, b = (np.array([json.loads(line)["sums"] for line in (tmp_path / n).open()]) for n in "ab")
    assert np.abs(a - b).max() < 1e-4


def test_demo_configuration() -> None:
    demo = CONFIGS["demo"]
    assert demo.checkpoint == "out/demo" and Path(demo.data) == ROOT / "demo" / "hellaswag.jsonl"
    if Path(demo.data).exists():  # every row fits into the demo's model
        said: list[str] = []
        rows = read_rows(demo.data, 0, said.append)
        prepare(rows, get_tokenizer("bytes"), "completion", 256, said.append)
        assert len(rows) >= 200 and said == []
