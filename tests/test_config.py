"""The command line, its help, and how errors end a script."""

import ast
import importlib
import io
import math
import os
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from harness import ENV, ROOT

from neogpt import config


@dataclass(frozen=True)
class Config:
    max_lr: float = 6e-4  # peak learning rate
    compile: bool | None = None  # None: on CUDA
    exact: bool = True  # the same bits
    B: int | None = 8  # rows
    mode: Literal["auto", "never"] = "auto"  # one of two
    prompt: str = "Hello,"  # text
    prompts: tuple[str, ...] = ()  # texts


CONFIGS = {"gpt2": Config(), "demo": Config(max_lr=1e-3, B=4)}


def parse(*args: str) -> Config:
    return config.parse(CONFIGS, "What the script does.", args)


# -----------------------------------------------------------------------------
# The command line


def test_named_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse() == parse("gpt2") == CONFIGS["gpt2"]
    assert parse("demo") == CONFIGS["demo"]
    assert parse("demo", "--max_lr=0.5") == Config(max_lr=0.5, B=4)
    monkeypatch.setattr(sys, "argv", ["script.py", "demo", "--B=2"])
    assert config.parse(CONFIGS, "What the script does.") == Config(max_lr=1e-3, B=2)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--max_lr=1e-3"], dict(max_lr=1e-3)),
        (["--max-lr=1e-3"], dict(max_lr=1e-3)),
        (["--max-lr", "1e-3"], dict(max_lr=1e-3)),
        (["--compile=False", "--exact=False"], dict(compile=False, exact=False)),
        (["--compile", "True"], dict(compile=True)),
        (["--compile", "--exact", "False"], dict(compile=True, exact=False)),  # a bare flag
        (["gpt2", "--B=2", "--compile"], dict(compile=True, B=2)),
        (["--compile=None", "--B=None"], dict(B=None)),
        (["--mode=never"], dict(mode="never")),
        (["--prompt="], dict(prompt="")),
        (["--prompt=--x = 'é'\n"], dict(prompt="--x = 'é'\n")),
        (["--prompts", "a b", "c"], dict(prompts=("a b", "c"))),
    ],
    ids=str,
)
def test_options(args: list[str], expected: dict[str, Any]) -> None:
    assert parse(*args) == Config(**expected)


