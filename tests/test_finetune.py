"""Rows, masks, batches, packing and answers: what sft.py and dpo.py learn from."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

import finetune
from data import get_tokenizer, prompt_text
from finetune import (
    Example,
    Row,
    collate,
    encode_prompt,
    forward,
    greedy_answers,
    make_example,
    pack,
    read_rows,
    score_answers,
    share,
    split_rows,
    step_examples,
    text_fields,
)
from model import GPT, GPTConfig
from sft import bins_of, measure, prepare
from training import Dist, Log, autocast, train_step

CPU = torch.device("cpu")
ALONE = Dist(0, 1, CPU)
BYTES = get_tokenizer("bytes")


@pytest.fixture(params=["bytes", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    """Both tokenizers, or a skipped test."""
    try:
        return get_tokenizer(request.param)
    except SystemExit as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {error}")


def targets_of(batch: dict[str, Any], row: int = 0) -> list[int]:
    """What is to be predicted in a row of a batch."""
    return [y for y in batch["y"][row].tolist() if y != -100]


# -----------------------------------------------------------------------------
# Masks


def test_masks_by_hand() -> None:
    """ "Q" -> "ab" with bytes: the whole template stands before the only three targets."""
    prompt = encode_prompt("Q", "", 100, BYTES)
    assert bytes(prompt) == b"Q\nResponse:\n"
    example = make_example(prompt, "ab", 100, BYTES)
    assert example.ids.tolist() == [*b"Q\nResponse:\n", *b"ab", 256]
    batch = collate([[example]], CPU)
    assert batch["x"].tolist() == [[*b"Q\nResponse:\n", *b"ab"]]
    assert batch["y"].tolist() == [[-100] * 11 + [*b"ab", 256]]
    assert batch["n"] == 3 and "pos" not in batch and "mask" not in batch

    with_context = encode_prompt("Q", "C", 100, BYTES)
    assert bytes(with_context) == b"Q\nContext:\nC\nResponse:\n"


RESPONSES = [
    "yes",
    "\nyes",
    "\n\n\nyes\n",
    " yes",
    "\t\n ja — 日本語 🦊",
    "Response:\nno",
    "<|endoftext|>",
    "\n",
]


@pytest.mark.parametrize("response", RESPONSES, ids=repr)
@pytest.mark.parametrize("context", ["", "Rosa has a hat.\nLeo sleeps."])
def test_the_response_and_its_end_are_the_targets_and_nothing_else(
    tokenizer: tiktoken.Encoding, context: str, response: str
) -> None:
    prompt = encode_prompt("Who has the hat?", context, 1000, tokenizer)
    before = tokenizer.encode(prompt_text("Who has the hat?", context), disallowed_special=())
    after = tokenizer.encode(response, disallowed_special=())  # "<|endoftext|>" spelled out is text
    example = make_example(prompt, response, 1000, tokenizer)
    other = make_example(encode_prompt("a", "", 1000, tokenizer), "b" * 200, 1000, tokenizer)  # pads the row
    batch = collate([[example], [other]], CPU)
    x, y = batch["x"][0].tolist(), batch["y"][0].tolist()
    n = len(before) + len(after)
    assert x[:n] == before + after
    assert y[: len(before) - 1] == [-100] * (len(before) - 1)
    assert y[len(before) - 1 : n] == [*after, tokenizer.eot_token]
    assert y[n:] == [-100] * (len(y) - n) and len(y) > n
    assert tokenizer.decode(y[len(before) - 1 : n - 1]) == response
    assert batch["n"] == len(after) + 1 + len(targets_of(batch, 1))


def test_padding_and_masked_targets_reach_no_loss() -> None:
    """The summed loss against one made of single predictions, each from the bare text before it."""
    torch.manual_seed(0)
    raw = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, n_tokens=257, vocab_size=320)).double()
    rows = [("Q", "ab"), ("longer question", "\nc"), ("q", "a longer response")]
    examples = [make_example(encode_prompt(q, "", 64, BYTES), a, 64, BYTES) for q, a in rows]
    batch = collate([[e] for e in examples], CPU)
    expected = 0.0
    for question, answer in rows:
        ids = [*f"{question}\nResponse:\n".encode(), *answer.encode(), 256]
        for at in range(len(ids) - len(answer) - 1, len(ids)):
            logits = raw(torch.tensor([ids[:at]]))[0][0, -1]
            expected += F.cross_entropy(logits[None], torch.tensor([ids[at]])).item()
    assert forward(raw, batch, "sum")[1].item() == pytest.approx(expected, rel=1e-12)


# -----------------------------------------------------------------------------
# What is too long


def prepared(rows: Sequence[Row], T: int, tokenizer: tiktoken.Encoding, folder: Path) -> tuple[list, str]:
    """The examples of rows, and what was noted on the way."""
    folder.mkdir(exist_ok=True)
    log = Log(folder, ALONE)
    examples = prepare(rows, T, tokenizer, "rows.jsonl", log)
    log.file.close()
    return examples, (folder / "log.txt").read_text()


def test_the_context_is_cut_first_and_the_response_stays(
    tokenizer: tiktoken.Encoding, tmp_path: Path
) -> None:
    context = " ".join(f"Ada met Leo {i} times." for i in range(100))
    response = "\nThey met often, and then they went home."
    n_response = len(tokenizer.encode(response)) + 1
    for T in (90, 91, 127, 200):
        (example,), noted = prepared([Row("Who met?", context, response)], T, tokenizer, tmp_path)
        ids = example.ids.tolist()
        assert T - 3 <= len(ids) - 1 <= T  # retokenised, a cut word may become shorter
        assert ids[example.n_prompt :] == [*tokenizer.encode(response), tokenizer.eot_token]
        head, kept, tail = tokenizer.decode(ids[: example.n_prompt]).partition("Context:\n")
        assert head == "Who met?\n" and tail.endswith("\nResponse:\n")
        kept = tail.removesuffix("\nResponse:\n")
        assert kept and context.startswith(kept)
        assert len(collate([[example]], CPU)["x"][0]) <= T and len(ids) - example.n_prompt == n_response
        assert "cut" not in noted and "dropped" not in noted


def test_cutting_with_bytes_is_exact() -> None:
    for room in range(24, 40):
        prompt = encode_prompt("Q", "abcdefghijklmnop", room, BYTES)
        kept = max(0, min(16, room - len(b"Q\nContext:\n\nResponse:\n")))
        assert bytes(prompt).decode() == prompt_text("Q", "abcdefghijklmnop"[:kept])
    assert bytes(encode_prompt("Q", "abc", 5, BYTES)) == b"Q\nResponse:\n"  # the context is all that goes


@pytest.mark.parametrize("room", range(22, 60))
def test_cutting_leaves_no_half_character(tokenizer: tiktoken.Encoding, room: int) -> None:
    context = "日本語🦊é" * 20
    prompt = encode_prompt("Q", context, room, tokenizer)
    text = tokenizer.decode(prompt, errors="strict")
    assert len(prompt) <= room and "\ufffd" not in text
    cut = text.removeprefix("Q\n").removesuffix("Response:\n").removeprefix("Context:\n").removesuffix("\n")
    assert context.startswith(cut) and prompt == tokenizer.encode(prompt_text("Q", cut))


def test_a_long_response_loses_its_tail_and_gets_no_false_end(
    tokenizer: tiktoken.Encoding, tmp_path: Path
) -> None:
    response = " ".join(f"word{i}" for i in range(200))
    n_prompt = len(tokenizer.encode(prompt_text("Tell me.")))
    for T in (n_prompt, n_prompt + 1, 50):
        (example,), noted = prepared([Row("Tell me.", "a context", response)], T, tokenizer, tmp_path)
        assert len(example.ids) == T + 1
        learned = example.ids[example.n_prompt :].tolist()
        assert learned == tokenizer.encode(response)[: T + 1 - n_prompt]
        assert tokenizer.eot_token not in example.ids
        batch = collate([[example]], CPU)
        assert targets_of(batch) == learned and batch["x"].size(1) == T
        assert f"rows.jsonl: 1 responses cut to fit into T={T} tokens" in noted


def test_the_end_is_learned_as_long_as_it_fits(tmp_path: Path) -> None:
    n_prompt = len(b"Q\nResponse:\n")
    for T, ended in ((n_prompt + 4, False), (n_prompt + 5, True), (n_prompt + 6, True)):
        (example,), noted = prepared([Row("Q", "", "abcde")], T, BYTES, tmp_path / str(T))
        assert (example.ids[-1] == 256) == ended == ("cut" not in noted)


def test_prompts_that_do_not_fit_are_dropped_and_counted(
    tokenizer: tiktoken.Encoding, tmp_path: Path
) -> None:
    long = Row("word " * 300, "context", "response")
    n = len(tokenizer.encode(prompt_text(long.instruction)))
    rows = [long, Row("Q", "", "A"), long]
    examples, noted = prepared(rows, n - 1, tokenizer, tmp_path)
    assert len(examples) == 1 and f"2 rows dropped: prompts longer than T={n - 1} tokens" in noted
    examples, _ = prepared(rows, n, tokenizer, tmp_path)  # one target is left
    assert [len(targets_of(collate([[e]], CPU))) for e in examples[::2]] == [1, 1]
    with pytest.raises(SystemExit, match="no row of rows.jsonl is left to learn from"):
        prepared([long], 40, tokenizer, tmp_path)


# -----------------------------------------------------------------------------
# Batches, packed or not, whatever the split

ROWS = [
    Row("Who has the hat?", "Rosa has the hat.", "Rosa."),
    Row("Where is Leo?", "", "\nIn the garden, and he sleeps there."),
    Row("Q", "", "A"),
    Row("Name three colours.", "", "red\ngreen\nblue"),
    Row("What does Ada like?", "Ada likes soup. Leo likes bread.", "Soup"),
    Row("Why?", "", "Because it was cold, and nobody had a coat to wear that night."),
    Row("A longer question that stands here so that lengths differ a lot?", "", "no"),
]
T = 160


def examples_of(rows: Sequence[Row] = ROWS) -> list[Example]:
    """The rows' examples, with bytes."""
    made = [
        make_example(encode_prompt(r.instruction, r.context, T, BYTES), r.response, T, BYTES) for r in rows
    ]
    return [example for example in made if example]


