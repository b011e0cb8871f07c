"""The command line, its help, and how errors end a script."""

import importlib
import inspect
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
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


CONFIGS = {"gpt2": Config(), "demo": Config(max_lr=1e-3, B=4)}


def parse(*args: str) -> Config:
    return config.parse(CONFIGS, "What the script does.", args)


OPTIONS = {
    (): {},
    ("demo", "--max_lr=0.5"): dict(max_lr=0.5, B=4),
    ("--max-lr", "1e-3"): dict(max_lr=1e-3),
    ("--compile=False", "--exact", "False"): dict(compile=False, exact=False),
    ("--compile", "--B=2", "--exact"): dict(compile=True, B=2),  # bare flags
    ("--compile=None", "--B=None"): dict(B=None),
    ("--mode=never", "--prompt="): dict(mode="never", prompt=""),
    ("--prompt=--x = 'é'\n",): dict(prompt="--x = 'é'\n"),
    ("--prompt=~/a~/b",): dict(prompt=f"{Path.home()}/a~/b"),
    ("--prompt=x=~/a",): dict(prompt="x=~/a"),
}


@pytest.mark.parametrize("args", OPTIONS, ids=str)
def test_named_configurations_and_options(args: tuple[str, ...]) -> None:
    assert parse(*args) == Config(**OPTIONS[args])


SHOWN = {("demo", "--max_lrr=1"): "max_lr", ("dmeo",): "demo", ("--B=x",): "B"}  # the closest name; the option
SHOWN |= {("--help",): "rate"}  # a comment


@pytest.mark.parametrize("args", SHOWN, ids=str)
def test_rank_0_prints(args: tuple[str, ...], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as error:
            parse(*args)
        assert error.value.code == (0 if "--help" in args else 2)
        printed = "".join(capsys.readouterr())
        assert re.search(rf"{SHOWN[args]}\b", printed) if rank == "0" else printed == ""


SCRIPTS = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]) if "config.run(" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_every_comment(path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    script = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    with pytest.raises(SystemExit) as error:
        config.parse(script.CONFIGS, script.__doc__, [[*script.CONFIGS][-1], "--help"])
    assert error.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    classes = [inspect.getsource(part) for part in script.Config.__mro__[-2::-1]]  # a base first
    lines = re.findall(r"^    (\w+): (.*)$", "\n".join(classes), re.M)
    comments = {name: line.partition("  # ")[2] for name, line in lines}
    assert comments and {k: v for k, v in comments.items() if len(v) < 9 or v not in shown} == {}


SCRIPT = '''"""A script outside of the repository."""
import os, signal
from dataclasses import dataclass
from neogpt import config
@dataclass(frozen=True)
class Config:
    B: int = 1
def main(cfg):
    BODY
if __name__ == "__main__":
    config.run(main, {"one": Config()})
'''


def run_script(folder: Path, body: str, *args: str, rank: int = 0, n_lines: int = 0, **env: str) -> tuple[int, str]:
    """Exit status and stderr of a script whose main has this body; its stdout is closed after n_lines lines."""
    (folder / "script.py").write_text(SCRIPT.replace("BODY", body))
    command, pipes = [sys.executable, str(folder / "script.py"), *args], dict(stdout=-1, stderr=-1, text=True)
    with subprocess.Popen(command, env=ENV | {"RANK": str(rank)} | env, **pipes) as process:
        assert all(process.stdout.readline() for _ in range(n_lines))
        process.stdout.close()
        text = process.stderr.read()
        return process.wait(timeout=60), text


ERRORS = {  # the body of main -> a part of the only line
    'config.require("[1, inf)", B=cfg.B)': "B=-3",
    "open('a missing file')": "a missing file",
    r"raise OSError('first line\nsecond line')": "second line",
    "raise type('OutOfMemoryError', (RuntimeError,), {})('20.00 GiB. GPU 0 has …')": "20.00 GiB: use a smaller --B",
}


def test_errors_for_the_user_are_one_line(tmp_path: Path) -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    for body, word in ERRORS.items():
        code, text = run_script(tmp_path, body, "--B=-3")
        assert code == 1 and text.count("\n") == 1 and word in text
    assert run_script(tmp_path, next(iter(ERRORS))) == (0, "")
    assert run_script(tmp_path, next(iter(ERRORS)), "--B=-3", rank=1) == (1, "")  # all ranks see the same value
    assert "B=-3" in run_script(tmp_path, next(iter(ERRORS)), "--B=-3", rank=8, LOCAL_RANK="0")[1]  # another machine
    assert "a missing file" in run_script(tmp_path, "open('a missing file')", rank=1)[1]  # perhaps only on one node


def test_bugs_keep_their_traceback(tmp_path: Path) -> None:
    not_raised_by_the_repository = ['int("x")', 'raise ValueError("x")', 'config.require("[x, 1]")']
    for body in [*not_raised_by_the_repository, "config.run()"]:  # the last is a TypeError
        code, text = run_script(tmp_path, body)
        assert code == 1 and text.startswith("Traceback") and "Error: " in text and 'script.py", line' in text


def test_ctrl_c_and_a_closed_pipe_end_without_traceback(tmp_path: Path) -> None:
    for rank in range(2):
        code, text = run_script(tmp_path, "os.kill(os.getpid(), signal.SIGINT)", rank=rank)
        assert code and text.count("\n") == 1 - rank and "Traceback" not in text
    log = "from neogpt import runtime; runtime.setup('cpu')\n    while True: runtime.print0('a line')"
    for body in ("while True: print('a line', flush=True)", log):
        assert run_script(tmp_path, body, n_lines=2) == (0, "")  # as `head -2`


def test_require() -> None:
    cases = {
        "[1, inf)": ([1, 1.5, 2**62, 1e300, None], [0, -1, math.inf, math.nan, 2**63]),
        "(0, inf)": ([1e-300, 1], [0.0, -0.0, math.inf, math.nan]),
        "[0, 1)": ([0, 0.5, None], [1, 1.0001, -1e-9]),
        "[0, 1]": ([0, 1], [-1e-9, 1 + 1e-9, math.nan]),
    }
    for interval, (inside, outside) in cases.items():
        for value in inside:
            config.require(interval, rows=value)
        for value in outside:
            with pytest.raises(ValueError, match=re.escape(f"rows={value} ")):
                config.require(interval, seed=inside[0], rows=value)
