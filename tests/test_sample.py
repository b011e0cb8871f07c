"""sample.py end to end, on models whose every word is known beforehand, and all that a user can get wrong."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import sample
from checkpoints import save_checkpoint
from data import get_tokenizer
from hf import to_hf
from model import GPT, GPTConfig
from sample import CONFIGS, Config, main, stream
from sampling import generate
from training import parse

ROOT = Path(__file__).parent.parent
EOT = 256  # of the bytes tokenizer


def speaker(script: dict[int, bytes | int], block_size: int = 64) -> GPT:
    """A model with a script: from position p on it says script[p], and end-of-text wherever it has no words.

    Token and position embeddings are one-hot, the position's entry being the next token's and eight times as
    large; the blocks add nothing. Any other token has less than 1e-6 of probability at temperature 0.8.
    """
    config = GPTConfig(n_layer=1, n_head=1, n_embd=320, block_size=block_size, n_tokens=257, vocab_size=320)
    raw = GPT(config)
    following = torch.full((block_size,), EOT)
    for position, said in script.items():
        ids = torch.tensor([said] if isinstance(said, int) else list(said))
        following[position : position + len(ids)] = ids
    with torch.no_grad():
        raw.transformer.wte.weight.copy_(torch.eye(320))
        raw.transformer.wpe.weight.copy_(8 * torch.eye(320)[following])
        for name, p in raw.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
    return raw


def babbler(tokenizer: str = "bytes", **changes: int) -> GPT:
    """A model of random weights, large enough that what it says depends on what it was told."""
    n_tokens = get_tokenizer(tokenizer).n_vocab
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, n_tokens=n_tokens, vocab_size=n_tokens + 7)
    raw = GPT(GPTConfig(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in raw.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return raw


def save(folder: Path, raw: GPT, step: int = 1, **changes: Any) -> Path:
    """A checkpoint as train_gpt2.py writes it; return its path."""
    state = dict(
        step=step,
        model=raw.state_dict(),
        optimizers=[],
        model_config=asdict(raw.config),
        config={},
        tokenizer="bytes",
        val_loss=1.5,
        seconds=0.0,
        B=1,
        world_size=1,
    )
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, state | changes, keep=9)
    return folder / f"ckpt_{step:06d}.pt"


def config(folder: Path, **changes: Any) -> Config:
    quick = dict(checkpoint=str(folder), prompt="ab", max_new_tokens=40, device="cpu", precision="fp32")
    return Config(**(quick | changes))


Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, cfg: Config) -> str:
    """What main prints to standard output."""
    capsys.readouterr()
    main(cfg)
    return capsys.readouterr().out


def mistake(cfg: Config) -> str:
    """The message of one line with which main refuses a configuration."""
    with pytest.raises(SystemExit) as refusal:
        main(cfg)
    message = refusal.value.code
    assert isinstance(message, str) and message and "\n" not in message, message
    return message


def run(*args: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """sample.py as a user starts it."""
    environment = os.environ | dict(HF_HUB_OFFLINE="1", PYTHONIOENCODING="utf-8", **env)
    command = [sys.executable, str(ROOT / "sample.py"), *args]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120)


# -----------------------------------------------------------------------------
# What is said


@pytest.mark.parametrize(
    "controls",
    [
        dict(),
        dict(temperature=0),
        dict(top_k=0),
        dict(top_k=1),
        dict(top_k=10**6),
        dict(top_p=0.5),
        dict(precision="bf16"),
    ],
    ids=str,
)
def test_prompt_and_its_continuation_up_to_end_of_text(
    controls: dict, tmp_path: Path, capsys: Capture
) -> None:
    save(tmp_path, speaker({1: b"cde"}))
    assert said(capsys, config(tmp_path, **controls)) == "abcde\n"


def test_max_new_tokens(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, speaker({1: b"cdefgh"}))
    for n in (0, 1, 4):
        assert said(capsys, config(tmp_path, max_new_tokens=n)) == "ab" + "cdefgh"[:n] + "\n"


def test_a_checkpoint_file_and_remarks_on_standard_error(tmp_path: Path, capsys: Capture) -> None:
    raw = speaker({1: b"old"})
    path = save(tmp_path, raw, step=7)
    save(tmp_path, speaker({1: b"new"}), step=10)
    capsys.readouterr()
    main(config(path))
    out, err = capsys.readouterr()
    assert out == "abold\n"
    assert "step 7" in err and f"{raw.n_params():,} parameters" in err and "tokens/s" in err
    assert said(capsys, config(tmp_path)) == "abnew\n"


def test_only_tokens_that_were_drawn_are_counted(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, speaker({}))
    monkeypatch.setattr(
        sample, "generate", lambda *args, **settings: iter([[97, EOT], [98, None], [99, None]])
    )
    main(config(tmp_path, prompt="", n_samples=2))
    out, err = capsys.readouterr()
    assert out == "abc\n---\n\n" and err.splitlines()[-1].startswith("4 tokens in")


def test_empty_prompt_begins_a_document(tmp_path: Path, capsys: Capture) -> None:
    raw = speaker({1: b"nce"})
    with torch.no_grad():  # what comes first hangs on the token there: after end-of-text, and only then, an O
        raw.transformer.wpe.weight[0] = 0
        raw.transformer.h[0].mlp.c_fc.weight[0] = torch.eye(320)[EOT]
        raw.transformer.h[0].mlp.c_proj.weight[ord("O"), 0] = 8
    save(tmp_path, raw)
    assert said(capsys, config(tmp_path, prompt="", max_new_tokens=4)) == "Once\n"


def test_prompt_file_is_the_whole_file(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, speaker({len("grüß\ngott\n".encode()) - 1: b"!"}))
    (tmp_path / "prompt.txt").write_bytes("grüß\ngott\n".encode())
    cfg = config(tmp_path, prompt_file=str(tmp_path / "prompt.txt"))
    assert said(capsys, cfg) == "grüß\ngott\n!\n"


def test_standard_input(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, speaker({4: b"!"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nx"))
    assert said(capsys, config(tmp_path, prompt="-")) == "two\nx!\n"


def test_end_of_text_in_the_prompt_is_text_like_any_other(tmp_path: Path, capsys: Capture) -> None:
    text = "<|endoftext|>"
    save(tmp_path, speaker({len(text) - 1: b"!"}))
    assert said(capsys, config(tmp_path, prompt=text)) == text + "!\n"


def test_prompt_longer_than_block_size(tmp_path: Path, capsys: Capture) -> None:
    # The last 64 tokens are read, so the first word comes at position 63; then the window is cut to its newer
    # half of 32, and the next comes at position 31.
    save(tmp_path, speaker({63: b"A", 31: b"B"}))
    capsys.readouterr()
    main(config(tmp_path, prompt="x" * 100))
    out, err = capsys.readouterr()
    assert out == "x" * 100 + "AB\n"
    assert "100 tokens" in err and "64" in err

    save(tmp_path, speaker({63: b"A", 31: b"B"}))
    main(config(tmp_path, prompt="x" * 64))
    out, err = capsys.readouterr()
    assert out == "x" * 64 + "AB\n" and "64 tokens;" not in err  # it just fits: nothing to remark


def test_samples_are_printed_one_after_another(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, speaker({1: b"cd"}))
    assert said(capsys, config(tmp_path, n_samples=3)) == "abcd\n---\nabcd\n---\nabcd\n"


def test_sample_i_is_what_seed_plus_i_draws_alone(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, babbler())
    together = said(capsys, config(tmp_path, n_samples=3, seed=5))
    alone = [said(capsys, config(tmp_path, seed=seed)) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    assert together == "---\n".join(alone)
    assert said(capsys, config(tmp_path, n_samples=3, seed=5)) == together


def test_text_equals_the_models_tokens(tmp_path: Path, capsys: Capture) -> None:
    """Bytes of all kinds, past the end of the window: the same as `generate` and one decoding at the end."""
    raw = babbler()
    save(tmp_path, raw)
    controls = dict(temperature=0.9, top_k=100, top_p=0.95)
    steps = generate(raw, [list(b"ab")], 150, seeds=[3], **controls)
    tokens = [token for (token,) in steps]
    tokens = tokens[: tokens.index(EOT)] if EOT in tokens else tokens
    assert len(tokens) > 40
    expected = "ab" + bytes(tokens).decode("utf-8", errors="replace") + "\n"
    assert said(capsys, config(tmp_path, max_new_tokens=150, seed=3, **controls)) == expected


def test_the_first_sample_is_printed_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        shown = ""

        def flush(self) -> None:
            self.shown = self.getvalue()

    screen, seen = Screen(), []

    def watched(*args: Any, **controls: Any) -> Iterator[list[int | None]]:
        for step in generate(*args, **controls):
            seen.append(screen.shown)
            yield step

    save(tmp_path, speaker({1: "cé!".encode()}))
    monkeypatch.setattr(sample, "generate", watched)
    monkeypatch.setattr(sys, "stdout", screen)
    main(config(tmp_path))
    assert seen == ["ab", "abc", "abc", "abcé", "abcé!"]


def test_a_model_in_hugging_face_form(tmp_path: Path, capsys: Capture) -> None:
    to_hf(speaker({1: b"cde"}), tmp_path / "export")
    assert said(capsys, config(tmp_path, hf=str(tmp_path / "export"))) == "abcde\n"


def test_the_gpt2_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    try:
        tokenizer = get_tokenizer("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    raw = babbler("gpt2", n_embd=8, vocab_size=50304)
    save(tmp_path, raw, tokenizer="gpt2")
    text = "Hello, I'm a language model,"
    prompt = tokenizer.encode_ordinary(text)
    assert len(prompt) == 8
    tokens = [token for (token,) in generate(raw, [prompt], 40, seeds=[0])]
    assert tokenizer.eot_token not in tokens
    out = said(capsys, config(tmp_path, prompt=text, temperature=1.0, top_k=0, seed=0))
    assert out == text + tokenizer.decode(tokens) + "\n"


# -----------------------------------------------------------------------------
# Streaming

STREAMS = [
    (b"abc", ["a", "b", "c", ""]),
    ("aé".encode(), ["a", "", "é", ""]),
    ("😀!".encode(), ["", "", "", "😀", "!", ""]),
    (b"\xff\xfea", ["\ufffd", "\ufffd", "a", ""]),  # never part of UTF-8
    (b"\xc3(", ["", "\ufffd(", ""]),  # begun, but not gone on with
    (b"a\xf0\x9f", ["a", "", "", "\ufffd"]),  # cut off by the end
    (b"\xe2\x82\xe2\x82\xac", ["", "", "\ufffd", "", "€", ""]),
]


@pytest.mark.parametrize("raw_bytes, pieces", STREAMS, ids=lambda value: repr(value)[:20])
def test_stream_holds_back_unfinished_characters(raw_bytes: bytes, pieces: list[str]) -> None:
    steps = list(stream(([token] for token in raw_bytes), get_tokenizer("bytes"), 1))
    assert [step[0] for step in steps] == pieces
    assert "".join(pieces) == raw_bytes.decode("utf-8", errors="replace")


def test_stream_keeps_rows_apart_and_end_of_text_out() -> None:
    e, acute = "é".encode()
    euro = "€".encode()
    tokens = [[e, euro[0]], [acute, euro[1]], [EOT, euro[2]], [None, EOT], [None, None]]
    steps = list(stream(iter(tokens), get_tokenizer("bytes"), 2))
    assert steps == [["", ""], ["é", ""], ["", "€"], ["", ""], ["", ""], ["", ""]]
    ended = list(stream(iter([[e, 97], [EOT, 98], [None, 99]]), get_tokenizer("bytes"), 2))
    assert ["".join(row) for row in zip(*ended)] == ["\ufffd", "abc"]


def test_stream_asks_for_one_step_at_a_time() -> None:
    asked = []

    def tokens() -> Iterator[list[int | None]]:
        for token in b"abc":
            asked.append(token)
            yield [token]

    pieces = stream(tokens(), get_tokenizer("bytes"), 1)
    assert next(pieces) == ["a"] and len(asked) == 1


# -----------------------------------------------------------------------------
# Mistakes: one line, no traceback


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=-0.5),
        dict(top_p=1.5),
        dict(n_samples=0),
        dict(n_samples=-2),
        dict(max_new_tokens=-1),
        dict(device="gpu"),
    ],
    ids=str,
)
def test_constants_out_of_range(bad: dict, tmp_path: Path) -> None:
    save(tmp_path, speaker({1: b"cde"}))
    ((name, value),) = bad.items()
    message = mistake(config(tmp_path, **bad))
    assert name in message and str(value) in message


def test_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "ckpt_000001.pt"):
        message = mistake(config(path))
        assert str(path) in message and "train_gpt2.py" in message


def test_unreadable_prompt_file(tmp_path: Path) -> None:
    save(tmp_path, speaker({}))
    (tmp_path / "latin.txt").write_bytes(b"gr\xfc\xdf")
    for path in (tmp_path / "nowhere.txt", tmp_path, tmp_path / "latin.txt"):
        assert str(path) in mistake(config(tmp_path, prompt_file=str(path)))


def test_standard_input_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, speaker({}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfc\xdf"), encoding="utf-8"))
    assert "standard input" in mistake(config(tmp_path, prompt="-"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, replace_by_text])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Any, tmp_path: Path, capsys: Capture
) -> None:
    older = save(tmp_path, speaker({1: b"cde"}), step=9)
    newer = save(tmp_path, speaker({1: b"xyz"}), step=10)
    damage(newer)
    capsys.readouterr()
    main(config(tmp_path))
    out, err = capsys.readouterr()
    assert out == "abcde\n"
    assert newer.name in err and older.name in err
    assert str(newer) in mistake(config(newer))  # asked for by name, there is no other
    damage(older)
    assert str(older) in mistake(config(tmp_path))


class Intruder:
    """An object that would leave a mark if it were unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickled_object_is_refused_and_never_built(tmp_path: Path) -> None:
    path = save(tmp_path, speaker({}), config=Intruder(tmp_path / "mark"))
    message = mistake(config(tmp_path))
    assert path.name in message and "objects" in message
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("keys", [["model"], ["model_config"], ["tokenizer"], ["step"], ["format"]], ids=str)
def test_a_file_of_another_program_is_refused(keys: list[str], tmp_path: Path) -> None:
    path = save(tmp_path, speaker({}))
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if key not in keys}, path)
    assert path.name in mistake(config(tmp_path))
    torch.save([1, 2], path)
    assert path.name in mistake(config(tmp_path))
    torch.save(state | {"format": 999}, path)
    assert "999" in mistake(config(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        dict(n_head=0),
        dict(n_layer=-1),
        dict(n_embd=2**40),
        dict(n_head=3),
        dict(n_layer=2),
        dict(block_size=65),
        dict(vocab_size=384),
        dict(attention="other"),
        dict(dropout=0.1),
        dict(n_tokens="257"),
    ],
    ids=str,
)
def test_an_impossible_model_config_is_refused(change: dict, tmp_path: Path) -> None:
    raw = speaker({})
    save(tmp_path, raw, model_config=asdict(raw.config) | change)
    assert str(tmp_path) in mistake(config(tmp_path))