def random_model(attention: str = "flash") -> GPT:
    """A small model in float64 whose positions and tokens matter."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=T, n_tokens=257, vocab_size=320)
    raw = GPT(GPTConfig(**shape, attention=attention)).double()
    with torch.no_grad():
        for p in raw.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return raw


def gradient(raw: GPT) -> Tensor:
    """All gradients in one vector; none are left behind."""
    grads = torch.cat([p.grad.flatten() for p in raw.parameters()])
    raw.zero_grad()
    return grads


def test_packing_takes_every_example_once_and_no_bin_overflows() -> None:
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(0, 256, n), 1) for n in rng.integers(2, 66, 200)]
    bins = pack(examples, 65)
    assert Counter(id(e) for row in bins for e in row) == Counter(map(id, examples))
    used = [sum(len(e.ids) - 1 for e in row) for row in bins]
    assert max(used) <= 65 and min(used) > 0
    assert sum(used) / (65 * len(bins)) > 0.9  # little padding
    assert len(pack(examples[:1], 65)) == 1
    full = [Example(np.zeros(66, dtype=np.int64), 1)] * 3
    assert [len(row) for row in pack(full, 65)] == [1, 1, 1]


def test_the_longest_is_packed_first_into_the_first_bin_with_room() -> None:
    examples = [Example(np.zeros(n + 1, dtype=np.int64), 1) for n in (3, 4, 6, 7)]  # inputs
    assert [[len(e.ids) - 1 for e in row] for row in pack(examples, 12)] == [[7, 4], [6, 3]]


def test_a_packed_batch_by_hand() -> None:
    a, b = Example(np.array([1, 2, 3, 4]), 2), Example(np.array([5, 6, 7]), 1)
    batch = collate([[a, b], [b]], CPU)
    assert batch["x"].tolist() == [[1, 2, 3, 5, 6], [5, 6, 0, 0, 0]]
    assert batch["y"].tolist() == [[-100, 3, 4, 6, 7], [6, 7, -100, -100, -100]]
    assert batch["pos"][0].tolist() == [0, 1, 2, 0, 1] and batch["pos"][1, :2].tolist() == [0, 1]
    assert batch["n"] == 6
    assert batch["mask"].shape == (2, 1, 5, 5)
    assert batch["mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert batch["mask"].any(-1).all()  # a position that may look nowhere would be NaN


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_packed_logits_equal_those_of_each_text_alone(attention: str) -> None:
    raw = random_model(attention)
    examples = examples_of()
    bins = pack(examples, T)
    assert len(bins) < len(examples) and max(map(len, bins)) >= 3
    with torch.no_grad():
        logits, _ = forward(raw, collate(bins, CPU), "sum")
        for row, packed in zip(bins, logits):
            at = 0
            for example in row:
                alone, _ = raw(torch.from_numpy(example.ids[None, :-1]))
                torch.testing.assert_close(packed[at : at + alone.size(1)], alone[0], rtol=0, atol=1e-12)
                at += alone.size(1)


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_packed_loss_and_gradients_equal_unpacked(attention: str) -> None:
    raw = random_model(attention)
    results = []
    for packing in (False, True):
        batch = collate(bins_of(examples_of(), T, packing), CPU)
        loss = forward(raw, batch, "sum")[1]
        loss.backward()
        results.append((batch["n"], loss.item(), gradient(raw)))
    (n, loss, grads), (n_packed, loss_packed, grads_packed) = results
    assert n == n_packed == sum(len(e.ids) - e.n_prompt for e in examples_of())
    assert loss_packed == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(grads_packed, grads, rtol=0, atol=1e-11)
    assert grads.abs().max() > 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("B", [1, 2, 3, 8])
def test_every_split_gives_the_gradient_of_one_big_batch(B: int, n_ranks: int, packing: bool) -> None:
    raw = random_model()
    big = collate([[e] for e in examples_of()], CPU)
    (forward(raw, big, "sum")[1] / big["n"]).backward()
    expected = gradient(raw)

    bins = bins_of(examples_of(), T, packing)
    n, n_micro_batches = 0, set()
    for rank in range(n_ranks):  # gradients are summed over ranks and micro-batches, as train_step does
        batches = [collate(part, CPU) for part in share(bins, B, Dist(rank, n_ranks, CPU))]
        n_micro_batches.add(len(batches))
        assert all(len(batch["x"]) <= B for batch in batches)
        for batch in batches:
            forward(raw, batch, "sum")[1].backward()
            n += batch["n"]
    assert n == big["n"]
    assert len(n_micro_batches) == 1  # a rank with fewer would wait for the others for ever
    torch.testing.assert_close(gradient(raw) / n, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packing", [False, True])
def test_a_training_step_in_any_micro_batches_is_the_same(packing: bool) -> None:
    results = []
    for B in (1, 2, 3, 8):
        raw = random_model()
        sgd = torch.optim.SGD(raw.parameters(), fused=True)
        batches = [collate(part, CPU) for part in share(bins_of(examples_of(), T, packing), B, ALONE)]
        before = torch.cat([p.detach().clone().flatten() for p in raw.parameters()])
        out = train_step(
            raw, [sgd], batches, lambda m, b: forward(m, b, "sum")[1], lr=1.0, grad_clip=0, dist=ALONE
        )()
        moved = before - torch.cat([p.detach().flatten() for p in raw.parameters()])
        results.append((out.loss, moved))
    for loss, moved in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)  # summed in float32
        torch.testing.assert_close(moved, results[0][1], rtol=0, atol=1e-12)


def test_the_held_out_loss_is_the_same_for_any_split(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, examples = random_model(), examples_of()
    batch = collate([[e] for e in examples], CPU)
    logits, loss = forward(raw, batch, "sum")
    hits = int((logits[..., :257].argmax(-1) == batch["y"]).sum())
    amp = autocast("fp32", CPU)
    for B in (1, 3, 8):
        got, accuracy = measure(raw, examples, B, amp, ALONE)
        assert got == pytest.approx(loss.item() / batch["n"], rel=1e-6)
        assert accuracy == pytest.approx(hits / batch["n"])
    sums = []  # what two ranks would add up
    monkeypatch.setattr("sft.total", lambda x, dist: sums.append(x) or torch.ones(3))
    for rank in range(2):
        measure(raw, examples, 2, amp, Dist(rank, 2, CPU))
    total = sum(sums).tolist()
    assert total == pytest.approx([loss.item(), hits, batch["n"]], rel=1e-6)


def test_every_epoch_has_every_row_once() -> None:
    examples = list(range(10))
    seen = [row for step in range(10) for row in step_examples(examples, step, 3, seed=1)]
    epochs = [seen[at : at + 10] for at in (0, 10, 20)]
    assert all(sorted(epoch) == examples for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert seen != [row for step in range(10) for row in step_examples(examples, step, 3, seed=2)]


# -----------------------------------------------------------------------------
# Held-out rows


def test_no_prompt_stands_on_both_sides() -> None:
    rng = random.Random(0)
    prompts = [f"question {rng.randrange(60)}" for _ in range(300)]
    splits = set()
    for seed in range(20):
        for fraction in (0.01, 0.1, 0.5):
            train, held_out = split_rows(prompts, fraction, seed)
            assert sorted(train + held_out) == list(range(300))
            asked, kept = {prompts[i] for i in train}, {prompts[i] for i in held_out}
            assert asked and kept and not asked & kept
            assert len(kept) == max(1, round(fraction * len(set(prompts))))
            assert (train, held_out) == split_rows(prompts, fraction, seed)
        splits.add(tuple(held_out))
    assert len(splits) == 20


@pytest.mark.parametrize("fraction", [0, 0.03, 0.999, 1, 2])
def test_something_is_left_on_both_sides(fraction: float) -> None:
    train, held_out = split_rows(["a", "b", "a"], fraction, 0)
    assert train and held_out
    assert split_rows(["a", "a"], fraction, 0) == ([0, 1], [])
    assert split_rows([], fraction, 0) == ([], [])


# -----------------------------------------------------------------------------
# Rows


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows in the format of the path's ending; return the path."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_rows_of_every_format(tmp_path: Path, ending: str) -> None:
    noted: list[str] = []
    rows = [
        dict(instruction=" Who? ", context="\nRosa.\n", response="\nRosa ", category="x"),
        dict(instruction="Why?", context=None, response="So\u2028that\x85is it — 日本語", category=None),
        dict(instruction="a", context="", response=" \n", category=""),
        dict(instruction="b", context="", response=None, category=""),
    ]
    got = read_rows(write_rows(tmp_path / f"a.{ending}", rows), ALONE, noted.append)
    # only the prompt is stripped: what is learned is learned as it stands
    assert got == [Row("Who?", "Rosa.", "\nRosa "), Row("Why?", "", "So\u2028that\x85is it — 日本語")]
    assert [text.split(": ", 1)[1] for text in noted] == ["2 of 4 rows dropped: blank responses"]

    rows = [dict(prompt="Who?", response="Rosa")] * 2
    assert (
        read_rows(write_rows(tmp_path / f"b.{ending}", rows), ALONE, noted.append)
        == [Row("Who?", "", "Rosa")] * 2
    )
    rows = [dict(instruction="Who?", response="Rosa")]
    assert read_rows(write_rows(tmp_path / f"c.{ending}", rows), ALONE, noted.append) == [
        Row("Who?", "", "Rosa")
    ]
    assert len(noted) == 1


def refused(source: str, message: str) -> None:
    """Check that reading rows ends with a message of one line."""
    with pytest.raises(SystemExit, match=message) as error:
        read_rows(source, ALONE, print)
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    good = dict(instruction="a", context="", response="b")
    for name, rows, message in [
        (
            "unknown.jsonl",
            [dict(question="a", answer="b")],
            "has the fields question, answer: expected instr",
        ),
        ("empty.jsonl", [], r"has the fields \(none\): expected"),
        ("nothing.json", [{}], r"has the fields \(none\): expected"),
        (
            "middle.jsonl",
            [good, good, dict(instruction="a", context="")],
            "middle.jsonl, row 3: no field 're",
        ),
        ("number.jsonl", [good, good | dict(response=5)], "number.jsonl, row 2: response is int, not text"),
        ("list.json", [good | dict(context=["a"])], "list.json, row 1: context is list, not text"),
        ("numbers.parquet", [good | dict(instruction=1.5)], "row 1: instruction is float, not text"),
        ("rows.json", ["a", "b"], "does not hold rows with named fields"),
    ]:
        refused(write_rows(tmp_path / name, rows), message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.parquet", "no/folder/a.jsonl"):
        refused(str(tmp_path / name), f"no file .*{name}")
    (tmp_path / "broken.json").write_text('[{"instruction": ')
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"instruct')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "\xe9"}')
    (tmp_path / "object.json").write_text('{"instruction": "a", "response": "b"}')
    (tmp_path / "rows.csv").write_text("instruction,response\na,b\n")
    for name in ("broken.json", "broken.jsonl", "broken.parquet", "latin.jsonl", "object.json", "rows.csv"):
        refused(str(tmp_path / name), f"cannot read the rows of .*{name}")
    refused(str(tmp_path), "cannot read the rows")  # a folder


def test_a_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str, split: str) -> None:
        raise ConnectionError(f"no route\nto {name}, {split}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused("databricks/databricks-dolly-15k", "cannot get databricks/.*no route to .*, train.*local .json")


def test_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [dict(instruction="a", context="", response="b")]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    assert read_rows("some/where", ALONE, print) == [Row("a", "", "b")]


def test_fields_of_text() -> None:
    assert text_fields(dict(a="x", b=None), ("b", "a"), "f", 1) == ["", "x"]
    with pytest.raises(SystemExit, match="f, row 7: no field 'c', only a, b"):
        text_fields(dict(a="x", b=None), ("a", "c"), "f", 7)


# -----------------------------------------------------------------------------
# Answers


class Parrot:
    """Stands for a model: after a prompt of n bytes comes the n-th answer, then end-of-text."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers
        self.batches: list[int] = []  # prompts of every call

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float, stop: int
    ) -> Iterator[list[int | None]]:
        """As sampling.generate: a row that has come to its `stop` yields None."""
        assert temperature == 0 and stop == 256
        self.batches.append(len(prompts))
        texts = [[*self.answers[len(prompt)].encode(), 256] for prompt in prompts]
        for at in range(min(max_new_tokens, max(map(len, texts)))):
            yield [text[at] if at < len(text) else None for text in texts]


