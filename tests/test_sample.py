"""sample.py: samples, streaming, errors and chat, on models whose output is known in advance."""

import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import pytest
import torch
from harness import ENV, ROOT, tiny_model

import sample
from neogpt import checkpoint, data, generate, hf, model

EOT = 256  # of the tokenizer "bytes"
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def scripted_model(script: dict[int, bytes]) -> model.GPT:
    """A model that outputs script[p] from position p on, and end-of-text at every other position.

    Token and position embeddings are one-hot. The embedding of a position is that of the next token, times 8, and the
    blocks add nothing. Any other token has a probability below 1e-6 at temperature 0.8.
    """
    raw = tiny_model(n_layer=1, n_head=1, n_embd=320)
    following = torch.full((64,), EOT)
    for position, text in script.items():
        following[position : position + len(text)] = torch.tensor(list(text))
    with torch.no_grad():
        raw.transformer.wte.weight.copy_(torch.eye(320))
        raw.transformer.wpe.weight.copy_(8 * torch.eye(320)[following])
        for name, p in raw.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
    return raw


def save(folder: Path, raw: model.GPT, step: int = 1, **changes: Any) -> Path:
    """Write a checkpoint; return its path."""
    values = dict(model=raw.state_dict(), model_config=asdict(raw.config), tokenizer="bytes") | changes
    checkpoint.save(folder, checkpoint.Checkpoint(stage="dpo", step=step, **values), keep_last=9)
    return folder / f"ckpt_{step:06d}.pt"


def configure(source: Path, **changes: Any) -> sample.Config:
    """A fast configuration."""
    fast = dict(checkpoint=str(source), prompt="ab", max_new_tokens=40, device="cpu", precision="fp32")
    return sample.Config(**(fast | changes))


def run_main(capsys: Capture, cfg: sample.Config, stdin: str = "") -> tuple[str, str]:
    """What main prints to standard output and to standard error."""
    capsys.readouterr()
    with mock.patch.object(sys, "stdin", io.StringIO(stdin)):
        sample.main(cfg)
    return capsys.readouterr()


def refused(source: Path, *words: object, **changes: Any) -> None:
    """Check that a configuration is refused with one line that contains these words."""
    harness.refused(sample.main, configure(source), *words, **changes)


# -----------------------------------------------------------------------------
# Samples and streaming

OPTIONS = [dict(), dict(temperature=0), dict(top_k=0), dict(top_k=1), dict(top_k=10**6), dict(top_p=0.5)]


@pytest.mark.parametrize("options", [*OPTIONS, dict(precision="bf16")], ids=str)
def test_sample_ends_at_end_of_text_or_max_new_tokens(options: dict, tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, scripted_model({1: b"cde"}))
    for n in (0, 1, 40):
        assert run_main(capsys, configure(tmp_path, max_new_tokens=n, **options))[0] == "ab" + "cde"[:n] + "\n"


def test_messages_go_to_standard_error(tmp_path: Path, capsys: Capture) -> None:
    raw = scripted_model({1: b"old"})
    path = save(tmp_path, raw, step=7)
    save(tmp_path, scripted_model({1: b"new"}), step=10)
    out, err = run_main(capsys, configure(path, n_samples=2))
    assert out == "abold\n---\nabold\n"
    assert "step 7" in err and f"{raw.n_params():,} parameters" in err and "\n6 tokens in" in err
    assert run_main(capsys, configure(tmp_path))[0] == "abnew\n"


