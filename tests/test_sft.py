"""Supervised fine-tuning from end to end: killed, resumed, on two processes, with adapters, misused."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sft
import training
from checkpoints import list_checkpoints, load_checkpoint, load_model, open_checkpoint, save_checkpoint
from data import get_tokenizer
from hf import to_hf
from model import GPT, GPTConfig
from sft import Config, main, measure, prepare
from training import Dist

SCRIPT = Path(sft.__file__)
ALONE = Dist(0, 1, torch.device("cpu"))
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=96, n_tokens=257, vocab_size=320)
NAMES = ["Ada", "Leo", "Rosa", "Mona", "Jasper", "Cora", "Otto", "Ida"]
THINGS = ["hat", "nut", "jug", "pen", "soup", "coat"]


def write_base(folder: Path, seed: int = 0, stage: str = "pretraining") -> Path:
    """A random tiny model as a checkpoint of a stage; its folder."""
    torch.manual_seed(seed)
    raw = GPT(GPTConfig(**TINY))
    folder.mkdir(exist_ok=True)
    state = dict(stage=stage, step=3, model=raw.state_dict(), tokenizer="bytes")
    save_checkpoint(folder, state | dict(model_config=raw.config.__dict__), keep=9)
    return folder


def write_rows(path: Path, n: int = 40) -> Path:
    """n rows of different lengths, some with a context."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for i in range(n):
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            context = f"{name} has a {thing}." if i % 2 else ""
            answer = f"The {thing}." if i % 3 else f"\n{name} has the {thing}, and then {name} sleeps."
            row = dict(instruction=f"What does {name} have {i}?", context=context, response=answer)
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and rows."""
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    return folder


SETTINGS: dict[str, Any] = dict(
    val_data="",
    val_frac=0.2,
    rows_per_step=8,
    B=3,
    max_steps=12,
    eval_every=4,
    save_every=3,
    answer_rows=0,
    prompts=("What does Ada have?",),
    answer_tokens=6,
    device="cpu",
    precision="fp32",
    max_lr=5e-3,
)


@pytest.fixture
def cfg(world: Path, tmp_path: Path) -> Iterator[Config]:
    """A configuration that trains in a second. Signal handlers are put back afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    paths = dict(
        checkpoint=str(world / "base"), data=str(world / "rows.jsonl"), out_dir=str(tmp_path / "out")
    )
    yield Config(**paths, **SETTINGS)
    for signum, handler in before.items():
        signal.signal(signum, handler)


def tune(cfg: Config, **changed: Any) -> Path:
    """Train with some constants changed; return the folder."""
    cfg = replace(cfg, **changed)
    main(cfg)
    return Path(cfg.out_dir)


