"""bench.py runs, and what it writes hangs together. Its rates are not tested: machines are noisy."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bench
import data
import model

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=256)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that takes no time."""
    monkeypatch.setitem(model.SIZES, "tiny", TINY)


def run(what: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The json that a small measurement leaves."""
    settings = dict(models=("tiny",), T=16, B=(2,), total_batch_size=64, steps=2, repeats=3, device="cpu")
    cfg = replace(bench.CONFIGS[what], **settings, out_dir=str(tmp_path / "bench"))
    bench.main(replace(cfg, **changes))
    found = json.loads((tmp_path / "bench" / f"{what}.json").read_text())
    assert found["hardware"]["cpu"] and found["versions"]["torch"] and found["config"]["what"] == what
    for row in found["results"]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert found["results"][0]["ratio"] == 1
    return found


def test_medians_leave_the_first_repeat_out() -> None:
    rates = iter([1000.0, 1.0, 9.0, 2.0, 4.0, 3.0, 5.0, 6.0])  # of a and b, b and a, …
    rows = bench.side_by_side({"a": lambda: next(rates), "b": lambda: next(rates)}, 4, "1/s")
    assert [(row["name"], row["min"], row["median"], row["max"]) for row in rows] == [
        ("a", 2.0, 4.0, 6.0),
        ("b", 3.0, 5.0, 9.0),
    ]
    assert [row["ratio"] for row in rows] == [1.0, 1.25]


def test_one_of_several_may_fail() -> None:
    def fail() -> float:
        raise RuntimeError("no memory")

    runs = {"a": lambda: 1.0, "b": fail, "c": lambda: 2.0}
    assert [row["name"] for row in bench.side_by_side(runs, 3, "1/s")] == ["a", "c"]
    for names in (["b", "a", "c"], ["a", "b"]):
        with pytest.raises(RuntimeError, match="no memory"):
            bench.side_by_side({name: runs[name] for name in names}, 3, "1/s")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train(optimizer: str, tmp_path: Path) -> None:
    found = run("train", tmp_path, B=(1, 2), optimizer=optimizer, profile=optimizer == "adamw")
    assert [(row["name"], row["B"]) for row in found["results"]] == [
        (name, B) for B in (1, 2) for name in ("plain PyTorch loop", "NeoGPT")
    ]
    for row in found["results"][1::2]:
        assert row["shares"].keys() == {"data", "forward", "backward", "optimizer", "log"}
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["shares"].values()) > 0
        assert row["ms"] == pytest.approx(1e3 * 64 / row["median"])
        assert row["peak_memory"] > 1e6 and row["mfu"] is None and row["checkpoint_ms"] > 0
    trace = tmp_path / "bench" / f"trace-{found['config']['models'][0]}-B2.json.gz"
    assert trace.exists() == (optimizer == "adamw")
    if trace.exists():
        names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert names.count("Optimizer.step#AdamW.step") == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(models=("nosuch",)), "unknown model 'nosuch'"),
        (dict(B=(3,)), "T x B = 48"),
        (dict(repeats=1), "repeats=1 must be at least 2"),
        (dict(stride=0), "stride=0 must be"),
        (dict(B=(0,)), "B must be at least 1"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        run("train", tmp_path, **changes)


def test_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda raw, **options: compiled.append(options) or raw)
    names = [row["name"] for row in run("choices", tmp_path)["results"]]
    assert names[0] == "as it is" and {"compiled", "in bf16"} <= set(names)
    assert len(compiled) == 1


def test_data(tmp_path: Path) -> None:
    [row] = run("data", tmp_path)["results"]
    assert row["ms"] > 0 and row["mb_after"] < row["mb_before"] + 50


@pytest.mark.parametrize("compile", [None, False])
def test_sample(compile: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled.append(step) or step)
    monkeypatch.setattr("training.require_compiler", lambda device: None)
    settings = dict(tokenizer="bytes", new_tokens=20, prompt_tokens=4, stride=3, compile=compile)
    found = run("sample", tmp_path, B=(1, 3), **settings)
    drawn = ["B=1, cache", "B=3, cache"]
    if compile is None:
        drawn += ["B=1, cache, compiled", "B=3, cache, compiled"]
    names = ["B=1, no cache", *drawn, "B=1, prompts of 256", "B=3, prompts of 256"]
    assert [row["name"] for row in found["results"]] == names
    assert all(0 < row["memory_share"] for row in found["results"][1 : 1 + len(drawn)])
    assert bool(compiled) == (compile is None)


def test_tokenize(tmp_path: Path) -> None:
    try:
        data.get_tokenizer("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["fox", "house", "über"], k=50)) for _ in range(40)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = run(
        "tokenize", tmp_path, data=str(tmp_path / "*.parquet"), workers=1, tokenizer="gpt2", repeats=2
    )
    names = [row["name"] for row in found["results"]]
    assert names[:2] == ["tiktoken in a bare pool", "fineweb.py, tiktoken"]
    assert ("fineweb.py, gigatoken" in names) == bool(bench_has_gigatoken())


def bench_has_gigatoken() -> bool:
    """Whether the package is here, asked without fineweb.py."""
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return False
    return True


def test_hellaswag(tmp_path: Path) -> None:
    rows = Path(bench.__file__).parent / "demo" / "hellaswag.jsonl"
    found = run("hellaswag", tmp_path, data=str(rows), tokenizer="bytes", rows=3, repeats=2)
    assert [row["name"] for row in found["results"]][-1] == "NeoGPT"
