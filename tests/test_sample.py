"""sample.py: samples, streaming, errors and chat, on models whose output is known in advance."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import sample
from neogpt import checkpoint, config, data, generate, hf, model

ROOT = Path(__file__).resolve().parent.parent
EOT = 256  # of the tokenizer "bytes"
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def scripted_model(script: dict[int, bytes], block_size: int = 64) -> model.GPT:
    """A model that outputs script[p] from position p on, and end-of-text at every other position.

    Token and position embeddings are one-hot. The embedding of a position is that of the next token, times 8, and the
    blocks add nothing. Any other token has a probability below 1e-6 at temperature 0.8.
    """
    sizes = dict(n_layer=1, n_head=1, n_embd=320, block_size=block_size, n_tokens=257, vocab_size=320)
    raw = model.GPT(model.GPTConfig(**sizes))
    following = torch.full((block_size,), EOT)
    for position, text in script.items():
        following[position : position + len(text)] = torch.tensor(list(text))
    with torch.no_grad():
        raw.transformer.wte.weight.copy_(torch.eye(320))
        raw.transformer.wpe.weight.copy_(8 * torch.eye(320)[following])
        for name, p in raw.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
    return raw


def random_model(tokenizer: str = "bytes", **changes: int) -> model.GPT:
    """A model with weights so large that its output depends on the prompt."""
    n_tokens = data.get_tokenizer(tokenizer).n_vocab
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, n_tokens=n_tokens, vocab_size=n_tokens + 7)
    raw = model.GPT(model.GPTConfig(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in raw.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
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


def error(cfg: sample.Config) -> str:
    """The single line that reports an error in this configuration."""
    with mock.patch.object(sys, "argv", ["sample.py"]), pytest.raises(SystemExit) as exit:
        config.run(sample.main, {"test": cfg})
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    return exit.value.code


def run_program(*args: str, stdin: str = "") -> tuple[int, str, str]:
    """Run sample.py as a program; return its exit code, standard output and standard error."""
    environment = os.environ | dict(HF_HUB_OFFLINE="1", PYTHONUTF8="1")
    command = [sys.executable, str(ROOT / "sample.py"), *args]
    done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


# -----------------------------------------------------------------------------
# Samples

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


def test_empty_prompt_starts_a_document(tmp_path: Path, capsys: Capture) -> None:
    raw = scripted_model({1: b"nce"})
    with torch.no_grad():  # at position 0 the model outputs O, only if the input there is end-of-text
        raw.transformer.wpe.weight[0] = 0
        raw.transformer.h[0].mlp.c_fc.weight[0] = torch.eye(320)[EOT]
        raw.transformer.h[0].mlp.c_proj.weight[ord("O"), 0] = 8
    save(tmp_path, raw)
    assert run_main(capsys, configure(tmp_path, prompt="", max_new_tokens=4))[0] == "Once\n"


def test_prompt_from_a_file_and_from_standard_input(tmp_path: Path, capsys: Capture) -> None:
    text = "grüß\n<|endoftext|> gott\n"  # the name of the special token is ordinary text
    save(tmp_path, scripted_model({len(text.encode()) - 1: b"!"}))
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    assert run_main(capsys, configure(tmp_path, prompt_file=str(tmp_path / "prompt.txt")))[0] == text + "!\n"
    assert run_main(capsys, configure(tmp_path, prompt="-"), stdin=text)[0] == text + "!\n"


def test_prompt_longer_than_block_size(tmp_path: Path, capsys: Capture) -> None:
    # The model reads the last 64 tokens, so the first new token is predicted at position 63. Then the window is
    # truncated to its last 32 tokens, so the next token is predicted at position 31.
    save(tmp_path, scripted_model({63: b"A", 31: b"B"}))
    for n, is_reported in ((100, True), (64, False)):
        out, err = run_main(capsys, configure(tmp_path, prompt="x" * n))
        assert out == "x" * n + "AB\n"
        assert (f"{n} tokens" in err) == is_reported


def test_sample_i_equals_a_single_sample_with_seed_plus_i(tmp_path: Path, capsys: Capture) -> None:
    """Exactly equal, because matrices as small as these use the same products for every number of rows."""
    save(tmp_path, random_model())
    together, _ = run_main(capsys, configure(tmp_path, n_samples=3, seed=5))
    alone = [run_main(capsys, configure(tmp_path, seed=seed))[0] for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    assert together == "---\n".join(alone)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_text_equals_the_decoded_tokens_of_generate(tokenizer: str, tmp_path: Path, capsys: Capture) -> None:
    try:
        encoding = data.get_tokenizer(tokenizer)
    except OSError as missing:
        pytest.skip(str(missing))
    raw = random_model(tokenizer)
    save(tmp_path, raw, tokenizer=tokenizer)
    options = dict(temperature=0.9, top_k=100, top_p=0.95)
    prompt = encoding.encode_ordinary("Hello, world")
    rows = generate.complete(raw, [prompt] * 2, 150, encoding.eot_token, seeds=[3, 4], **options)
    assert all(len(tokens) > 40 for tokens, _ in rows)  # longer than block_size
    texts = ["Hello, world" + sample.CONTROL.sub("\ufffd", encoding.decode(tokens)) for tokens, _ in rows]
    cfg = configure(tmp_path, prompt="Hello, world", max_new_tokens=150, seed=3, n_samples=2, **options)
    assert run_main(capsys, cfg)[0] == "\n---\n".join(texts) + "\n"


def test_hugging_face_folder(tmp_path: Path, capsys: Capture) -> None:
    hf.save(scripted_model({1: b"cde"}), tmp_path / "export")
    assert run_main(capsys, configure(tmp_path / "export"))[0] == "abcde\n"


def test_control_characters_are_replaced(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, scripted_model({1: b"\x1b[2J\a\r\x7f\xc2\x9b1m\t\n"}))
    text = "a\ufffd\ufffd[2J\ufffd\ufffd\ufffd\ufffd1m\t\n\n"
    assert run_main(capsys, configure(tmp_path, prompt="a\x1b", n_samples=2))[0] == f"{text}---\n{text}"


# -----------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize(
    "text, pieces",
    [
        (b"abc", ["a", "b", "c", "\n"]),
        ("aé".encode(), ["a", "", "é", "\n"]),
        ("😀!".encode(), ["", "", "", "😀", "!", "\n"]),
        (b"\xff\xfea", ["\ufffd", "\ufffd", "a", "\n"]),  # never part of UTF-8
        (b"\xc3(", ["", "\ufffd(", "\n"]),  # an incomplete character, then another character
        (b"a\xf0\x9f", ["a", "", "", "\ufffd\n"]),  # an incomplete character at the end
        (b"\xe2\x82\xe2\x82\xac", ["", "", "\ufffd", "", "€", "\n"]),
    ],
    ids=str,
)
def test_complete_characters_are_printed_at_once(
    text: bytes, pieces: list[str], monkeypatch: Patch, capsys: Capture
) -> None:
    printed = []

    def fake(*args: Any, **options: Any) -> Iterator[list[int | None]]:
        for byte in text:
            yield [byte, byte]
            printed.append(capsys.readouterr().out)
        yield [EOT, ord("x")]
        yield [None, ord("y")]

    monkeypatch.setattr(generate, "generate", fake)
    rows = sample.stream(sample.Config(), None, data.get_tokenizer("bytes"), [0], [0, 1])
    assert [*printed, capsys.readouterr().out] == pieces
    assert "".join(pieces) == text.decode(errors="replace") + "\n"
    assert rows == [list(text), [*text, *b"xy"]]


def test_interrupted_sample_ends_with_a_newline(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    def interrupted(*args: Any, **options: Any) -> Iterator[list[int]]:
        yield [ord("c")]
        os.kill(os.getpid(), signal.SIGINT)
        yield [ord("d")]

    save(tmp_path, scripted_model({}))
    monkeypatch.setattr(generate, "generate", interrupted)
    assert "interrupted" in error(configure(tmp_path))
    assert capsys.readouterr().out == "abc\n"


# -----------------------------------------------------------------------------
# Errors: one line, which names the value

BAD = [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)]
BAD += [dict(n_samples=0), dict(max_new_tokens=-1), dict(history_turns=-1), dict(device="gpu")]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_option_out_of_range(bad: dict, tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, scripted_model({}))
    ((name, value),) = bad.items()
    message = error(configure(tmp_path, **bad))
    assert name in message and str(value) in message and capsys.readouterr().out == ""


def test_unreadable_prompt(tmp_path: Path, monkeypatch: Patch) -> None:
    save(tmp_path, scripted_model({}))
    (tmp_path / "latin.txt").write_bytes(b"gr\xfc\xdf")
    for path in (tmp_path / "nowhere.txt", tmp_path, tmp_path / "latin.txt"):
        assert str(path) in error(configure(tmp_path, prompt_file=str(path)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfc\xdf"), encoding="utf-8"))
    assert "standard input" in error(configure(tmp_path, prompt="-"))


IMPOSSIBLE = [dict(n_head=0), dict(n_layer=-1), dict(n_embd=2**40), dict(n_head=3), dict(n_layer=2), dict(x=1)]
IMPOSSIBLE += [dict(block_size=65), dict(vocab_size=384), dict(attention="other"), dict(n_tokens="257")]


def test_inconsistent_checkpoint(tmp_path: Path) -> None:
    raw = scripted_model({})
    inconsistent = [dict(model_config=asdict(raw.config) | change) for change in IMPOSSIBLE]
    inconsistent += [dict(model={}), dict(model=None), dict(model={"transformer.wte.weight": 5})]
    for change in inconsistent:
        save(tmp_path, raw, **change)
        assert str(tmp_path) in error(configure(tmp_path)), change
    save(tmp_path, raw, tokenizer="morse")
    assert "morse" in error(configure(tmp_path))


def test_unusable_hugging_face_source(tmp_path: Path, monkeypatch: Patch) -> None:
    for text in ("{", '{"model_type": "gpt2"}', '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(text)
        assert str(tmp_path) in error(configure(tmp_path))
    hf.save(random_model(n_tokens=99, vocab_size=99), tmp_path)
    assert "99" in error(configure(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert str(tmp_path) in error(configure(tmp_path))

    def not_found(name: str, file: str) -> str:
        raise OSError("404 Client Error.\n\nRepository Not Found for url: https://huggingface.co/…\nPlease")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", not_found)
    assert "no/such" in error(configure(Path("no/such")))


# -----------------------------------------------------------------------------
# Command line


def test_command_line() -> None:
    for name, cfg in sample.CONFIGS.items():
        assert config.parse(sample.CONFIGS, "doc", [name]) == cfg
    assert config.parse(sample.CONFIGS, "doc", []) == sample.CONFIGS["gpt2"]
    changed = config.parse(sample.CONFIGS, "doc", ["demo-chat", "--chat", "False", "--top-k=0", "--prompt=-"])
    assert (changed.chat, changed.top_k, changed.prompt) == (False, 0, "-")
    assert changed.checkpoint == sample.CONFIGS["demo-chat"].checkpoint
    assert config.parse(sample.CONFIGS, "doc", ["demo", "--chat", "--history_turns=2"]).chat


@pytest.mark.parametrize("wrong, hint", [("--promt=x", "--prompt"), ("--checkpoint=out/nowhere", "out/nowhere")])
def test_program_reports_errors(wrong: str, hint: str) -> None:
    code, out, err = run_program("demo", wrong)
    assert code > 0 and out == "" and hint in err


def test_program(tmp_path: Path) -> None:
    text = "grüß dich\n"
    save(tmp_path, scripted_model({len(text.encode()) - 1: "schön 😀".encode()}))
    code, out, err = run_program(f"--checkpoint={tmp_path}", "--device=cpu", "--prompt=-", "--n_samples=2", stdin=text)
    assert code == 0 and "tokens/s" in err
    assert out == "grüß dich\nschön 😀\n---\ngrüß dich\nschön 😀\n"


def test_chat_program(tmp_path: Path) -> None:
    # The prompt of "hi" has 13 tokens, so its answer is predicted from position 12 on, and the turn has 19 tokens.
    # The prompt of "you?" has 15, so its answer is predicted from position 19 + 15 - 1 on. After /reset, the prompt of
    # "für" (15 tokens) is answered from position 14 on, within "hello".
    save(tmp_path, scripted_model({12: b"hello", 33: "schön".encode()}))
    stdin = "hi\n/help\nyou?\n/reset\nfür\n/quit\nhi\n"
    args = (f"--checkpoint={tmp_path}", "--chat", "--device=cpu", "--max_new_tokens=16")
    code, out, err = run_program(*args, stdin=stdin)
    assert code == 0 and "/help" in err
    assert out == "> hello\n> > schön\n> > llo\n> "


# -----------------------------------------------------------------------------
# Chat


def prompt(line: str) -> list[int]:
    """The tokens of a line in the prompt template."""
    return list(f"{line}\nResponse:\n".encode())


def turn(line: str, answer: str) -> list[int]:
    """The tokens of a line and its answer, as later turns see them."""
    return [*prompt(line), *answer.encode(), EOT]


@pytest.fixture
def calls(monkeypatch: Patch) -> list[tuple[list[int], int, dict]]:
    """(context, max_new_tokens, options) of every call to `generate`, whose answers are A, B, C, …"""
    calls = []

    def fake(raw: Any, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> Iterator[list[int]]:
        calls.append((prompts[0], max_new_tokens, options))
        yield from ([ord("A") + len(calls) - 1], [EOT])

    monkeypatch.setattr(generate, "generate", fake)
    return calls


def test_second_turn_sees_the_first(tmp_path: Path, capsys: Capture, calls: list) -> None:
    save(tmp_path, random_model(block_size=128))
    options = dict(temperature=0.5, top_k=9, top_p=0.8)
    cfg = configure(tmp_path, chat=True, max_new_tokens=7, seed=3, **options)
    run_main(capsys, cfg, stdin="hi\n  who are you?  \n")
    options |= dict(stop=EOT, compile=False)
    assert calls[0] == (list(b"hi\nResponse:\n"), 7, options | dict(seeds=[3]))
    context = [*b"hi\nResponse:\nA", EOT, *b"who are you?\nResponse:\n"]
    assert calls[1] == (context, 7, options | dict(seeds=[4]))


def test_answers_equal_generate_on_the_whole_history(tmp_path: Path, capsys: Capture) -> None:
    raw = random_model(block_size=128)
    save(tmp_path, raw)
    expected, context = "", []
    for line in ("ab", "cd"):
        context += prompt(line)
        ((tokens, ended),) = generate.complete(raw, [context], 10, EOT, temperature=0)
        context += [*tokens, EOT]
        expected += "> " + sample.CONTROL.sub("\ufffd", bytes(tokens).decode(errors="replace")) + "\n"
        assert not ended  # the next turn sees end-of-text after a truncated answer
    cfg = configure(tmp_path, chat=True, max_new_tokens=10, temperature=0.0)
    assert run_main(capsys, cfg, stdin="ab\ncd\n")[0] == expected + "> \n"
    assert not expected.endswith(run_main(capsys, cfg, stdin="cd\n")[0].removesuffix("> \n"))


def test_chat_commands(tmp_path: Path, capsys: Capture, calls: list) -> None:
    save(tmp_path, random_model(block_size=128))
    stdin = "one\n/reset\ntwo\n/rest\n\n  \t \nthree\n /quit \nfour\n"
    out, err = run_main(capsys, configure(tmp_path, chat=True), stdin=stdin)
    assert [context for context, *_ in calls] == [prompt("one"), prompt("two"), turn("two", "B") + prompt("three")]
    assert out.replace("> ", "") == "A\nB\nC\n" and "/rest" in err


@pytest.mark.parametrize("history_turns", [0, 1, 2])
def test_history_turns(history_turns: int, tmp_path: Path, capsys: Capture, calls: list) -> None:
    save(tmp_path, random_model(block_size=256))
    run_main(capsys, configure(tmp_path, chat=True, history_turns=history_turns), stdin="1\n2\n3\n4\n")
    history = [turn("1", "A"), turn("2", "B"), turn("3", "C")]
    for n, (context, *_) in enumerate(calls):
        assert context == sum(history[max(0, n - history_turns) : n], []) + prompt(str(n + 1))


def test_oldest_turns_are_dropped_first(tmp_path: Path, capsys: Capture, calls: list) -> None:
    """A prompt with a line of n characters has n + 11 tokens, the turn has n + 13, and 48 - 8 tokens fit."""
    save(tmp_path, random_model(block_size=48))
    cfg = configure(tmp_path, chat=True, max_new_tokens=8)
    _, err = run_main(capsys, cfg, stdin=f"1\n2\n3\n4\n{'x' * 30}\n{'y' * 16}\n6\n")
    one, two, three = turn("1", "A"), turn("2", "B"), turn("3", "C")
    expected = [prompt("1"), one + prompt("2"), one + two + prompt("3"), two + three + prompt("4"), prompt("y" * 16)]
    assert [context for context, *_ in calls] == [*expected, prompt("6")]  # turn 4 alone would leave a gap
    assert "41 tokens" in err


def test_answer_reserves_at_most_half_of_the_context(tmp_path: Path, capsys: Capture, calls: list) -> None:
    save(tmp_path, random_model(block_size=64))
    stdin = f"a\n{'x' * 22}\n{'x' * 21}\n"
    _, err = run_main(capsys, configure(tmp_path, chat=True, max_new_tokens=1000), stdin=stdin)
    assert [context for context, *_ in calls] == [prompt("a"), prompt("x" * 21)]
    assert "33 tokens" in err


def test_chat_input_that_is_not_utf8(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    save(tmp_path, scripted_model({}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nhi\n"), encoding="utf-8"))
    sample.main(configure(tmp_path, chat=True))
    assert "UTF-8" in capsys.readouterr().err