@pytest.mark.parametrize("packing", [False, True])
def test_the_step_can_be_compiled(cfg: Config, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the compiler's door: packed rows have one shape, others have many."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda raw, **options: asked.append(options) or raw)
    monkeypatch.setattr("finetune.require_compiler", lambda device: None)
    tune(cfg, compile=True, packing=packing, max_steps=1)
    assert asked == [dict(dynamic=not packing)]


def refused(cfg: Config, message: str, **changed: Any) -> None:
    """Check that training ends with a message of one line."""
    with pytest.raises(SystemExit, match=message) as error:
        tune(cfg, **changed)
    assert "\n" not in str(error.value)


def read_log(folder: Path) -> dict[tuple[int, str], str]:
    """The last value of every (step, name), as it is written."""
    text = (folder / "log.txt").read_text()
    return {(int(step), name): value for step, name, value in re.findall(r"^(\d+) (\w+) (\S+)$", text, re.M)}


def losses(folder: Path, name: str = "train") -> dict[int, float]:
    """Step -> value of one name."""
    return {step: float(value) for (step, key), value in read_log(folder).items() if key == name}


def notes(folder: Path) -> str:
    """What the log says behind `#`."""
    return "\n".join(re.findall("^#.*$", (folder / "log.txt").read_text(), re.M))


def bits(value: Any) -> Any:
    """A nested value with its tensors as bytes."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return (value.dtype, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def final_bits(folder: Path) -> Any:
    """The newest checkpoint and best.pt, as bytes, but for the configuration, which names folders."""
    states = [load_checkpoint(path) for path in (list_checkpoints(folder)[0], folder / "best.pt")]
    return [bits({key: value for key, value in state.items() if key != "config"}) for state in states]


def same_run(folder: Path, reference: Path) -> None:
    """Check two runs to be the same in every digit of the log and every bit of what they saved."""
    assert read_log(folder) == read_log(reference)
    assert final_bits(folder) == final_bits(reference)


# -----------------------------------------------------------------------------
# A run


def test_what_a_run_learns_and_leaves_behind(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    folder = tune(cfg, max_steps=40, eval_every=10, save_every=20)
    train, val = losses(folder), losses(folder, "val")
    assert train.keys() == set(range(40)) and val.keys() == {0, 10, 20, 30, 40}
    assert train[0] > 5 and train[39] < train[0] - 2 and val[40] < val[0] - 2
    assert {p.name for p in folder.iterdir()} == {"best.pt", "ckpt_000030.pt", "ckpt_000040.pt", "log.txt"}
    state = load_checkpoint(folder / "ckpt_000040.pt")
    assert (state["stage"], state["step"], state["tokenizer"]) == ("sft", 40, "bytes")
    assert state["scores"]["val"] == pytest.approx(val[40])
    load_model(str(folder), "", print, ("sft",))
    noted = notes(folder)
    assert "32 rows to learn from, 8 held out; 40 steps of 8 rows" in noted
    assert "the first row, with [what is learned]: What does" in noted
    assert len(re.findall(r"  > What does Ada have\? -> ", noted)) == 5
    assert "step     39/40" in capsys.readouterr().out


def test_it_learns_to_answer(cfg: Config, tmp_path: Path) -> None:
    rows = [dict(prompt=f"{name}?", response=f"A {thing}.") for name, thing in zip(NAMES, THINGS)]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(rows))
    few = dict(data=str(path), val_data=str(path), rows_per_step=6, answer_rows=6, prompts=("Leo?",))
    folder = tune(cfg, **few, max_steps=120, eval_every=60, max_lr=2e-2, answer_tokens=12)
    assert losses(folder, "exact") == {0: 0, 60: pytest.approx(losses(folder, "exact")[60]), 120: 1}
    assert losses(folder, "ended")[120] == losses(folder, "accuracy")[120] == 1
    assert losses(folder, "val")[120] < 0.05
    assert notes(folder).rpartition("  > Leo? -> ")[2].startswith("A nut.\n")


def test_the_held_out_loss_is_that_of_the_saved_model(cfg: Config) -> None:
    folder = tune(cfg)
    raw, tokenizer = load_model(str(folder), "", print)
    rows = sft.read_rows(cfg.data, ALONE, print)
    texts = [sft.prompt_text(row.instruction, row.context) for row in rows]
    _, held_out = sft.split_rows(texts, cfg.val_frac, cfg.seed)
    log = training.Log(folder, ALONE)
    examples = prepare([rows[i] for i in held_out], 96, tokenizer, "", log)
    loss, accuracy = measure(raw, examples, 5, training.autocast("fp32", ALONE.device), ALONE)
    assert loss == pytest.approx(losses(folder, "val")[12], rel=1e-5)
    assert accuracy == pytest.approx(losses(folder, "accuracy")[12])


def test_best_pt_has_the_lowest_held_out_loss(cfg: Config, tmp_path: Path) -> None:
    """Learning four rows by heart makes the others worse: the best model is not the last."""
    few, others = write_rows(tmp_path / "few.jsonl", 4), tmp_path / "others.jsonl"
    rows = [dict(instruction=f"What does {n} have 1?", context="", response="The zebra runs.") for n in NAMES]
    others.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = dict(data=str(few), val_data=str(others), max_steps=60, eval_every=5, save_every=7, keep=99)
    folder = tune(cfg, **changed, max_lr=1e-2)
    val = losses(folder, "val")
    lowest = min(list(val)[1:], key=val.get)  # step 0 is the model to start from
    assert 0 < lowest < 60 and val[lowest] < val[60] - 0.1
    best = load_checkpoint(folder / "best.pt")
    assert best["step"] == lowest and best["scores"]["val"] == pytest.approx(val[lowest])
    assert bits(best["model"]) == bits(load_checkpoint(folder / f"ckpt_{lowest:06d}.pt")["model"])
    assert "optimizers" not in best
    assert load_checkpoint(folder / "ckpt_000060.pt")["scores"]["best"] == pytest.approx(val[lowest])

    # continued from behind the best, it is still known to be the best
    resumed = Path(cfg.out_dir + "2")
    resumed.mkdir()
    shutil.copy(folder / "ckpt_000056.pt", resumed)
    tune(cfg, **changed, max_lr=1e-2, out_dir=str(resumed))
    assert not (resumed / "best.pt").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_the_micro_batch_does_not_change_the_curve(cfg: Config, packing: bool) -> None:
    reference = tune(cfg, B=8)
    for B in (1, 3):
        folder = tune(cfg, B=B, packing=packing, out_dir=f"{cfg.out_dir}{B}")
        for name in ("train", "val", "norm"):
            assert losses(folder, name) == pytest.approx(losses(reference, name), rel=1e-4), name


def test_evaluation_answers_and_checkpoints_do_not_disturb_training(cfg: Config) -> None:
    often = tune(cfg, eval_every=1, save_every=1, answer_rows=4)
    never = tune(cfg, eval_every=100, save_every=100, prompts=(), out_dir=cfg.out_dir + "2")
    for name in ("train", "norm", "lr"):
        assert losses(often, name) == losses(never, name) and len(losses(often, name)) == 12


def test_the_seed_chooses_split_and_order(cfg: Config) -> None:
    first = tune(cfg, max_steps=2)
    again = tune(cfg, max_steps=2, out_dir=cfg.out_dir + "2")
    other = tune(cfg, max_steps=2, seed=1, out_dir=cfg.out_dir + "3")
    assert read_log(first) == read_log(again) and read_log(first) != read_log(other)


def test_from_a_folder_of_hugging_face(cfg: Config, world: Path, tmp_path: Path) -> None:
    to_hf(load_model(str(world / "base"), "", print)[0], tmp_path / "hf")
    folder = tune(cfg, hf=str(tmp_path / "hf"), max_steps=3)
    reference = tune(cfg, max_steps=3, out_dir=cfg.out_dir + "2")
    # the padded rows of the vocabulary are gone, and with them a little of the softmax's sum
    assert losses(folder)[0] == pytest.approx(losses(reference)[0], abs=0.5)
    assert load_checkpoint(list_checkpoints(folder)[0])["model_config"]["vocab_size"] == 257


# -----------------------------------------------------------------------------
# Continued

KINDS = {
    "plain": dict(),
    "lora": dict(lora_rank=2, lora_alpha=8.0),
    "adapters only": dict(lora_rank=2, lora_alpha=8.0, lora_merge=False),
    "packing": dict(packing=True),
}
BOTH = KINDS["adapters only"] | KINDS["packing"]


@pytest.mark.parametrize("kind", KINDS)
def test_continued_from_any_checkpoint_is_exact(cfg: Config, kind: str) -> None:
    settings = KINDS[kind] | dict(keep=99)
    whole = tune(cfg, **settings)
    for step in (3, 4, 9):  # 4 was saved because it was the best
        folder = Path(f"{cfg.out_dir}-{step}")
        folder.mkdir()
        shutil.copy(whole / f"ckpt_{step:06d}.pt", folder)
        shutil.copy(whole / "best.pt", folder)
        tune(cfg, **settings, out_dir=str(folder))
        log = read_log(whole)
        assert read_log(folder) == {
            key: log[key] for key in log if key[0] >= step and key in read_log(folder)
        }
        assert losses(folder).keys() == set(range(step, 12))
        assert final_bits(folder) == final_bits(whole)
        assert "changed: out_dir" in notes(folder)


def test_more_steps_and_finished_runs(cfg: Config) -> None:
    folder = tune(cfg)
    before = read_log(folder), final_bits(folder)
    tune(cfg)
    assert (read_log(folder), final_bits(folder)) == before
    tune(cfg, max_steps=15)
    assert losses(folder).keys() == set(range(15))
    assert "continuing" in notes(folder) and "max_steps 12 -> 15" in notes(folder)


# Starting Python and torch takes seconds. Runs are forked from one process that has only imported them.
NURSERY = """
import json, os, sys
import torch._dynamo
import torch.distributed
import sft
from training import barrier, parse

for line in sys.stdin:
    sys.argv, ranks = json.loads(line)
    pids = []
    for environment in ranks:
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(environment)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                # behind the last barrier straight out: a store's thread may never end in a forked process
                sft.cleanup = lambda dist: (barrier(dist), os._exit(0))
                sft.main(parse(sft.CONFIGS, sft.__doc__))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
    print(*pids, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
"""


def command(world: Path, out_dir: Path, **settings: Any) -> list[str]:
    """The command line of a run like those in this process."""
    settings = SETTINGS | dict(checkpoint=world / "base", data=world / "rows.jsonl") | settings
    settings.pop("prompts", None)
    constants = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(SCRIPT), f"--out_dir={out_dir}", *constants]


def environment() -> dict[str, str]:
    """One thread: more do not pay for a tiny model, least of all on a busy machine."""
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(SCRIPT.parent))


def n_losses(folder: Path) -> int:
    """How many training losses a log holds, those of steps done twice counted twice."""
    path = folder / "log.txt"
    return path.read_bytes().count(b" train ") if path.exists() else 0


def wait_for(folder: Path, n: int, running: Callable[[], bool]) -> None:
    """Return when a log holds `n` training losses, or when nothing runs that could write them."""
    give_up = time.monotonic() + 120
    while n_losses(folder) < n and running():
        assert time.monotonic() < give_up, f"{n_losses(folder)} of {n} losses after two minutes"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen]:
    """A process that forks a run for every command line it reads."""
    if not hasattr(os, "fork"):
        pytest.skip("forks the runs that it kills")
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", NURSERY], env=environment(), **pipes) as process:
        yield process
        process.stdin.close()


def start(nursery: subprocess.Popen, args: list[str], *ranks: dict[str, str]) -> list[int]:
    """Fork a run, in as many processes as there are environments to add; their ids."""
    nursery.stdin.write(json.dumps([args[1:], ranks]) + "\n")
    nursery.stdin.flush()
    return [int(pid) for pid in nursery.stdout.readline().split()]


def live(nursery: subprocess.Popen, args: list[str], folder: Path, n: int | None, delay: float = 0) -> int:
    """Fork a run, kill it when it has logged n losses (None: let it end), and return its exit status."""
    before = n_losses(folder)
    (pid,) = start(nursery, args, {})
    if n is not None:
        try:
            wait_for(folder, before + n, lambda: nursery.poll() is None)
            time.sleep(delay)
        finally:
            os.kill(pid, signal.SIGKILL)
    return int(nursery.stdout.readline())


@pytest.mark.parametrize("kind", [{}, BOTH], ids=["plain", "adapters and packing"])
def test_killed_at_random_steps_equals_never_killed(
    nursery: subprocess.Popen, world: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    settings = kind | dict(max_steps=50, eval_every=7, save_every=5, answer_rows=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert live(nursery, command(world, whole, **settings), whole, None) == 0
    assert losses(whole).keys() == set(range(50))
    rng = random.Random(len(kind))
    args = command(world, killed, **settings)
    for n in (rng.randrange(6, 14), 0, rng.randrange(6, 14), rng.randrange(6, 14)):
        # it did not end by itself
        assert live(nursery, args, killed, n, rng.uniform(0, 0.02)) == -signal.SIGKILL
    assert notes(killed).count("continuing") >= 2
    assert live(nursery, args, killed, None) == 0
    same_run(killed, whole)
    assert not list(killed.glob("*.tmp"))


def test_stopped_by_a_signal_equals_never_stopped(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune(cfg)
    step_of = sft.train_step

    def interrupted(*args: Any, **settings: Any) -> Any:
        if n_losses(Path(cfg.out_dir + "2")) == 6:
            os.kill(os.getpid(), signal.SIGTERM)  # noted before the next step
        return step_of(*args, **settings)

    monkeypatch.setattr(sft, "train_step", interrupted)
    stopped = tune(cfg, out_dir=cfg.out_dir + "2")
    monkeypatch.undo()
    assert "stopped at step 8; the same command continues" in notes(stopped)
    assert list_checkpoints(stopped)[0].name == "ckpt_000008.pt"
    tune(cfg, out_dir=cfg.out_dir + "2")
    same_run(stopped, whole)


# -----------------------------------------------------------------------------
# Two processes


@pytest.mark.parametrize("kind", [{}, BOTH], ids=["plain", "adapters and packing"])
def test_two_processes_equal_one(
    cfg: Config, nursery: subprocess.Popen, world: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    settings = kind | dict(max_steps=6, eval_every=3, answer_rows=3, keep=9)
    settings |= dict(rows_per_step=7, B=2)  # seven rows: one rank has fewer, and an empty sequence
    one, two = tune(cfg, **settings | dict(B=7, prompts=())), tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # as torchrun sets them
    start(nursery, command(world, two, **settings), shared | dict(RANK="0"), shared | dict(RANK="1"))
    assert nursery.stdout.readline() == "0 0\n"
    assert notes(two).count("devices=2") == 1 and n_losses(two) == 6  # only rank 0 writes
    assert losses(two).keys() == set(range(6))
    for name in ("train", "val", "accuracy", "exact", "ended"):
        assert losses(two, name) == pytest.approx(losses(one, name), abs=1e-5), name
    a, b = (load_checkpoint(folder / "best.pt")["model"] for folder in (one, two))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3  # Adam divides by tiny roots


# -----------------------------------------------------------------------------
# Adapters


def test_adapters_are_saved_merged_and_on_their_own(cfg: Config, world: Path) -> None:
    folder = tune(cfg, **KINDS["lora"])
    merged, _ = load_model(str(folder), "", print)
    noted: list[str] = []
    loaded, _ = load_model(str(folder / "adapter"), "", noted.append)
    assert f"an adapter for {world / 'base'}" in noted[-1]
    idx = torch.arange(60).view(2, 30)
    torch.testing.assert_close(loaded(idx)[0], merged(idx)[0], rtol=0, atol=1e-5)
    base, _ = load_model(str(world / "base"), "", print)
    assert (merged(idx)[0] - base(idx)[0]).abs().max() > 1e-2
    for name, p in base.state_dict().items():  # only the blocks' matrices have moved
        moved = ".h." in name and p.dim() == 2
        assert torch.equal(p, merged.state_dict()[name]) != moved, name
    assert losses(folder)[11] < losses(folder)[0]


def test_checkpoints_of_adapters_only(cfg: Config) -> None:
    merged = tune(cfg, **KINDS["lora"])
    folder = tune(cfg, **KINDS["adapters only"], out_dir=cfg.out_dir + "2")
    assert read_log(folder) == read_log(merged)
    state = load_checkpoint(folder / "ckpt_000012.pt")
    assert state["model"] == {}
    assert bits(state["adapters"]) == bits(load_checkpoint(merged / "ckpt_000012.pt")["adapters"])
    assert 2 * (folder / "ckpt_000012.pt").stat().st_size < (merged / "ckpt_000012.pt").stat().st_size
    best = load_checkpoint(folder / "best.pt")["model"]  # is whole
    assert bits(best) == bits(load_checkpoint(merged / "best.pt")["model"])
    a, b = (load_model(str(path / "adapter"), "", print)[0].state_dict() for path in (folder, merged))
    assert bits(a) == bits(b)


# -----------------------------------------------------------------------------
# Misuse


def test_resuming_from_other_weights_is_refused(cfg: Config, tmp_path: Path) -> None:
    for kind in ("plain", "lora"):
        out = dict(out_dir=f"{cfg.out_dir}-{kind}", max_steps=3)
        folder = tune(cfg, **out, **KINDS[kind])
        before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
        other = write_base(tmp_path / "other", seed=1)
        refused(cfg, "started from other weights than .*other", **out, **KINDS[kind], checkpoint=str(other))
        assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before
    refused(cfg, "--lora_rank=2", **out, **KINDS["lora"] | dict(lora_rank=4))
    refused(cfg, "--lora_alpha=8.0", **out, **KINDS["lora"] | dict(lora_alpha=4.0))
    refused(cfg, "--lora_rank=2", **out)
    refused(cfg, "holds checkpoints, and --resume=never", **out, **KINDS["lora"], resume="never")


def test_out_dir_must_not_hold_the_checkpoint(cfg: Config, world: Path) -> None:
    base = world / "base"
    before = sorted(base.iterdir())
    for checkpoint in (base, base / "ckpt_000003.pt", base / ".." / "base"):
        message = "holds the checkpoint to start from: choose another --out_dir"
        refused(cfg, message, checkpoint=str(checkpoint), out_dir=str(base))
    assert sorted(base.iterdir()) == before


def test_the_stage_of_the_checkpoint(cfg: Config, tmp_path: Path) -> None:
    dpo = write_base(tmp_path / "dpo", stage="dpo")
    refused(cfg, r"is of dpo: start from one of pretraining \(train_gpt2.py\) or sft", checkpoint=str(dpo))
    assert not Path(cfg.out_dir).exists()
    pretrained = write_base(tmp_path / "out")  # checkpoints of another stage where this one's should go
    refused(cfg, "is not of sft: choose another --out_dir", out_dir=str(pretrained))
    again = tune(cfg, checkpoint=str(write_base(tmp_path / "sft", stage="sft")), out_dir=cfg.out_dir + "2")
    assert losses(again).keys() == set(range(12))


def test_a_missing_checkpoint(cfg: Config, tmp_path: Path) -> None:
    refused(cfg, "no checkpoint in .*nowhere.*python train_gpt2.py", checkpoint=str(tmp_path / "nowhere"))
    assert not Path(cfg.out_dir).exists()


@pytest.mark.parametrize(
    "changed",
    [
        dict(T=0),
        dict(T=-1),
        dict(T=97),
        dict(B=0),
        dict(rows_per_step=0),
        dict(max_steps=0),
        dict(max_steps=-3),
        dict(eval_every=0),
        dict(save_every=0),
        dict(keep=0),
        dict(lora_rank=-1),
        dict(seed=-1),
        dict(beta2=1.0),
        dict(warmup_frac=1.5),
        dict(max_lr=float("nan")),
        dict(device="gpu"),
    ],
    ids=str,
)
def test_a_constant_out_of_range_is_named(cfg: Config, changed: dict[str, Any]) -> None:
    ((name, value),) = changed.items()
    refused(cfg, f"{name}={value} ", **changed)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_ndlinear_model_is_tuned_like_any_other(cfg: Config, tmp_path: Path, lora_rank: int) -> None:
    raw = GPT(GPTConfig(**TINY, mlp="ndlinear"))
    state = dict(stage="pretraining", step=1, model=raw.state_dict(), tokenizer="bytes")
    (tmp_path / "nd").mkdir()
    save_checkpoint(tmp_path / "nd", state | dict(model_config=raw.config.__dict__), keep=1)
    changed = dict(checkpoint=str(tmp_path / "nd"), max_steps=2, lora_rank=lora_rank)
    assert losses(tune(cfg, **changed)).keys() == {0, 1}


def test_the_zeros_of_a_pruned_model_stay(cfg: Config, tmp_path: Path) -> None:
    state = open_checkpoint(cfg.checkpoint)
    names = [name for name in state["model"] if name.endswith(("c_attn.weight", "c_fc.weight"))]
    masks = {name: torch.rand(state["model"][name].shape) < 0.5 for name in names}
    for name, mask in masks.items():
        state["model"][name] = state["model"][name] * mask
    (tmp_path / "pruned").mkdir()
    save_checkpoint(tmp_path / "pruned", state, keep=1)
    changed = dict(checkpoint=str(tmp_path / "pruned"), max_steps=3, out_dir=str(tmp_path / "kept"))
    tune(cfg, **changed)
    tuned = open_checkpoint(tmp_path / "kept")["model"]
    for name, mask in masks.items():
        assert torch.equal(tuned[name] != 0, mask) and not torch.equal(tuned[name], state["model"][name])
    tune(cfg, **changed | dict(out_dir=str(tmp_path / "filled"), keep_masks=False))
    assert (open_checkpoint(tmp_path / "filled")["model"][names[0]] != 0).all()
    refused(cfg, "keep_masks=False", **changed | dict(out_dir=str(tmp_path / "l"), lora_rank=2))


def test_rows_of_which_nothing_is_left(cfg: Config, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    blank, good = dict(instruction="a", response=" \n"), dict(instruction="b", response="c")
    long = dict(instruction="x" * 100, response="c")
    for rows, message in [
        ([blank] * 3, "no row of .*rows.jsonl is left to learn from"),
        ([long] * 3, "no row of .*rows.jsonl|no row of the held-out part"),
        ([good], "no row of the held-out part is left to learn from"),
    ]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        refused(cfg, message, data=str(path))
    refused(cfg, "no file .*none.jsonl", data=str(tmp_path / "none.jsonl"))
    refused(cfg, "no file .*none.jsonl", val_data=str(tmp_path / "none.jsonl"))
    assert not list_checkpoints(Path(cfg.out_dir))


def test_cut_and_dropped_rows_are_counted_in_the_log(cfg: Config, tmp_path: Path) -> None:
    lines = [
        dict(prompt="x" * 200, response="too long a prompt"),
        dict(prompt="a", response=""),
        dict(prompt="b", response="too long a response " * 9),
        dict(prompt="c", response="fine"),
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tune(cfg, data=str(path), val_data=cfg.data, max_steps=2)
    noted = notes(folder)
    assert f"{path}: 1 of 4 rows dropped: blank responses" in noted
    assert f"{path}: 1 rows dropped: prompts longer than T=96 tokens" in noted
    assert f"{path}: 1 responses cut to fit into T=96 tokens" in noted
    assert "2 rows to learn from, 40 held out" in noted


def test_prompts_to_answer_may_be_odd(cfg: Config) -> None:
    prompts = ("", "日本\n<|endoftext|>", "longer than the model's ninety-six tokens " * 5)
    folder = tune(cfg, max_steps=1, prompts=prompts, answer_rows=99)
    assert notes(folder).count("#   > ") == 2 * 3


def test_the_tokenizer_is_the_checkpoints(cfg: Config) -> None:
    state = load_checkpoint(list_checkpoints(tune(cfg, max_steps=1))[0])
    assert state["tokenizer"] == get_tokenizer("bytes").name
