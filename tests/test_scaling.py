"""tools/scaling.py: a study of tiny models from end to end, interrupted and extended."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest

import train_gpt2
from neogpt import checkpoint, config, model, runtime
from tools import fit, scaling

SIZES = ("tiny-8", "tiny-12", "tiny-16")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Does a study in this process, which is faster, and returns its results; `started`: the folders of its runs."""

    def run(command: list[str], **_: object) -> None:
        args = command[command.index(train_gpt2.__file__) + 1 :]
        run_cfg = config.parse(train_gpt2.CONFIGS, "", args)
        train_gpt2.main(run_cfg)
        do.started.append(Path(run_cfg.out_dir).name)

    def do(**changed: object) -> dict:
        do.started.clear()
        scaling.main(replace(cfg, **changed))
        return json.loads((tmp_path / "scaling.json").read_text())

    for name in SIZES:
        width = int(name.partition("-")[2])
        monkeypatch.setitem(model.SIZES, name, dict(n_layer=1, n_head=1, n_embd=width, block_size=192))
    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    monkeypatch.setattr(runtime, "stop_on_signals", lambda: lambda: False)  # handlers need the main thread
    # test_fit.py tests the fit
    monkeypatch.setattr(fit, "fit", lambda N, D, L, start=None: fit.Law(0.5 * L.min(), 9.0, 9.0, 0.3, 0.3))
    monkeypatch.setattr(fit, "bootstrap", partial(fit.bootstrap, n=3))
    base = "demo --T=192 --total_batch_size=192 --B=1 --val_tokens=384 --warmup_steps=2 --device=cpu --precision=fp32"
    cfg = scaling.Config(base, SIZES, (10, 20), (1e-3, 1e-2), 2, 40 * 192, str(tmp_path))
    do.started, do.cfg = [], cfg
    return do


def test_a_study(
    study: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = scaling.subprocess.run
    with monkeypatch.context() as patch:  # interrupted after the first run
        patch.setattr(scaling.subprocess, "run", lambda command, **_: study.started or train(command))
        harness.refused(scaling.main, study.cfg, "tiny-16-0.01-10", "again")
    assert study.started == ["tiny-16-0.001-10"] and not (tmp_path / "scaling.json").exists()
    (tmp_path / "tiny-8-0.01-10").mkdir()  # of a run that was killed before its first loss
    (tmp_path / "tiny-8-0.01-10" / "log.txt").write_text("# code=x python=3.11\n")
    results = study()
    names = [f"{size}-{lr:g}-10" for size in SIZES for lr in (0.001, 0.01)] + [f"{size}-0.01-20" for size in SIZES]
    assert sorted([*study.started, "tiny-16-0.001-10"]) == sorted([*names, "tiny-16-0.01-40"])
    points = {(Path(p["folder"]).name.split("-0")[0], p["steps"]): p for p in results["points"]}
    assert [*points] == [(size, steps) for size in SIZES for steps in (10, 20)] + [("tiny-16", 40)]
    assert [p["D"] for p in points.values()] == [192 * p["steps"] for p in points.values()]
    for size in SIZES:
        raw = checkpoint.load_model(points[size, 20]["folder"]).raw
        assert points[size, 10]["N"] == raw.flops_per_token(192) / 6
    assert all(point["max_lr"] == 1e-2 for point in points.values())  # better than 1e-3
    assert len(results["laws"]) == 4 and 0 < results["entropy"] < points["tiny-16", 40]["loss"]
    out = capsys.readouterr().out
    assert "held out" in out and "predicted" in out and "try more" in out
    assert (tmp_path / "Scaling.png").read_bytes()[:4] == b"\x89PNG"

    # a run that was continued twice equals a run of its length
    folder = Path(points["tiny-16", 40]["folder"])
    cfg = train_gpt2.Config(**checkpoint.read_newest(folder).config)
    whole = harness.train(train_gpt2.main, cfg, branch_from="", out_dir=str(tmp_path / "whole"))
    harness.assert_same_run(folder, whole)

    monkeypatch.setattr(scaling, "draw", lambda *_: None)  # takes seconds
    assert len(study(lengths=(10, 20, 40), held_out=1)["points"]) == 9  # a length is added
    assert sorted(study.started) == ["tiny-12-0.01-40", "tiny-8-0.01-40"]  # nothing is trained twice
    for name, value in (("optimizer", "adamw"), ("grad_clip", "0.5"), ("val_tokens", "192")):
        harness.refused(scaling.main, study.cfg, f"{name}=", value, train=f"{study.cfg.train} --{name}={value}")


def test_wrong_options_are_refused(study: Callable[..., dict]) -> None:
    refused = partial(harness.refused, scaling.main, study.cfg)
    refused("gpt5", sizes=("tiny-8", "gpt5"))
    refused("lengths", lengths=(20, 10))
    refused("15", lengths=(10, 15))
    refused("11.25", "warmup", train=f"{study.cfg.train} --warmup_steps=9")
    refused("7680", "15,360", lengths=(10, 20, 40))
    refused("jobs=0", jobs=0)
    refused("six", sizes=("tiny-8",))
    (Path(study.cfg.out_dir) / "tiny-16-0.001-10").mkdir(parents=True)
    (Path(study.cfg.out_dir) / "tiny-16-0.001-10" / "log.txt").write_text("# data='x.txt'\n0 val 1\n")
    refused("tiny-16-0.001-10", "data=", "--out_dir")


def test_report_without_an_optimum(tmp_path: Path) -> None:
    law, runs = fit.Law(0.5, 1.0, 9.0, -0.1, 0.4), np.array([[1e4, 1e4], [1e6, 2e6], [3.1, 3.0]])  # grows with N
    scaling.print_report([law, law], runs, [], 1e12)
    scaling.draw(tmp_path / "Scaling.png", [law, law], runs, [], 1e12, None)
