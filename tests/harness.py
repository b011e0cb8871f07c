"""What the tests of the training scripts share: logs and checkpoints compared bit for bit, runs that are killed and
resumed, runs on several ranks, and invalid options.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import torch.multiprocessing
from torch import Tensor

from neogpt import checkpoint, config, data, model, run, runtime

ROOT = Path(__file__).resolve().parent.parent
ALONE = runtime.Runtime(0, 1, torch.device("cpu"), "fp32")
# one thread: more do not pay for a tiny model, least of all on a busy machine
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
ENV["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
BYTES = data.get_tokenizer("bytes")
ND = dict(mlp="ndlinear", mlp_width=24, mlp_modes=3)  # an NdLinear MLP for `tiny_model`


# -----------------------------------------------------------------------------
# Tokenizers, models and rows


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer. The test is skipped if the vocabulary must be downloaded and cannot be."""
    try:
        return data.get_tokenizer(name)
    except OSError as error:
        pytest.skip(str(error))


def tiny_model(seed: int = 0, scale: float = 0.0, **shape: Any) -> model.GPT:
    """A model with the byte tokenizer's vocabulary and 2 layers of width 16; scale: noise added to all weights."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, n_tokens=257, vocab_size=320) | shape
    torch.manual_seed(seed)
    raw = model.GPT(model.GPTConfig(**shape))
    with torch.no_grad():
        for p in raw.parameters():
            p.add_(scale * torch.randn_like(p))
    return raw


def write_model(folder: Path, raw: model.GPT, stage: str = "pretraining", **keys: Any) -> Path:
    """Write a checkpoint of the model, of step 7 by default, into a folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict(step=7, model=raw.state_dict(), model_config=asdict(raw.config), tokenizer="bytes") | keys
    checkpoint.write(folder / f"ckpt_{keys['step']:06d}.pt", checkpoint.Checkpoint(stage, **keys))
    return folder


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows as .jsonl; return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def edit_json(path: Path, **changes: Any) -> None:
    """Change values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -----------------------------------------------------------------------------
# Logs and checkpoints


def read_log(folder: Path) -> dict[tuple[int, str], str]:
    """The last value of every (step, name) as written, without times and speeds."""
    lines = (folder / "log.txt").read_bytes().decode().split("\n")
    found = [m for line in lines if (m := re.fullmatch(r"(\d+) (\S+) (\S+)", line))]
    return {(int(m[1]), m[2]): m[3] for m in found if not m[2].endswith(("seconds", "_speed"))}


def losses(folder: Path, name: str = "train") -> dict[int, float]:
    """Step -> value of one name."""
    return {step: float(value) for (step, key), value in read_log(folder).items() if key == name}


def notes(folder: Path) -> str:
    """The lines of the log that start with #."""
    return "\n".join(line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("#"))


def samples(folder: Path) -> list[str]:
    """The lines of the log that start a sample."""
    return [line for line in notes(folder).splitlines() if line.startswith("#   > ")]


def n_losses(folder: Path) -> int:
    """How many training losses the log holds; repeated steps count again."""
    path = folder / "log.txt"
    return len(re.findall(rb"^\d+ train ", path.read_bytes(), re.M)) if path.exists() else 0


def bits(value: Any) -> Any:
    """A nested value with its tensors as bytes."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return (value.dtype, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def final_bits(folder: Path) -> Any:
    """Step, position, weights, adapters and moments of a folder's newest checkpoint, as bytes."""
    ckpt = checkpoint.read(checkpoint.list_checkpoints(folder)[0])
    return bits([ckpt.step, ckpt.n_sequences, ckpt.model, ckpt.adapters, ckpt.optimizers])


def assert_same_run(folder: Path, reference: Path, from_step: int = 0) -> None:
    """Compare two runs: every digit of the log from a step on, and every bit of the last checkpoint."""
    got = {key: value for key, value in read_log(folder).items() if key[0] >= from_step}
    expected = {key: value for key, value in read_log(reference).items() if key[0] >= from_step}
    assert any(name == "train" for _, name in expected)
    assert {k: (got.get(k), v) for k, v in expected.items() if got.get(k) != v} == {}
    assert final_bits(folder) == final_bits(reference)


def assert_close_runs(
    folder: Path, reference: Path, names: Iterable[str] = ("train", "val"), abs: float = 1e-5
) -> None:
    """Compare the losses of two runs whose sums are in another order. abs: fp32 rounding of a mean loss."""
    for name in names:
        expected = losses(reference, name)
        assert expected, name
        assert losses(folder, name) == pytest.approx(expected, rel=1e-5, abs=abs), name


# -----------------------------------------------------------------------------
# Runs in this process


def resume(folder: Path, whole: Path, step: int) -> Path:
    """Make a folder with another run's checkpoint of a step, from which a run continues; return it."""
    folder.mkdir()
    shutil.copy(whole / f"ckpt_{step:06d}.pt", folder)
    return folder


def train(main: Callable, cfg: Any, **changed: Any) -> Path:
    """Run a script's main with a changed configuration; return its out_dir. Signal handlers are restored."""
    cfg = replace(cfg, **changed)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    config.check(cfg)  # as config.run does
    try:
        main(cfg)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return Path(cfg.out_dir)


@contextmanager
def error(*words: object) -> Iterator[None]:
    """Check that the block ends with an error for the user, in one line that contains these words."""
    with pytest.raises((ValueError, OSError)) as raised:
        yield
    message = str(raised.value)
    assert "\n" not in message and not [word for word in words if str(word) not in message], message


