"""Rows, masks, truncation, packing, split across ranks, and greedy answers: the data of sft.py and dpo.py."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import harness
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from harness import ALONE, BYTES, tiny_model

from neogpt import chat, finetune, generate, rewards
from neogpt.chat import Row

T = 160


@pytest.fixture(params=["bytes", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return harness.get_tokenizer(request.param)


def write(path: Path, rows: list) -> str:
    """Write rows in the format of the path's suffix; return the path."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) if ".jsonl" in path.name else f"[{','.join(lines)}]"
        with pyarrow.output_stream(path, compression="detect") as file:
            file.write(text.encode("utf-8-sig" if path.suffix == ".json" else "utf-8"))  # with a byte order mark
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "jsonl.gz", "json.zst"])
def test_rows_of_every_format(tmp_path: Path, suffix: str, printed: pytest.LogCaptureFixture) -> None:
    rows = [
        dict(instruction=" Who? ", context="\nRosa.\n", response="\nRosa ", category="x"),
        dict(instruction="Why?", context=None, response="So\u2028that\x85is it — 日本語", category=None),
        dict(instruction="a", context="", response=" \n", category=""),
        dict(instruction="b", context="", response=None, category=""),
    ]
    # prompts are stripped, responses stay as they are
    expected = [Row("Who?", "Rosa.", "\nRosa "), Row("Why?", "", "So\u2028that\x85is it — 日本語")]
    write(tmp_path / f"train.{suffix}", rows)
    write(tmp_path / f"test.{suffix}", rows)
    assert chat.read_rows(str(tmp_path)) == expected
    skipped, dropped, unused = printed.messages
    assert f"not read: test.{suffix}" in skipped
    assert "2 of 4 rows dropped: 2 with a blank response" in dropped and "unused fields: category (1 rows)" in unused
    rows = [dict(instruction="c", context="d", response="e"), dict(instruction="a", response="b")]
    for n in (1, 2):  # the context is optional
        expected = [Row("c", "d", "e"), Row("a", "", "b")][-n:]
        assert chat.read_rows(write(tmp_path / f"{n}.{suffix}", rows[-n:])) == expected
    assert len(printed.messages) == 3


def refused(source: Path | str, *words: str) -> None:
    with harness.error(*words):
        chat.read_rows(str(source))


GOOD = dict(instruction="a", context="", response="b")
UNUSABLE = [("unknown.jsonl", [dict(query="a", result="b")], ["query, result", "instruction", "prompt"])]
UNUSABLE += [("empty.jsonl", [], ["(none)", "instruction"]), ("empty.json", [{}], ["(none)", "instruction"])]
UNUSABLE += [("text.json", ["a", "b"], ["objects"])]
UNREADABLE = {
    "cut.json": b'[{"instruction": ',
    "cut.jsonl": b'{"instruction": "a", "response": "b"}\n{"instruct',
    "damaged.parquet": b"PAR1" + bytes(100),
    "latin.jsonl": b'{"instruction": "\xe9"}',
    "object.json": b'{"instruction": "a", "response": "b"}',
    "table.csv": b"instruction,response\na,b\n",
}


def test_unusable_rows_and_unreadable_files_are_named(tmp_path: Path) -> None:
    for name, rows, words in UNUSABLE:
        refused(write(tmp_path / name, rows), name, *words)
    for name, content in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    for name in [*UNREADABLE, "missing.json", "missing.parquet", "no/folder.jsonl"]:
        refused(tmp_path / name, name)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "expected", ".jsonl")
    refused(tmp_path / "missing.json", "missing.json", "does not exist")


TURNS = [("system", "Be short."), ("system", ""), ("user", "Hi "), ("assistant", " Ho")]
TURNS += [("user", "And?"), ("assistant", "No.")]
CONVERSATION = Row("And?", "", "No.", (("Be short.\n\nHi", " Ho"),))
COMMON = [  # rows of common datasets
    (dict(instruction="Add.", input="1 2", output=3), Row("Add.", "1 2", "3")),
    (dict(prompt=" Add ", completion="3"), Row("Add", "", "3")),
    (dict(instruction="Say", context=float("nan"), response=1.5), Row("Say", "", "1.5")),
    (dict(messages=[dict(role=role, content=text) for role, text in TURNS]), CONVERSATION),
    (dict(conversations=[{"from": dict(user="human").get(r, r), "value": text} for r, text in TURNS]), CONVERSATION),
]
UNUSABLE_TURNS = [
    ([], "without a response"),
    ([dict(role="assistant", content="a")], "without a prompt"),
    ([dict(role="user", content="a"), *[dict(role="assistant", content="b")] * 2], "without a prompt"),
    ([dict(role="robot", content="a")], "unknown role"),
    ([dict(role="user", content=["a"])], "list instead of text"),
    ("Say it", "without a response"),
    (5, "not a list"),
]