@pytest.mark.parametrize("weights", [{}, None, {"transformer.wte.weight": 5}], ids=str)
def test_impossible_weights_are_refused(weights: Any, tmp_path: Path) -> None:
    save(tmp_path, speaker({}), model=weights)
    assert str(tmp_path) in mistake(config(tmp_path))


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, speaker({}), tokenizer="morse")
    assert "morse" in mistake(config(tmp_path))


def test_hugging_face_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    assert "config.json" in mistake(config(tmp_path, hf=str(folder)))
    (folder / "config.json").write_text("{")
    assert str(folder) in mistake(config(tmp_path, hf=str(folder)))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert str(folder) in mistake(config(tmp_path, hf=str(folder)))
    to_hf(babbler(n_embd=8), folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert str(folder) in mistake(config(tmp_path, hf=str(folder)))
    to_hf(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, n_tokens=99, vocab_size=99)), folder)
    assert "99" in mistake(config(tmp_path, hf=str(folder)))

    def not_found(name: str, file: str) -> str:
        raise OSError("404 Client Error.\n\nRepository Not Found for url: https://huggingface.co/…\nPlease")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", not_found)
    assert "no/such" in mistake(config(tmp_path, hf="no/such"))


# -----------------------------------------------------------------------------
# The command line


