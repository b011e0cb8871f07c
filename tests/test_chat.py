"""sample.py --chat: what the model is given to read, turn by turn, and how a conversation is led and left."""

import builtins
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sample import EOT, babbler, config, mistake, run, save, speaker

import sample
from data import get_tokenizer
from model import GPT
from sample import CONFIGS, fit_history, main
from sampling import generate
from training import parse

BYTES = get_tokenizer("bytes")
Capture = pytest.CaptureFixture[str]


def prompt(line: str) -> list[int]:
    """What a line becomes."""
    return list(f"{line}\nResponse:\n".encode())


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Have these lines typed, then the end of the input; what is left in the list was not asked for."""

    def typed(*lines: str) -> list[str]:
        waiting = list(lines)

        def ask(sign: str = "") -> str:
            if not waiting:
                raise EOFError
            return waiting.pop(0)

        monkeypatch.setattr(builtins, "input", ask)
        return waiting

    return typed


class Calls(list):
    """What `generate` was asked: (context, new tokens, settings) of every turn."""

    def contexts(self) -> list[list[int]]:
        return [context for context, _, _ in self]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replace the model: it answers its first turn with A and end-of-text, then B, C …"""
    seen = Calls()

    def generate(
        raw: GPT, prompts: list[list[int]], max_new_tokens: int, **settings: Any
    ) -> Iterator[list[int]]:
        (context,) = prompts
        seen.append((list(context), max_new_tokens, settings))
        yield from ([ord("A") + len(seen) - 1], [EOT])

    monkeypatch.setattr(sample, "generate", generate)
    return seen


def turn(line: str, answer: str) -> list[int]:
    """A line with its answer, as later turns see it."""
    return [*prompt(line), *answer.encode(), EOT]


# -----------------------------------------------------------------------------
# Answers


def test_an_answer_ends_with_end_of_text(tmp_path: Path, capsys: Capture, lines: Callable) -> None:
    at = len(prompt("hi")) - 1  # what the last token of the prompt foretells
    save(tmp_path, speaker({at: "schön".encode()}))
    lines("hi")
    main(config(tmp_path, chat=True))
    out, err = capsys.readouterr()
    assert out == "schön\n\n"  # the end of the input leaves with a line of its own
    assert "/reset" in err and "/quit" in err


def test_an_answer_ends_with_max_new_tokens(tmp_path: Path, capsys: Capture, lines: Callable) -> None:
    save(tmp_path, speaker({12: b"abcdef"}))
    lines("hi")
    main(config(tmp_path, chat=True, max_new_tokens=3))
    assert capsys.readouterr().out == "abc\n\n"