def test_rows_of_common_datasets(tmp_path: Path, printed: pytest.LogCaptureFixture) -> None:
    for i, (fields, expected) in enumerate(COMMON):
        assert chat.read_rows(write(tmp_path / f"{i}.jsonl", [fields])) == [expected]
    rows = [GOOD, GOOD | dict(context=["a"]), dict(instruction="a"), GOOD | dict(extra="x"), GOOD | dict(extra="")]
    assert len(chat.read_rows(write(tmp_path / "odd.json", rows))) == 3
    assert "2 of 5 rows dropped: 1 with a list instead of text, 1 with a blank response" in printed.text
    assert "unused fields: extra (1 rows)" in printed.text
    for turns, reason in UNUSABLE_TURNS:
        with pytest.raises(ValueError, match=reason):
            chat.parse_turns(turns)


def test_earlier_turns_are_the_context_of_the_response(tokenizer: tiktoken.Encoding) -> None:
    turn = [*tokenizer.encode_ordinary("Hi\nResponse:\nHo"), tokenizer.eot_token]
    last = tokenizer.encode_ordinary("And?\nResponse:\n")
    row = Row("And?", "", "No.", (("Hi", "Ho"),) * 2)
    for budget, n_turns in ((99, 2), (2 * len(turn) + len(last), 2), (2 * len(turn) + len(last) - 1, 1), (1, 0)):
        assert chat.encode_prompt(row, budget, tokenizer) == turn * n_turns + last


def test_rows_of_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    load = Mock(return_value=datasets.Dataset.from_list([GOOD]))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert chat.read_rows("some/rows:part:test") == [Row("a", "", "b")]
    load.assert_called_once_with("some/rows", "part", split="test")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("no\nroute")))
    refused("some/rows", "some/rows", "no route")
    datasets.load_dataset.assert_called_once_with("some/rows", split="train")


@pytest.mark.parametrize("fraction", [0, 0.01, 0.1, 0.5, 0.999, 1, 2])
def test_no_prompt_is_on_both_sides_of_the_split(fraction: float) -> None:
    prompts = [f"question {i}" for i in np.random.default_rng(0).integers(0, 60, 300)]
    n = len(set(prompts))
    splits = [chat.split_rows(range(300), prompts, fraction, seed) for seed in range(20)]
    for seed, (train, held_out) in enumerate(splits):
        assert sorted(train + held_out) == list(range(300))
        side, other = {prompts[i] for i in train}, {prompts[i] for i in held_out}
        assert side and other and not side & other
        n_held_out, deviation = fraction * n, math.sqrt(n * max(0, fraction * (1 - fraction)))
        assert abs(len(other) - min(n - 1, max(1, n_held_out))) <= 4 * deviation  # binomial
        assert (train, held_out) == chat.split_rows(range(300), prompts, fraction, seed)
        more = [*prompts, *(f"question {i}" for i in range(60, 90))]
        added = {more[i] for i in chat.split_rows(range(len(more)), more, fraction, seed)[0]}
        assert fraction in (0, 1, 2) or len(added & other) <= (len(other) == 1)  # what is held out stays held out
    assert len({tuple(held_out) for _, held_out in splits}) > 10
    with pytest.raises(ValueError, match="2 rows .*--val_data"):
        chat.split_rows([0, 1], ["a", "a"], fraction, 0)


@pytest.mark.parametrize("response", ["\n\n\nyes\n", "\t\n ja — 日本語 🦊", "Response:\nno", "<|endoftext|>", "\n"])
@pytest.mark.parametrize("context", ["", "Rosa has a hat.\nLeo sleeps."])
def test_targets_are_the_response_and_end_of_text(tokenizer: tiktoken.Encoding, context: str, response: str) -> None:
    before = tokenizer.encode(chat.prompt_text("Who has the hat?", context), disallowed_special=())
    after = tokenizer.encode(response, disallowed_special=())  # "<|endoftext|>" in a response is ordinary text
    prompt = chat.encode_prompt(Row("Who has the hat?", context, ""), 1000, tokenizer)
    longer = chat.make_example(chat.encode_prompt(Row("a", "", ""), 1000, tokenizer), "b" * 200, 1000, tokenizer)
    batch = chat.collate([[chat.make_example(prompt, response, 1000, tokenizer)], [longer]], ALONE.device)
    x, y = batch["x"][0].tolist(), batch["y"][0].tolist()
    n = len(before) + len(after)
    assert x[:n] == before + after and len(x) > n  # padded to the longer example
    assert y == [-100] * (len(before) - 1) + [*after, tokenizer.eot_token] + [-100] * (len(y) - n)
    assert batch["n"] == len(after) + 1 + int((batch["y"][1] >= 0).sum())