@pytest.fixture
def calls(monkeypatch: Patch) -> list[tuple[list[int], int, dict]]:
    """(context, max_new_tokens, options) of every call to `generate`, whose answers are A, B, C, …"""
    calls = []

    def fake(raw: Any, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> Iterator[list[int]]:
        calls.append((prompts[0], max_new_tokens, options))
        yield from ([ord("A") + len(calls) - 1], [EOT])

    monkeypatch.setattr(generate, "generate", fake)
    return calls


def test_prompts(tmp_path: Path, capsys: Capture, calls: list) -> None:
    """Of standard input, empty, as long as the context, and longer."""
    save(tmp_path, tiny_model())
    text = "grüß\n<|endoftext|> gott\n"  # the name of the special token is ordinary text
    for prompt, ids in (("-", [*text.encode()]), ("", [EOT]), ("x" * 64, [120] * 64), ("x" * 65, [120] * 65)):
        out, err = run_main(capsys, configure(tmp_path, prompt=prompt), stdin=text)
        assert calls[-1][0] == ids and out == (text if prompt == "-" else prompt) + chr(64 + len(calls)) + "\n"
        assert (f"{len(ids)} tokens:" in err) == (len(ids) == 65)


def test_control_characters_are_replaced(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, scripted_model({1: b"\x1b[2J\a\r\x7f\xc2\x9b1m\t\n"}))
    text = "a\ufffd\ufffd[2J\ufffd\ufffd\ufffd\ufffd1m\t\n\n"
    assert run_main(capsys, configure(tmp_path, prompt="a\x1b", n_samples=2))[0] == f"{text}---\n{text}"


STREAMS = [  # generated bytes, stop texts, and what is printed after each byte and at the end
    (b"abc", (), ["a", "b", "c", "\n"]),
    ("aé".encode(), (), ["a", "", "é", "\n"]),
    ("😀!".encode(), (), ["", "", "", "😀", "!", "\n"]),
    (b"\xff\xfea", (), ["", "", "\ufffd\ufffda", "\n"]),  # never part of UTF-8
    (b"\xc3(", (), ["", "\ufffd(", "\n"]),  # an incomplete character, then another character
    (b"a\xf0\x9f", (), ["a", "", "", "\ufffd\n"]),  # an incomplete character at the end
    (b"\xe2\x82\xe2\x82\xac", (), ["", "", "", "", "\ufffd€", "\n"]),
    (b"a User Us!", ("User:", " :"), ["a", "", " ", "", "", "", "User", " ", "", "Us!", "\n"]),  # perhaps a stop text
]


@pytest.mark.parametrize("text, stop, pieces", STREAMS, ids=str)
def test_text_is_printed_as_soon_as_it_is_certain(
    text: bytes, stop: tuple[str, ...], pieces: list[str], monkeypatch: Patch, capsys: Capture
) -> None:
    printed = []

    def fake(*args: Any, **options: Any) -> Iterator[list[int | None]]:
        for byte in text:
            yield [byte, byte]
            printed.append(capsys.readouterr().out)
        yield [EOT, ord("x")]
        yield [None, ord("y")]

    monkeypatch.setattr(generate, "generate", fake)
    rows = sample.stream(sample.Config(stop=stop), None, data.get_tokenizer("bytes"), [0], [0, 1])
    assert [*printed, capsys.readouterr().out] == pieces
    assert "".join(pieces) == text.decode(errors="replace") + "\n"
    assert rows == [list(text), [*text, *b"xy"]]


def test_stop_texts(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, scripted_model({1: b"one\nUser: two", 20: b"User User:"}))
    cases = {"User:": "one\n", "U": "one\n", "\n": "one", "wo": "one\nUser: t", "x": "one\nUser: two"}
    for stop, expected in cases.items():
        out, err = run_main(capsys, configure(tmp_path, prompt="ab", n_samples=2, stop=("absent", stop)))
        assert out == f"ab{expected}\n---\nab{expected}\n"
        assert stop == "x" or int(re.search(r"(\d+) tokens in", err)[1]) == 2 * (len(expected) + len(stop))
    refused(tmp_path, "--stop", stop=("a", ""))
    save(tmp_path, scripted_model({1: b"cdefg"}))
    assert run_main(capsys, configure(tmp_path, precision="int8"))[0] == run_main(capsys, configure(tmp_path))[0]


# -----------------------------------------------------------------------------
# Errors and the program

BAD = dict(temperature=-1.0, top_k=-1, top_p=0.0, repetition_penalty=0.0, n_samples=0, max_new_tokens=-1)
BAD |= dict(history_turns=-1, device="gpu", compile=True)


def test_options_out_of_range(tmp_path: Path) -> None:
    for name, value in BAD.items():
        refused(tmp_path, f"--{name}={value}", **{name: value})


def test_text_that_is_not_utf8(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    save(tmp_path, scripted_model({}))

    def write_latin() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfc\xdf\nhi\n"), encoding="utf-8"))

    write_latin()
    refused(tmp_path, "standard input", prompt="-")
    write_latin()
    sample.main(configure(tmp_path, chat=True))  # a chat goes on
    assert "UTF-8" in capsys.readouterr().err


def test_unusable_models(tmp_path: Path) -> None:
    refused(save(tmp_path, scripted_model({}), tokenizer="morse"), tmp_path)
    folder = tmp_path / "hf"
    hf.save(tiny_model(n_tokens=99, vocab_size=99), folder)
    refused(folder, folder)  # no tokenizer has 99 ids
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused(folder, folder)
    for text in ("{", '{"model_type": "gpt2"}'):
        (folder / "config.json").write_text(text)
        refused(folder, folder)


def test_program(tmp_path: Path) -> None:
    # The prompt of "hi" has 13 tokens and its turn 19, the prompts of "you?" and "für" have 15. So the answers are
    # predicted from positions 12, 19 + 15 - 1 and, after /reset, 14 on.
    save(tmp_path, scripted_model({12: b"hello", 33: "schön".encode()}))
    command = [sys.executable, "sample.py", f"--checkpoint={tmp_path}", "--chat", "--device=cpu", "--max_new_tokens=16"]
    stdin, env = "  hi \n\n \t\nyou?\n/reset\nfür\n /quit \nhi\n", ENV | dict(PYTHONUTF8="1")
    done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", env=env, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout == "> hello\n> > > schön\n> > llo\n> "


# -----------------------------------------------------------------------------
# Chat


def prompt(line: str) -> list[int]:
    """The tokens of a line in the prompt template."""
    return list(f"{line}\nResponse:\n".encode())


def turn(line: str, answer: str) -> list[int]:
    """The tokens of a line and its answer, as later turns see them."""
    return [*prompt(line), *answer.encode(), EOT]


def test_interrupted_samples_end_with_a_newline(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """And a chat keeps an interrupted answer in its history."""
    save(tmp_path, tiny_model(block_size=128))
    contexts = []

    def fake(raw: Any, prompts: list, *args: Any, **options: Any) -> Iterator[list[int]]:
        contexts.append(prompts[0])
        yield [ord("A")]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "generate", fake)
    out, _ = run_main(capsys, configure(tmp_path, chat=True), stdin="one\ntwo\n")
    assert contexts == [prompt("one"), turn("one", "A") + prompt("two")] and out == "> A\n" * 2 + "> \n"
    with pytest.raises(KeyboardInterrupt):
        sample.main(configure(tmp_path))
    assert capsys.readouterr().out == "abA\n"


@pytest.mark.parametrize("history_turns", [0, 1, 2])
def test_arguments_of_generate(history_turns: int, tmp_path: Path, capsys: Capture, calls: list) -> None:
    save(tmp_path, tiny_model(block_size=256))
    options = dict(temperature=0.5, top_k=9, top_p=0.8)
    cfg = configure(tmp_path, chat=True, history_turns=history_turns, max_new_tokens=7, seed=3, **options)
    run_main(capsys, cfg, stdin="1\n2\n3\n4\n")
    history = [turn("1", "A"), turn("2", "B"), turn("3", "C")]
    contexts = [sum(history[max(0, n - history_turns) : n], []) + prompt(str(n + 1)) for n in range(4)]
    options |= dict(stop=EOT, compile=False, repetition_penalty=1.0)
    assert calls == [(context, 7, options | dict(seeds=[3 + n])) for n, context in enumerate(contexts)]
    run_main(capsys, replace(cfg, chat=False, prompt="a", n_samples=3))
    assert calls[-1] == ([ord("a")], 7, options | dict(seeds=[3, 4, 5]))


def test_oldest_turns_are_dropped_first(tmp_path: Path, capsys: Capture, calls: list) -> None:
    """A prompt with a line of n characters has n + 11 tokens, the turn has n + 13, and 48 - 8 tokens fit."""
    save(tmp_path, tiny_model(block_size=48))
    cfg = configure(tmp_path, chat=True, max_new_tokens=8)
    _, err = run_main(capsys, cfg, stdin=f"1\n2\n3\n4\n{'x' * 30}\n{'y' * 16}\n6\n")
    one, two, three = turn("1", "A"), turn("2", "B"), turn("3", "C")
    expected = [prompt("1"), one + prompt("2"), one + two + prompt("3"), two + three + prompt("4"), prompt("y" * 16)]
    assert [context for context, *_ in calls] == [*expected, prompt("6")]  # turn 4 alone would leave a gap
    assert "41 tokens" in err
    calls.clear()  # an answer reserves at most half of the context
    _, err = run_main(capsys, replace(cfg, max_new_tokens=1000), stdin=f"a\n{'x' * 14}\n{'x' * 13}\n")
    assert [context for context, *_ in calls] == [prompt("a"), prompt("x" * 13)] and "25 tokens" in err