def test_an_answer_is_printed_as_it_comes(
    tmp_path: Path, capsys: Capture, lines: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def generate(raw: GPT, *args: Any, **settings: Any) -> Iterator[list[int]]:
        for token in (*"aé".encode(), EOT):
            yield [token]
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(sample, "generate", generate)
    save(tmp_path, babbler())
    lines("hi")
    main(config(tmp_path, chat=True))
    assert seen == ["a", "", "é", ""]  # half a character waits for its other half


def test_the_second_turn_sees_the_first(tmp_path: Path, lines: Callable, calls: Calls) -> None:
    save(tmp_path, babbler(block_size=128))
    lines("hi", "  who are you?  ")
    main(config(tmp_path, chat=True, max_new_tokens=7, temperature=0.5, top_k=9, top_p=0.8, seed=3))
    first, second = calls
    assert first[0] == prompt("hi")
    # b"hi\nResponse:\nA<|endoftext|>who are you?\nResponse:\n"
    assert second[0] == [*b"hi\nResponse:\nA", EOT, *b"who are you?\nResponse:\n"]
    settings = dict(temperature=0.5, top_k=9, top_p=0.8, stop=EOT, compile=False)
    assert first[1:] == (7, settings | dict(seeds=[3]))
    assert second[1:] == (7, settings | dict(seeds=[4]))  # another draw than the first


def test_an_answer_that_did_not_end_is_ended_for_the_next_turn(
    tmp_path: Path, lines: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def generate(raw: GPT, prompts: list[list[int]], *args: Any, **settings: Any) -> Iterator[list[int]]:
        seen.append(list(prompts[0]))
        yield from ([ord("x")], [ord("y")])

    monkeypatch.setattr(sample, "generate", generate)
    save(tmp_path, babbler(block_size=128))
    lines("hi", "you")
    main(config(tmp_path, chat=True, max_new_tokens=2))
    assert seen == [prompt("hi"), turn("hi", "xy") + prompt("you")]


def test_an_answer_of_a_model_depends_on_what_was_said(
    tmp_path: Path, capsys: Capture, lines: Callable
) -> None:
    raw = babbler(block_size=128)
    save(tmp_path, raw)
    cfg = config(tmp_path, chat=True, max_new_tokens=10, temperature=0.0)
    lines("ab", "cd")
    main(cfg)
    out = capsys.readouterr().out
    answers, context = [], []
    for line in ("ab", "cd"):
        context += prompt(line)
        tokens = [token for (token,) in generate(raw, [context], 10, temperature=0, stop=EOT)]
        answers.append(bytes(t for t in tokens if t != EOT).decode(errors="replace"))
        context += tokens if tokens[-1] == EOT else [*tokens, EOT]
    assert out == "".join(f"{answer}\n" for answer in answers) + "\n"
    lines("cd")
    main(cfg)
    assert capsys.readouterr().out != f"{answers[1]}\n\n"


# -----------------------------------------------------------------------------
# Commands


def test_reset_forgets(tmp_path: Path, lines: Callable, calls: Calls) -> None:
    save(tmp_path, babbler(block_size=128))
    lines("one", "/reset", "two", "three")
    main(config(tmp_path, chat=True))
    assert calls.contexts() == [prompt("one"), prompt("two"), turn("two", "B") + prompt("three")]


def test_quit_leaves(tmp_path: Path, lines: Callable, calls: Calls) -> None:
    save(tmp_path, babbler())
    waiting = lines("one", " /quit ", "two")
    main(config(tmp_path, chat=True))
    assert calls.contexts() == [prompt("one")] and waiting == ["two"]


def test_unknown_commands_and_blank_lines_are_no_turns(
    tmp_path: Path, capsys: Capture, lines: Callable, calls: Calls
) -> None:
    save(tmp_path, babbler(block_size=128))
    lines("one", "/rest", "", "  \t ", "two")
    main(config(tmp_path, chat=True))
    out, err = capsys.readouterr()
    assert "no command /rest: there are /reset and /quit" in err
    assert out == "A\nB\n\n"
    assert calls.contexts() == [prompt("one"), turn("one", "A") + prompt("two")]


# -----------------------------------------------------------------------------
# What fits


def test_fit_history() -> None:
    one, two, three = [1] * 5, [2] * 3, [3] * 4
    history = [one, two, three]
    for room, kept in (
        (14, history),  # 5 + 3 + 4 and the prompt's 2: it just fits
        (13, [two, three]),
        (9, [two, three]),
        (8, [three]),
        (6, [three]),
        (5, []),
        (2, []),
        (1, []),
    ):
        assert fit_history(history, [0, 0], room) == kept, room
    # a short turn behind a long one is not kept: the conversation would have a hole
    assert fit_history([[1], [2] * 9, [3]], [0], 5) == [[3]]
    assert fit_history([], [0], 5) == []
    assert history == [one, two, three]


def test_a_line_too_long_is_refused_and_the_conversation_goes_on(
    tmp_path: Path, capsys: Capture, lines: Callable, calls: Calls
) -> None:
    """Of 64 tokens half stay free for the answer, and the template takes 11."""
    save(tmp_path, babbler(block_size=64))
    lines("a", "x" * 22, "b", "x" * 21)
    main(config(tmp_path, chat=True, max_new_tokens=1000))
    out, err = capsys.readouterr()
    assert "that is 33 tokens; the model has room for 32" in err
    assert out == "A\nB\nC\n\n"
    assert calls.contexts() == [prompt("a"), turn("a", "A") + prompt("b"), prompt("x" * 21)]


def test_the_oldest_turns_are_forgotten_first(tmp_path: Path, lines: Callable, calls: Calls) -> None:
    """A turn of a one-letter line is 14 tokens, a prompt 12: of 48 - 8 two turns fit."""
    save(tmp_path, babbler(block_size=48))
    lines("1", "2", "3", "4")
    main(config(tmp_path, chat=True, max_new_tokens=8))
    one, two, three = turn("1", "A"), turn("2", "B"), turn("3", "C")
    assert (len(one), len(prompt("2"))) == (14, 12)
    expected = [prompt("1"), one + prompt("2"), one + two + prompt("3"), two + three + prompt("4")]
    assert calls.contexts() == expected
    assert all(len(context) <= 40 for context in calls.contexts())


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_turns(turns: int, tmp_path: Path, lines: Callable, calls: Calls) -> None:
    save(tmp_path, babbler(block_size=256))
    lines("1", "2", "3", "4")
    main(config(tmp_path, chat=True, turns=turns))
    history = [turn("1", "A"), turn("2", "B"), turn("3", "C")]
    for n, context in enumerate(calls.contexts()):
        kept = history[max(0, n - turns) : n]
        assert context == sum(kept, []) + prompt(str(n + 1))


def test_a_long_conversation_goes_on(tmp_path: Path, capsys: Capture, lines: Callable) -> None:
    """Real answers, each longer than the model's window."""
    save(tmp_path, babbler())
    lines(*(f"line {i}" for i in range(6)))
    main(config(tmp_path, chat=True, max_new_tokens=50, temperature=1.0, top_k=0))
    assert capsys.readouterr().err.count("tokens; the model") == 6  # 32 - 16 are too few for 17

    lines(*"abcdef")
    main(config(tmp_path, chat=True, max_new_tokens=50, temperature=1.0, top_k=0))
    out, err = capsys.readouterr()
    assert "tokens; the model" not in err and out.count("\n") >= 7


# -----------------------------------------------------------------------------
# The command line and mistakes


def test_chat_alone_is_chat_true() -> None:
    for args in (["--chat"], ["--chat=True"], ["--chat", "True"]):
        assert parse(CONFIGS, "doc", args).chat is True, args
        assert parse(CONFIGS, "doc", ["demo", *args, "--turns=2"]).chat is True, args
        assert parse(CONFIGS, "doc", ["--turns=2", *args]) == parse(CONFIGS, "doc", [*args, "--turns=2"])
    for args in (["--chat=False"], ["--chat", "False"], []):
        assert parse(CONFIGS, "doc", args).chat is False, args
    assert parse(CONFIGS, "doc", ["demo-chat"]).chat is True
    assert parse(CONFIGS, "doc", ["demo-chat", "--chat=False"]).chat is False


def test_mistakes(tmp_path: Path) -> None:
    save(tmp_path, babbler())
    assert "turns=-1 must be at least 0" in mistake(config(tmp_path, chat=True, turns=-1))
    assert "nowhere" in mistake(config(tmp_path / "nowhere", chat=True))


def test_as_a_program(tmp_path: Path) -> None:
    # "hi" with the template is 13 tokens: its answer begins at position 12. That turn is 19, so "you?" is
    # answered at position 19 + 15 - 1, and "für" after /reset at position 14, amid "hello".
    save(tmp_path, speaker({12: b"hello", 33: "schön".encode()}))
    said = run(
        *(f"--checkpoint={tmp_path}", "--chat", "--device=cpu", "--max_new_tokens=16"),
        stdin="hi\n/help\nyou?\n/reset\nfür\n/quit\nhi\n".encode(),
        PYTHONUTF8="1",
    )
    out, err = said.stdout.decode().replace("\r\n", "\n"), said.stderr.decode()
    assert said.returncode == 0, err
    assert out == "> hello\n> > schön\n> > llo\n> "
    assert "no command /help" in err and "Traceback" not in err


def test_input_that_is_not_text(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, speaker({}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nhi\n"), encoding="utf-8"))
    main(config(tmp_path, chat=True))
    assert "not text in UTF-8" in capsys.readouterr().err