def refused(main: Callable, cfg: Any, *words: object, **changed: Any) -> None:
    """Check that a script refuses a configuration with one line that contains these words."""
    with error(*words):
        train(main, cfg, **changed)


def check_changes_are_reported(main: Callable, cfg: Any, changes: dict[str, dict | Callable[[], object]]) -> None:
    """Check that a resumed run names everything that has changed. changes: part of the line -> changed constants, or a
    function that changes files or functions.
    """
    steps = iter(range(2, 99))

    def reported() -> str:
        folder = train(main, cfg, max_steps=next(steps), save_every=1)
        lines = notes(folder).rpartition("continuing ")[2].splitlines()
        return "\n".join(line for line in lines if "changed" in line)

    reported()
    with pytest.MonkeyPatch.context() as patch:
        for word, change in changes.items():
            assert "changed since" not in reported() and "changed: max_steps" in notes(Path(cfg.out_dir))
            if isinstance(change, dict):
                cfg = replace(cfg, **change)
            else:
                change()
            assert word in reported(), word
        for word, module, name in (("code", run, "code_revision"), ("processor", runtime, "processor")):
            patch.setattr(module, name, lambda *_: "other")
            assert f"{word} " in reported().partition("changed since")[2], word
        patch.setattr(torch, "__version__", "9.9")
        assert "torch 2." in reported().partition("changed since")[2]
        cfg = replace(cfg, precision="bf16")
        assert "precision fp32 -> bf16" in reported().partition("changed since")[2]


# -----------------------------------------------------------------------------
# Functions on several ranks


def free_port() -> str:
    """A port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def work_on_rank(rank: int, env: dict[str, str], folder: Path, work: Callable) -> None:
    """The process of one rank: write down what `work(rt)` returns."""
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    rt = runtime.setup("cpu", "fp32")
    torch.save(work(rt), folder / f"rank{rank}.pt")
    if rt.world_size > 1:
        torch.distributed.barrier()
    runtime.cleanup(rt)


def on_ranks(folder: Path, work: Callable[[runtime.Runtime], Any], n_ranks: int = 2) -> list[Any]:
    """What `work(rt)`, which can be pickled, returns on each rank. folder: for temporary files."""
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(n_ranks))
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp"])  # imported once
    torch.multiprocessing.start_processes(work_on_rank, (env, folder, work), n_ranks, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(n_ranks)]


# -----------------------------------------------------------------------------
# Runs in other processes

# Importing torch takes seconds. Runs are forked from one process that has only imported the scripts.
FORK_SERVER = """
import importlib, json, os, sys
import torch._dynamo, torch.distributed.fsdp
from neogpt import config, runtime
scripts = {name: importlib.import_module(name) for name in ("train_gpt2", "sft", "dpo", "grpo", "hellaswag")}

def leave(rt):  # the thread of a store may never end in a forked process
    if rt.world_size > 1:
        torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)

for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ.update(order["env"])
        sys.argv = [order["script"], *order["args"]]
        runtime.cleanup = leave
        script = scripts[order["script"]]
        script.__name__ = "__main__"
        try:
            script.main(config.parse(script.CONFIGS, script.__doc__))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
"""


class ForkServer:
    """Starts runs of the training scripts."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def ask(self, order: Any) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, script: str, args: list[str], **env: str) -> int:
        """Start a run; return its process id."""
        return self.ask(dict(script=script, args=args, env=env))

    def wait(self, pid: int) -> int:
        """The exit status of a run, when it has ended."""
        return self.ask(pid)

    def run(self, script: str, args: list[str], n_ranks: int = 1) -> None:
        """Run a script to its end, as torchrun does if there are several ranks."""
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        ranks = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n_ranks)) for r in range(n_ranks)]
        pids = [self.start(script, args, **env, **rank) for rank in ranks]
        assert [self.wait(pid) for pid in pids] == [0] * n_ranks


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A server that forks runs; used by the fixture `server` in conftest.py."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", FORK_SERVER], env=ENV, cwd=ROOT, **pipes) as process:
        yield ForkServer(process)
        process.kill()  # it would take seconds to unload its modules


def command_line(cfg: Any) -> list[str]:
    """The arguments that give a configuration."""
    defaults, args = asdict(type(cfg)()), []
    for name, value in asdict(cfg).items():
        if isinstance(value, tuple):
            args += [f"--{name}", *value]
        elif value != defaults[name]:
            args.append(f"--{name}={value}")
    return args


def kill_and_resume(server: ForkServer, script: str, cfg: Any, moments: list[int], seed: int = 0) -> Path:
    """Run a script to its end, killed with SIGKILL after each of `moments` more logged losses; return its out_dir."""
    folder, rng = Path(cfg.out_dir), random.Random(seed)
    for n in moments:
        target, give_up = n_losses(folder) + n, time.monotonic() + 120
        pid = server.start(script, command_line(cfg))
        try:
            while n_losses(folder) < target:
                assert time.monotonic() < give_up, f"{n_losses(folder)} of {target} losses after two minutes"
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        finally:
            os.kill(pid, signal.SIGKILL)
        assert server.wait(pid) == -signal.SIGKILL  # it did not end by itself
    server.run(script, command_line(cfg))
    assert "continuing" in notes(folder)
    assert not list(folder.glob("*.tmp"))
    return folder
