"""tools/bench.py: every measurement runs, and its JSON file is consistent. Rates are not tested: machines are noisy."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch.utils import collect_env

from neogpt import config, model
from tools import bench, timing

ROW = dict(name="NeoGPT", unit="tok/s", median=3.0, min=2.0, max=4.0, ratio=1.0)
SETTINGS = dict(models=("tiny",), T=16, B=(2,), total_batch_size=64, steps=1, repeats=2, device="cpu")
MACHINE = functools.cache(collect_env.get_env_info)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes no time, a compiler that does nothing, and a machine that is asked once."""
    monkeypatch.setattr(collect_env, "get_env_info", MACHINE)
    monkeypatch.setitem(model.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16, block_size=256))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("neogpt.runtime.require_compiler", lambda device: None)


def results(name: str, tmp_path: Path, **changes: Any) -> dict[str, dict]:
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
def test_train(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen, backward = [], bench.training.backward
    monkeypatch.setattr(bench.training, "backward", lambda *args: seen.append(args[-1].precision) or backward(*args))
    options = dict(optimizer=optimizer, profile=True, precision="fp32", plain_precision="bf16")
    row = results("train", tmp_path, **options)["NeoGPT"]
    assert row["ms"] == pytest.approx(64e3 / row["median"])
    assert "aten::mm" in capsys.readouterr().out  # one of the operators that take longest
    plain, ours = ["bf16"] * 2, ["fp32"] * 2  # two micro-batches per step
    assert seen == plain + ours + ours + plain + ours


def test_other_measurements(tmp_path: Path) -> None:
    expected = {"default", "manual attention", "bf16", "compiled"}
    assert results("choices", tmp_path, precision="fp32").keys() >= expected
    only = "bf16 residual", "heads of 128", "vocabulary not padded"
    assert results("choices", tmp_path, only=only, n_tokens=300).keys() == {"default", *only}
    rows = str(config.ROOT / "demo" / "hellaswag.jsonl")
    found = results("hellaswag", tmp_path, data=rows, tokenizer="bytes", rows=3)
    assert found.keys() == {"one row at a time", "NeoGPT"}
    found = results("sample", tmp_path, new_tokens=20, B=(1, 3))
    assert found.keys() - {"transformers"} == {"NeoGPT", "NeoGPT, int8", "prefill"}
    assert results("sample", tmp_path, new_tokens=20, only=("NeoGPT",)).keys() == {"NeoGPT"}
    raw, _, _ = bench.build_model(replace(bench.CONFIGS["sample"], device="cpu"), "tiny")
    assert raw.config.n_tokens == 50257  # gpt2 is measured with its own vocabulary


@pytest.mark.parametrize("network", [True, False])
def test_overview(
    network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without a network and without transformers, what needs them is left out. bf16 runs decode in fp32 too."""
    monkeypatch.setattr(bench, "COPIES", 1)
    if network:
        monkeypatch.setattr(bench, "bench_tokenize", lambda cfg: [dict(ROW, name="pool"), dict(ROW, ratio=2.0)])
        pytest.importorskip("transformers")
    else:
        monkeypatch.setattr(bench, "bench_tokenize", mock.Mock(side_effect=OSError("no vocabulary")))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    precision = "bf16" if network else "fp32"
    options = dict(repeats=2, steps=1, new_tokens=20, rows=2, device="cpu", models=("tiny",), precision=precision)
    out = harness.train(bench.main, bench.CONFIGS["overview"], **options, out_dir=str(tmp_path / "bench"))
    rows, found = json.loads((out / "overview.json").read_text())["results"], {}
    for row in rows:
        found.setdefault(row["measurement"], []).append(row["name"])
    plain, decoders = ["plain PyTorch fp32", "NeoGPT"], ["transformers", "NeoGPT"] if network else ["NeoGPT"]
    expected = {"training tiny, Muon": plain, "training tiny, T = 1,024": plain, "decoding tiny, fp32": decoders}
    expected |= {f"decoding tiny, {precision}": decoders, f"decoding tiny, {precision}, 8 streams": decoders}
    expected |= {"HellaSwag, tiny": ["one row at a time", "NeoGPT"]}
    assert found == expected | ({"tokenizing": ["pool", "NeoGPT"]} if network else {})
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and ("left out: no vocabulary" in printed) != network
    assert (out / "overview.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_tokenize(tmp_path: Path) -> None:
    harness.get_tokenizer("gpt2")
    texts = [f"The {i}th fox jumped über the house." for i in range(200)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = results("tokenize", tmp_path, data=str(tmp_path / "*.parquet"), workers=1)
    assert found.keys() >= {"tiktoken pool", "fineweb.py, tiktoken"}


def test_invalid_options(tmp_path: Path) -> None:
    cfg = bench.Config(bench="train", **SETTINGS, out_dir=str(tmp_path))
    harness.refused(bench.main, cfg, "nosuch", "gpt2", models=("nosuch",))
    harness.refused(bench.main, cfg, "repeats", 1, repeats=1)
    harness.refused(bench.main, cfg, "--B=0", B=())
    harness.refused(bench.main, cfg, "--models=0", bench="overview", models=())
    harness.refused(bench.main, cfg, "total_batch_size", total_batch_size=8)
    harness.refused(bench.main, cfg, "total_batch_size", 8, bench="train", B=(4, 8))
    harness.refused(bench.main, cfg, "nosuch", "bf16 residual", bench="choices", only=("nosuch",))
    harness.refused(bench.main, cfg, "--only", "prefill", bench="sample", new_tokens=20, only=("nosuch",))
    harness.refused(bench.main, cfg, "nothing*", bench="tokenize", data=str(tmp_path / "nothing*"))