@pytest.mark.parametrize(
    "args, hint",
    [
        (["--max_lrr=1"], "max_lr"),
        (["demo", "--max-lrr", "1"], "max_lr"),
        (["dmeo"], "demo"),
        (["--B=x"], "--B"),
        (["--max_lr"], "max_lr"),
        (["--mode=sometimes"], "never"),
        (["--B=2", "demo"], "demo"),
    ],
    ids=str,
)
def test_invalid_command_lines(args: list[str], hint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        parse(*args)
    assert error.value.code == 2
    assert re.search(rf"{hint}\b", "".join(capsys.readouterr()).replace("max-lr", "max_lr"))


def test_only_rank_0_prints(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for args in (["--help"], ["--max_lrr=1"], ["dmeo"]):
        with pytest.raises(SystemExit):
            parse(*args)
        assert "".join(capsys.readouterr()) == ""


def comments_of_constants(path: Path) -> dict[str, str]:
    """The comment on each constant of a script's class Config ("" where there is none)."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    (cls,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    found = {}
    for field in cls.body:
        if isinstance(field, ast.AnnAssign):
            lines = range(field.lineno, field.end_lineno + 1)
            found[field.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


SCRIPTS = [
    path for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("tools/*.py")) if "config.run(" in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_the_comment_of_every_constant(
    path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")
    script = importlib.import_module(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    for name in script.CONFIGS:
        with pytest.raises(SystemExit) as error:
            config.parse(script.CONFIGS, script.__doc__, [name, "--help"])
        assert error.value.code == 0
        shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
        comments = comments_of_constants(path)
        assert {key: text for key, text in comments.items() if not text or text not in shown} == {}


# -----------------------------------------------------------------------------
# Errors

SCRIPT = '''
"""A script outside of the repository."""
import json, os, signal, sys
from dataclasses import dataclass
from neogpt import config, files

@dataclass(frozen=True)
class Config:
    B: int = 1  # rows

def main(cfg):
    {body}

if __name__ == "__main__":
    config.run(main, {{"one": Config()}})
'''


def run_script(folder: Path, body: str, *args: str, rank: int = 0) -> tuple[int, str]:
    """Exit status and stderr of a script whose main has this body."""
    (folder / "script.py").write_text(SCRIPT.format(body=body))
    command = [sys.executable, str(folder / "script.py"), *args]
    done = subprocess.run(command, env=ENV | {"RANK": str(rank)}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_an_error_for_the_user_is_one_line_on_rank_0(tmp_path: Path) -> None:
    body = 'config.require("[1, inf)", B=cfg.B)'
    code, text = run_script(tmp_path, body, "--B=-3")
    assert code == 1 and text.count("\n") == 1 and "B=-3" in text
    assert run_script(tmp_path, body, "--B=-3", rank=1) == (1, "")
    assert run_script(tmp_path, body) == (0, "")


def test_an_oserror_is_one_line_on_every_rank(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    for rank in range(2):
        code, text = run_script(tmp_path, f"open({missing!r})", rank=rank)
        assert code == 1 and text.count("\n") == 1 and missing in text
    code, text = run_script(tmp_path, r"raise OSError('first line\nsecond line')")
    assert code == 1 and text.count("\n") == 1 and "second line" in text


@pytest.mark.parametrize(
    "body",
    [
        'int("x")',  # raised by C code
        'json.loads("{{")',  # by the standard library
        'raise ValueError("x")',  # by a file outside of the repository
        'config.require("[x, inf)", B=1)',  # in the repository, but not by a raise statement
        "config.require()",  # another exception
    ],
)
def test_bugs_keep_their_traceback(tmp_path: Path, body: str) -> None:
    code, text = run_script(tmp_path, body.replace("{{", "{"))
    assert code == 1 and text.startswith("Traceback") and "Error: " in text and 'script.py", line' in text


def test_ctrl_c_and_a_closed_pipe_end_without_traceback(tmp_path: Path) -> None:
    for rank in range(2):
        code, text = run_script(tmp_path, "os.kill(os.getpid(), signal.SIGINT)", rank=rank)
        assert code and text.count("\n") == 1 - rank and "Traceback" not in text
    (tmp_path / "script.py").write_text(SCRIPT.format(body="while True: print('a line', flush=True)"))
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == f"a line{os.linesep}".encode()
        process.stdout.close()  # as `head -1` does
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


# -----------------------------------------------------------------------------
# Ranges and tables


@pytest.mark.parametrize(
    "interval, inside, outside",
    [
        ("[1, inf)", [1, 1.5, 2**70], [0, -1, math.inf, math.nan]),
        ("(0, inf)", [1e-300, 1], [0.0, -0.0, math.inf]),
        ("[0, 1)", [0, 0.5], [1, 1.0001, math.nan]),
        ("[0, 1]", [0, 1], [-1e-9, 1 + 1e-9]),
        (f"[0, {2**63})", [2**63 - 2**10], [2**63, -1]),
    ],
)
def test_require(interval: str, inside: list[float], outside: list[float]) -> None:
    for value in (*inside, None):
        config.require(interval, rows=value)
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"rows={value} ")):
            config.require(interval, seed=inside[0], rows=value)


def test_format_table() -> None:
    table = config.format_table([["name", "loss"], ["gpt2-xl", "3.1"]])
    assert [line.split() for line in table.split("\n")] == [["name", "loss"], ["gpt2-xl", "3.1"]]
    assert len({line.rindex(cell) + len(cell) for line, cell in zip(table.split("\n"), ("loss", "3.1"))}) == 1
