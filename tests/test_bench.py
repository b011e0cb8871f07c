"""tools/bench.py: every measurement runs, and its JSON file is consistent. Rates are not tested: machines are noisy."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from neogpt import config, data, model
from tools import bench, timing

SETTINGS = dict(models=("tiny",), T=16, B=(2,), total_batch_size=64, steps=2, repeats=3, device="cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes no time, and a compiler that does nothing."""
    monkeypatch.setitem(model.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16, block_size=256))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("neogpt.runtime.require_compiler", lambda device: None)


def results(name: str, tmp_path: Path, **changes: Any) -> dict[str, dict]:
    """Run a small measurement; return the rows of its JSON file by name."""
    changes = SETTINGS | dict(out_dir=str(tmp_path / "bench")) | changes
    path = harness.train(bench.main, bench.CONFIGS[name], **changes) / f"{name}.json"
    found = json.loads(path.read_text())
    assert found["command"] and found["machine"]["cpu_info"] and found["machine"]["torch_version"]
    assert found["config"]["bench"] == name and found["results"][0]["ratio"] == 1
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in found["results"])
    return {row["name"]: row for row in found["results"]}


def test_rates_alternate_and_leave_the_first_repeat_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    seconds = iter([9.0, 9.0, 1.0, 2.0, 4.0, 5.0, 8.0, 10.0])  # of a and b, b and a, a and b, b and a
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    def variant(name: str, setup: float) -> Any:
        order.append(name)
        now[0] += setup
        start = now[0]
        now[0] += next(seconds)
        return (40, start) if setup else 40

    variants = {"a": lambda: variant("a", 0), "b": lambda: variant("b", 100)}
    a, b = timing.run_alternating(variants, 4, "tok/s")
    assert "".join(order) == "abbaabba"
    assert (a["min"], a["median"], a["max"], a["ratio"]) == (4, 10, 20, 1)
    assert (b["min"], b["median"], b["max"], b["ratio"]) == (5, 8, 40, 0.8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = results("train", tmp_path, optimizer=optimizer, profile=True)["NeoGPT"]
    assert row["ms"] == pytest.approx(64e3 / row["median"])
    assert "aten::mm" in capsys.readouterr().out  # one of the operators that take longest


def test_other_measurements(tmp_path: Path) -> None:
    assert results("choices", tmp_path).keys() >= {"default", "manual attention", "bf16", "compiled"}
    found = results("choices", tmp_path, only=("bf16 residual", "heads of 128"))
    assert found.keys() == {"default", "bf16 residual", "heads of 128"}
    rows = str(config.ROOT / "demo" / "hellaswag.jsonl")
    found = results("hellaswag", tmp_path, data=rows, tokenizer="bytes", rows=3, repeats=2)
    assert found.keys() == {"one row at a time", "NeoGPT"}
    for compile, cache in ((None, {"cache", "cache, compiled"}), (False, {"cache"})):
        options = dict(new_tokens=20, uncached_stride=3, compile=compile, tokenizer="bytes", B=(1, 3))
        assert results("sample", tmp_path, **options).keys() == {"no cache", "prefill"} | cache


def test_tokenize(tmp_path: Path) -> None:
    try:
        data.get_tokenizer("gpt2")
    except OSError as error:
        pytest.skip(str(error))
    texts = [f"The {i}th fox jumped über the house." for i in range(200)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = results("tokenize", tmp_path, data=str(tmp_path / "*.parquet"), workers=1, repeats=2)
    assert found.keys() >= {"tiktoken pool", "fineweb.py, tiktoken"}


def test_workers_do_not_import_torch() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # raises if a worker dies
        pool.submit(bench.Config).result()  # imports tools.bench
        loaded = pool.submit(eval, "list(__import__('sys').modules)").result()
    assert "tools.bench" in loaded and "torch" not in loaded


def test_invalid_options(tmp_path: Path) -> None:
    cfg = bench.Config(**SETTINGS, out_dir=str(tmp_path))
    harness.refused(bench.main, cfg, "nosuch", "gpt2", models=("nosuch",))
    harness.refused(bench.main, cfg, "repeats", 1, repeats=1)
    harness.refused(bench.main, cfg, "--B=0", B=())
    harness.refused(bench.main, cfg, "total_batch_size", total_batch_size=8)
    harness.refused(bench.main, cfg, "nosuch", "bf16 residual", bench="choices", only=("nosuch",))
    harness.refused(bench.main, cfg, "nothing*", bench="tokenize", data=str(tmp_path / "nothing*"))
