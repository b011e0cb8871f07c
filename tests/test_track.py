"""track.py: what trackers receive from runs that are killed and resumed, and runs whose tracker fails or hangs."""

import json
import time
from dataclasses import replace
from pathlib import Path

import harness
import pytest

import train_gpt2
from neogpt import data, run, runtime, track
from tools import plot

# Stands in for the packages wandb and trackio: writes what it receives, one line per call.
SERVICE = """
import json, os
file = open(os.environ["RECEIVED"], "a", buffering=1)

class Run:
    def log(self, values, step):
        file.write(json.dumps([step, values]) + "\\n")

    def finish(self):
        file.write('"finished"\\n')

def init(**settings):
    file.write(json.dumps(settings) + "\\n")
    return Run()
"""
FAILURES = {"no account": "raise SystemExit('no account')", "a_missing_package": "import a_missing_package"}
FAILURES |= {"disk full": SERVICE.replace("file.write(json.dumps([step", "raise OSError('disk full'); (([step")}
CFG = train_gpt2.Config(tokenizer="bytes", model="shakespeare", T=16, total_batch_size=32, device="cpu")
CFG = replace(CFG, precision="fp32", max_steps=30, eval_every=10, save_every=10, n_samples=0, val_tokens=64)


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment in which `trackio` and `wandb` are found in tmp_path/packages."""
    (tmp_path / "packages").mkdir()
    values = dict(PYTHONPATH=str(tmp_path / "packages"), RECEIVED=str(tmp_path / "received"))
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def config(folder: Path, kind: str) -> train_gpt2.Config:
    (folder / "text.txt").write_text("A cat sat. " * 300)
    return replace(CFG, data=str(folder / "text.txt"), out_dir=str(folder / "run"), track=kind)


def received(folder: Path) -> tuple[list, list[tuple[int, str, str]]]:
    lines = [json.loads(line) for line in (folder / "received").read_text().splitlines()]
    rows = [line for line in lines if isinstance(line, list)]
    return lines, [(step, name, f"{value:.9g}") for step, row in rows for name, value in row.items()]


def two_starts(kind: str, folder: Path) -> None:
    """The process of a run that was killed after step 1, and of the same run resumed from step 1, side by side."""
    parts = "0 val 5\n0 train 4\n1 train 3\n# 9 train 9\n2 tra\n", "1 train 3\n2 train 2.5\n2 val nan\n3 train -1e-05\n"
    processes = []
    for step, text in enumerate(parts):
        with open(folder / "log.txt", "a", buffering=1) as log:
            log.write(f"# code={step} torch=2\n# data='x'\n")
            processes.append(track.start(kind, folder, step, dict(lr=0.1)))
            log.write(text)
        end = time.monotonic() + 60
        while not (folder / "track_name").exists() or not (folder / "track_name").read_text():
            assert processes[-1].poll() is None and time.monotonic() < end
            time.sleep(0.01)
        processes[-1].stdin.close()
    assert [process.wait(60) for process in processes] == [0, 0]


def test_wandb_receives_each_value_once(env: dict[str, str], tmp_path: Path) -> None:
    slow = SERVICE.replace("finish(self):", "finish(self):\n        __import__('time').sleep(1)")
    Path(env["PYTHONPATH"], "wandb.py").write_text(slow)
    two_starts("wandb", tmp_path)
    lines, values = received(tmp_path)
    first, second = [line for line in lines if isinstance(line, dict)]
    assert first == second and first["config"] == dict(lr=0.1) and first["resume"] == "allow"
    assert first["id"] == first["name"] and first["name"].startswith(tmp_path.name) and first["dir"] == str(tmp_path)
    assert values[:3] == [(0, "val", "5"), (0, "train", "4"), (1, "train", "3")]
    assert values[3:] == [(2, "train", "2.5"), (2, "val", "nan"), (3, "train", "-1e-05")]
    assert (lines[4], lines[5]) == ("finished", second)  # the second process waited for the first


def test_tracker_of_a_resumed_run_receives_what_is_in_the_log(env: dict[str, str], tmp_path: Path) -> None:
    Path(env["PYTHONPATH"], "trackio.py").write_text(SERVICE)
    for max_steps in (13, 30):
        folder = harness.train(train_gpt2.main, config(tmp_path, "trackio"), max_steps=max_steps)
    _, values = received(tmp_path)
    assert len(values) == len({value[:2] for value in values})
    assert {(step, name): value for step, name, value in values if name != "seconds"} == harness.read_log(folder)


@pytest.mark.parametrize("reason, code", FAILURES.items())
def test_tracker_that_fails_is_one_line(
    reason: str, code: str, env: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    Path(env["PYTHONPATH"], "wandb.py").write_text(code)
    folder = harness.train(train_gpt2.main, config(tmp_path, "wandb"))
    out, err = capfd.readouterr()
    assert len(harness.losses(folder)) == 30 and "done" in out
    [line] = err.splitlines()
    assert "wandb" in line and reason in line


def test_run_does_not_wait_for_a_tracker_that_hangs(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(env["PYTHONPATH"], "trackio.py").write_text("import time\ntime.sleep(60)")
    (tmp_path / "log.txt").write_text("# code=1\n")
    process, start = track.start("trackio", tmp_path, 0, {}), time.monotonic()
    monkeypatch.setattr(track, "LINGER", -4)  # one second
    track.stop(process)
    assert time.monotonic() - start < 3 and process.poll() is None
    process.kill()
    process.wait()


def test_only_rank_0_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.logger, "handlers", [])
    monkeypatch.setattr(track, "start", lambda kind, *rest: kind)
    for rank, kind in ((0, "wandb"), (1, "")):
        cfg, rt = replace(CFG, out_dir=str(tmp_path), track="wandb"), harness.ALONE._replace(rank=rank)
        opened = run.Run(cfg, "pretraining", data.get_tokenizer("bytes"), rt)
        assert opened.tracker == kind
        opened.log.file.close()


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=dict(scalars=0))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    two_starts("tensorboard", tmp_path)
    found = read_events(tmp_path)
    assert found["train"] == [(0, 4), (1, 3), (2, 2.5), (3, pytest.approx(-1e-5))]
    assert [step for step, _ in found["val"]] == [0, 2]


def test_old_logs_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "log.txt").write_text("# code=1\n0 val 5\n0 train 4\n1 train 3\n# code=2\n0 val 5\n0 train 3.5\n")
    for _ in range(2):  # a second time nothing is doubled
        plot.main(plot.Config(runs=(str(tmp_path),), out_dir=str(tmp_path / "figures"), tensorboard=True))
    assert read_events(tmp_path) == dict(val=[(0, 5)], train=[(0, 3.5)])
    assert not (tmp_path / "figures").exists()