def test_answers_end_at_their_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "generate", Parrot.generate)
    parrot: Any = Parrot(["", "a", "lorem ipsum", "", "日本"])
    prompts = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert greedy_answers(parrot, prompts, 8, BYTES) == [
        ("a", True),
        ("lorem ip", False),
        ("", True),
        ("日本", True),  # six bytes and the end
    ]
    assert greedy_answers(parrot, prompts[:1] * 130, 8, BYTES) == [("a", True)] * 130
    assert parrot.batches == [4, 64, 64, 2]
    assert greedy_answers(parrot, [], 8, BYTES) == []
    assert greedy_answers(parrot, prompts[:1], 1, BYTES) == [("a", False)]


def test_greedy_answers_are_the_most_likely_tokens() -> None:
    torch.manual_seed(3)
    raw = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, n_tokens=257, vocab_size=320))
    prompts = [[*b"abc"], [*b"a longer prompt"]]
    for prompt, (answer, ended) in zip(prompts, greedy_answers(raw, prompts, 5, BYTES)):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(raw(torch.tensor([ids]))[0][0, -1, :257].argmax()))
        assert 256 not in ids and not ended
        assert answer == BYTES.decode(ids[len(prompt) :])


def test_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "generate", Parrot.generate)
    parrot: Any = Parrot(
        ["", "Rosa", "Rosa has it", "Rosalie", "Rosa has it and does not come to an end", ""]
    )
    references = ["Rosa", "Rosa", "Rosa", "Rosa has", "Rosa"]
    questions = [([1] * n, reference) for n, reference in enumerate(references, 1)]
    amp = autocast("fp32", CPU)
    score = score_answers(parrot, questions, 12, BYTES, amp, ALONE)
    assert score == pytest.approx((1 / 5, 3 / 5, 4 / 5))  # exact; begins: 1, 2 and 4; ended: all but 4
    # cut exactly behind the reference, without an end: it begins, but is not exact
    score = score_answers(parrot, questions[:1], 4, BYTES, amp, ALONE)
    assert score == (0, 1, 0)
    for n_ranks in (2, 7):  # more ranks than questions: some have none
        sums = []
        monkeypatch.setattr(finetune, "total", lambda x, dist, sums=sums: sums.append(x) or x)
        for rank in range(n_ranks):
            score_answers(parrot, questions, 12, BYTES, amp, Dist(rank, n_ranks, CPU))
        assert sum(sums).tolist() == [1, 3, 4]


def test_a_row_may_leave_out_its_context(tmp_path: Path) -> None:
    rows = [dict(instruction="a", response="b"), dict(instruction="c", context="d", response="e")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(str(path), ALONE, print) == [Row("a", "", "b"), Row("c", "d", "e")]