def test_every_configuration_parses() -> None:
    for name, cfg in CONFIGS.items():
        assert parse(CONFIGS, "doc", [name]) == cfg
    assert parse(CONFIGS, "doc", []) == CONFIGS["gpt2"]
    args = ["demo", "--top-k=0", "--top_p=0.5", "--prompt=-", "--n_samples", "3"]
    changed = parse(CONFIGS, "doc", args)
    assert (changed.top_k, changed.top_p, changed.prompt, changed.n_samples) == (0, 0.5, "-", 3)
    assert changed.checkpoint == CONFIGS["demo"].checkpoint


@pytest.mark.parametrize(
    "args, hint",
    [
        (["--promt=x"], "--prompt"),
        (["--max-new-token=5"], "--max_new_tokens"),
        (["--top_k=many"], "many"),
        (["--precision=fp8"], "bf16"),
        (["demmo"], "demo"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(args: list[str], hint: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse(CONFIGS, "doc", args)
    assert refusal.value.code != 0
    out, err = capsys.readouterr()
    shown = err + str(refusal.value.code)
    assert out == "" and "Traceback" not in shown and hint in shown, shown


def test_as_a_program(tmp_path: Path) -> None:
    text = "grüß dich\n".encode()
    save(tmp_path, speaker({len(text) - 1: "schön 😀".encode()}))
    args = (f"--checkpoint={tmp_path}", "--device=cpu", "--prompt=-", "--n_samples=2")
    done = run(*args, stdin=text)
    assert done.returncode == 0, done.stderr.decode()
    expected = "grüß dich\nschön 😀\n".encode()
    assert done.stdout.replace(b"\r\n", b"\n") == expected + b"---\n" + expected
    assert b"tokens/s" in done.stderr


@pytest.mark.parametrize("args", [["--promt=x"], ["--checkpoint=nowhere"]], ids=str)
def test_mistakes_as_a_program(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode not in (0, None) and done.stdout == b""
    assert b"Traceback" not in done.stderr
    assert (b"--prompt" if "promt" in args[0] else b"nowhere") in done.stderr
