"""neogpt/preferences.py: pairs read from files, tokenized, and collated into micro-batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import ALONE

from neogpt import data, preferences
from neogpt.chat import Example
from neogpt.preferences import Pair

BYTES = data.get_tokenizer("bytes")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(prompt: str, a: str | None, b: str | None, preferred: str | None = "A") -> dict[str, Any]:
    """A row with the fields of red_teaming_reward_modeling_pairwise."""
    return dict(prompt=prompt, response_a=a, response_b=b, explanation="because", preferred=preferred)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """log.messages is what `print0` prints during a test."""
    caplog.set_level("INFO", "neogpt")
    return caplog


# -----------------------------------------------------------------------------
# Rows


def test_preferred_selects_chosen_and_unusable_pairs_are_counted(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
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
    pairs = preferences.read(write_rows(tmp_path / "rows.jsonl", rows), ALONE)
    assert pairs == [("one", "yes", "no"), ("two", "no", "yes")]
    (message,) = log.messages
    for text in ("6 of 8", "3 with a blank response", "1 with equal responses", "2 with a preference"):
        assert text in message


def test_rows_with_chosen_and_rejected(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    texts = [("one", "yes", "no"), ("two", " x", "y "), ("three", "x", "x")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), text)) for text in texts]
    assert preferences.read(write_rows(tmp_path / "rows.jsonl", rows), ALONE) == texts[:2]
    assert "1 of 3" in log.messages[0]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([dict(question="q", answer="a")], ["answer, question", "response_a", "chosen"]),
        ([], ["(none)", "prompt"]),
        ([row("a", "yes", "no"), dict(prompt="b")], ["row 2", "response_a"]),
        ([row("a", "yes", "no"), row("b", "no", "yes") | dict(response_b=3)], ["row 2", "response_b", "3"]),
        ([row("a", "yes", "yes"), row("b", "", "no"), row("c", "yes", "no", "?")], ["0 usable pairs"]),
        ([row("a", "yes", "no"), row(" a", "yes", "never")], ["2 usable pairs", "two different prompts"]),
    ],
    ids=["unknown fields", "no rows", "missing field", "not text", "all dropped", "one prompt"],
)
def test_unusable_rows_are_refused(tmp_path: Path, rows: list[dict], words: list[str]) -> None:
    source = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError) as error:
        preferences.read(source, ALONE)
    assert [word for word in [source, *words] if word not in str(error.value)] == []


def test_kind_of_rows_is_decided_by_all_rows(tmp_path: Path) -> None:
    """A first row without a field is an incomplete row, wherever the row stands in the file."""
    incomplete = dict(prompt="b", response_a="yes", response_b="no", chosen="yes")
    for number, rows in ((1, [incomplete, row("a", "yes", "no")]), (2, [row("a", "yes", "no"), incomplete])):
        with pytest.raises(ValueError, match=f"row {number}: preferred=None"):
            preferences.read(write_rows(tmp_path / "rows.jsonl", rows), ALONE)


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
    tokenized = preferences.tokenize(pairs, 19, BYTES, "pairs.jsonl")
    chosen = ["".join(map(chr, pair.chosen.ids[pair.chosen.n_prompt :])) for pair in tokenized]
    assert chosen == ["12345\u0100", "123456", "12\u0100", "x23456"]
    assert bytes(tokenized[0].rejected.ids[:-1].tolist()) == b"abc\nResponse:\n12"
    assert [preferences.longest(pair) for pair in tokenized] == [20, 20, 20, 20]
    for message, words in zip(log.messages, (("2 pairs", "dropped"), ("3 pairs", "truncated")), strict=True):
        assert [word for word in ("pairs.jsonl", "T=19", *words) if word not in message] == []
    with pytest.raises(ValueError, match="pairs.jsonl.*T=19"):
        preferences.tokenize(pairs[-1:], 19, BYTES, "pairs.jsonl")


def test_micro_batches_are_longest_first_and_equally_many_on_every_rank() -> None:
    """Row i of the chosen half, row i of the rejected half and row i of the reference are of the same pair."""
    pairs = [Pair(Example(np.arange(n), 2), Example(np.arange(3, 7), 1), (float(-n), 0.5)) for n in (4, 9, 6, 8, 5)]
    parts = [preferences.collate(pairs, 2, ALONE._replace(rank=rank, world_size=3)) for rank in range(3)]
    assert [[batch["n"] for batch in part] for part in parts] == [[2], [2], [1]]
    for lengths, (batch,) in zip(([9, 5], [8, 4], [6]), parts):
        n, W = len(lengths), max(lengths) - 1
        assert batch["x"].shape == batch["y"].shape == (4, W)
        assert batch["pair_mask"].tolist() == [1.0] * n + [0.0] * (2 - n)
        assert batch["reference"].tolist() == [[-length, 0.5] for length in lengths] + [[0.0, 0.0]] * (2 - n)
        for i, length in enumerate(lengths):
            assert torch.equal(batch["y"][i], torch.tensor([-100, *range(2, length), *[-100] * (W + 1 - length)]))
            assert batch["y"][2 + i].tolist() == [4, 5, 6, *[-100] * (W - 3)]
    assert (parts[2][0]["y"][[1, 3]] == -100).all()  # the empty rows of the last rank
