"""tools/compare.py: its table against counts by hand."""

import json
from pathlib import Path

import harness
import pytest
import torch

import prune
from neogpt import checkpoint, model, runtime
from tools import compare


def test_table_counts_nonzero_parameters_and_flops(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    documents = [f"This is document {i}, and it says so {i} times." for i in range(60)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    sources = {}
    for name, shape in (("dense", {}), ("nd", dict(mlp="ndlinear", mlp_width=24, mlp_modes=3))):
        raw = harness.tiny_model(scale=0.2, vocab_size=1088, **shape)  # large: the head has int8 weights too
        sources[name] = str(harness.write_model(tmp_path / name, raw))
    paths = dict(checkpoints=tuple(sources.values()), out_dir=str(tmp_path / "out"), data=str(tmp_path / "text.txt"))
    sizes = dict(sparsities=(0.5, 0.25, "2:4"), n_sequences=8, B=2, val_tokens=64, hellaswag_rows=0)
    cfg = compare.Config(**paths, **sizes, device="cpu")
    compare.main(cfg)
    lines = capsys.readouterr().out.splitlines()

    L, C, T, V, width, f = 2, 16, 64, 1088, 24, 3
    matrices = dict(dense=L * 12 * C * C, nd=L * (4 * C * C + 2 * C * width))
    vectors = dict(dense=L * 13 * C + 2 * C, nd=L * (8 * C + C + width + 3 * f + 1) + 2 * C)
    zeros = {"-": 0, "int8": 0}  # quarters of the matrices
    for method in ("wanda", "magnitude"):
        zeros |= {f"{method} 0.5": 2, f"{method} 0.25": 1, f"{method} 2:4": 2}
    expected = []
    for name, source in sources.items():
        for variant, quarters in zeros.items():
            left = matrices[name] * (4 - quarters) // 4
            if variant == "int8":  # small weights are rounded to zero
                weights = [m.weight for m in model.weight_matrices(checkpoint.load_model(source).raw).values()]
                left = sum(int((w.abs() > w.abs().amax(1, keepdim=True) / 254).sum()) for w in weights)
            flops = 6 * (V * C + left) + 12 * L * C * T
            expected.append((source, variant, (V + T) * C + vectors[name] + left, flops))
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [(row["model"], row["variant"], row["nonzero_parameters"], row["flops"]) for row in rows] == expected
    assert len({row["loss"] for row in rows}) == 16
    table = lines[-1 - len(expected) : -1]
    assert [line.split()[:-3] for line in table] == [[s, *variant.split(), f"{n:,}"] for s, variant, n, _ in expected]

    for sparsity in ("half", "2:5", 1.0):
        harness.refused(compare.main, cfg, sparsity, sparsities=(sparsity,))


def test_int8_weights_are_measured_on_a_cpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernel reads memory of the host."""
    monkeypatch.setattr(runtime, "setup", lambda *_: harness.ALONE._replace(device=torch.device("meta")))
    monkeypatch.setattr(prune, "load_data", lambda *_: (None, None, None))
    monkeypatch.setattr(prune, "evaluate", lambda *_: dict(parameters=2, nonzero_parameters=1, loss=0.0))
    source = str(harness.write_model(tmp_path / "start", harness.tiny_model()))
    compare.main(compare.Config(checkpoints=(source,), methods=(), out_dir=str(tmp_path)))
    assert [row["variant"] for row in json.loads((tmp_path / "compare.json").read_text())["rows"]] == ["-"]