def test_truncation_leaves_no_incomplete_character(tokenizer: tiktoken.Encoding) -> None:
    context = "日本語🦊é" * 20
    for budget in range(22, 60):
        prompt = chat.encode_prompt(Row("Q", context, ""), budget, tokenizer)
        text = tokenizer.decode(prompt, errors="strict")
        assert len(prompt) <= budget and "\ufffd" not in text
        kept = text.removeprefix("Q\n").removesuffix("Response:\n").removeprefix("Context:\n").removesuffix("\n")
        assert context.startswith(kept) and prompt == tokenizer.encode(chat.prompt_text("Q", kept))
    prompt = chat.encode_prompt(Row("Q", context, ""), 2, tokenizer)
    assert tokenizer.decode(prompt) == "Q\nResponse:\n"  # only the context is truncated


ROWS = [
    ("Who has the hat?\nContext:\nRosa has the hat.", "Rosa."),
    ("Where is Leo?", "\nIn the garden, and he sleeps there."),
    ("Q", "A"),
    ("Name three colors.", "red\ngreen\nblue"),
    ("What does Ada like?\nContext:\nAda likes soup. Leo likes bread.", "Soup"),
    ("Why?", "Because it was cold, and nobody had a coat to wear that night."),
    ("A longer question, so that the lengths of these rows differ a lot?", "no"),
]
EXAMPLES = [chat.make_example(chat.encode_prompt(Row(q, "", ""), T, BYTES), a, T, BYTES) for q, a in ROWS]


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_packed_logits_and_loss_equal_those_of_single_examples(attention: str) -> None:
    """In float64; the logits depend on positions and tokens."""
    raw = tiny_model(scale=0.2, block_size=T, attention=attention).double()
    bins, expected = chat.pack(EXAMPLES, T), 0.0
    # longest first, each into the first bin with enough room
    assert [[e.n_inputs for e in row] for row in bins] == [[79, 77], [76, 60, 13], [59, 43]]
    with torch.no_grad():
        batch = chat.collate(bins, ALONE.device)
        assert batch["mask"].any(-1).all()  # a padded position that attends to nothing could be NaN
        loss, logits = chat.loss(raw, batch, "sum"), raw(batch["x"], pos=batch["pos"], mask=batch["mask"])
        for row, packed in zip(bins, logits):
            for example in row:
                ids, n = torch.from_numpy(example.ids), example.n_prompt
                alone = raw(ids[None, :-1])[0]
                torch.testing.assert_close(packed[: len(alone)], alone, rtol=0, atol=1e-12)
                packed = packed[len(alone) :]
                expected += F.cross_entropy(alone[n - 1 :], ids[n:], reduction="sum").item()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_answers_of_several_batches_equal_those_of_single_prompts() -> None:
    raw = tiny_model(scale=0.3)
    raw.transformer.wte.weight.data[256] *= 1.5  # so that some answers end
    run = SimpleNamespace(full_model=lambda: raw, tokenizer=BYTES, rt=ALONE, cfg=SimpleNamespace(answer_tokens=8))
    prompts = [(Row(f"{i}?", "", str(i)), [*f"{i}?".encode()]) for i in range(70)]  # in batches of 64
    expected = []
    for row, ids in prompts:
        ((new, ended),) = generate.complete(raw, [ids], 8, 256, temperature=0.0)
        texts = f"{row.instruction}\nResponse:\n", row.response, BYTES.decode(new)
        expected.append(rewards.Answer(*texts, [*new, 256] if ended else new, ended))
    assert finetune.answer(run, prompts) == expected and {answer.ended for answer in expected} == {True, False}
    assert finetune.answer(run, []) == []


def test_scores_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [("Rosa", "Rosa", True), ("Rosa", "Rosa has it", True), ("Rosa", "Rosalie", True)]
    answers += [("Rosa has", "Rosa has it and does", False), ("Rosa", "", True)]
    answers = [rewards.Answer("", reference, text, [], ended) for reference, text, ended in answers]
    monkeypatch.setattr(finetune, "answer", lambda run, prompts: answers)
    run = SimpleNamespace(cfg=SimpleNamespace(T=T, answer_tokens=12), tokenizer=BYTES)
    # exact: the first; begins: 1, 2 and 4; ended: all but 4
    expected = pytest.approx(dict(exact=1 / 5, begins=3 / 5, ended=4 / 5))
    assert finetune.score_answers(run, [Row("?", "", "")]) == expected
