"""compare.py: its table against counts by hand."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from test_prune import ND, TINY, make_model

from checkpoints import write_checkpoint
from compare import Config, main


def test_the_table_counts_what_pruning_leaves(tmp_path: Path) -> None:
    documents = [f"This is document {i}, and it says so {i} times." for i in range(60)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    for name, shape in (("dense", TINY), ("nd", ND)):
        raw = make_model(shape)
        state = dict(stage="pretraining", step=7, tokenizer="bytes", model=raw.state_dict())
        write_checkpoint(tmp_path / f"{name}.pt", state | dict(model_config=asdict(raw.config)))
    cfg = Config(
        checkpoints=(str(tmp_path / "dense.pt"), str(tmp_path / "nd.pt")),
        prunings=("0.5", "0.25", "2:4"),
        out_dir=str(tmp_path / "out"),
        data=str(tmp_path / "text.txt"),
        n_sequences=8,
        B=2,
        repeats=1,
        val_tokens=64,
        hella_rows=-1,
        device="cpu",
    )
    main(cfg)

    L, C, T, V, I, f = 2, 16, 32, 320, 24, 3  # noqa: E741
    matrices = dict(dense=L * 12 * C * C, nd=L * (4 * C * C + 2 * C * I))
    vectors = dict(dense=L * 13 * C + 2 * C, nd=L * (8 * C + C + I + 3 * f + 1) + 2 * C)
    zeros = {"-": 0}  # quarters of the matrices
    for method in ("wanda", "magnitude"):
        zeros |= {f"{method} 0.5": 2, f"{method} 0.25": 1, f"{method} 2:4": 2}
    expected = []
    for name in ("dense", "nd"):
        for pruned, quarters in zeros.items():
            left = matrices[name] * (4 - quarters) // 4
            flops = 6 * (V * C + left) + 12 * L * C * T
            expected.append((str(tmp_path / f"{name}.pt"), pruned, (V + T) * C + vectors[name] + left, flops))
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [(row["model"], row["pruned"], row["parameters"], row["flops"]) for row in rows] == expected
    assert len({row["loss"] for row in rows}) == 14 and all(row["tok_per_sec"] > 0 for row in rows)

    lines = (tmp_path / "out" / "compare.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[1:3] for line in lines] == [[pruned, f"{n:,}"] for _, pruned, n, _ in expected]


def test_an_amount_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'half' is neither"):
        main(Config(checkpoints=(), prunings=("half",), out_dir=str(tmp_path), device="cpu"))
