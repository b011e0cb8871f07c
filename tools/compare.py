"""Compare models, dense and pruned, in one table.

    python -m tools.compare demo    # after `python train_gpt2.py demo` and `python train_gpt2.py nd-demo`
    python -m tools.compare --checkpoints out/gpt2 out/ndgpt2-96m --methods wanda

Columns: nonzero parameters, training FLOPs per token without products with zeros, tokens/s of a forward and backward
pass of the dense model (dense kernels multiply zeros too), validation loss, HellaSwag acc.
"""

import copy
import itertools
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

import prune
from neogpt import checkpoint, config, files, model, runtime
from tools import timing


@dataclass(frozen=True)
class Config(prune.EvalConfig):
    checkpoints: tuple[str, ...] = ("out/gpt2", "out/ndgpt2-96m")  # each as --checkpoint of prune.py
    methods: tuple[Literal["wanda", "magnitude"], ...] = ("wanda", "magnitude")  # pruning methods
    sparsities: tuple[float | str, ...] = (0.3, 0.5, 0.7, "2:4")  # ratios, or patterns N:M
    out_dir: str = "out/compare"  # folder of compare.json
    repeats: int = 7  # timed passes per model; the median counts


CONFIGS = {"gpt2": Config(), "demo": Config(checkpoints=("out/demo", "out/nd-demo"), **prune.DEMO)}


def forward_backward(raw: model.GPT, B: int, rt: runtime.Runtime) -> int:
    """One forward and backward pass over B sequences of block_size; returns the number of tokens."""
    idx = torch.zeros(B, raw.config.block_size, dtype=torch.int64, device=rt.device)
    with rt.autocast():
        loss = raw(idx, idx)
    loss.backward()
    raw.zero_grad()
    return idx.numel()


def main(cfg: Config) -> None:
    """Evaluate every model, dense and pruned; print the table and write its rows."""
    config.require("[1, inf)", repeats=cfg.repeats)
    prune.check(cfg)
    rt = runtime.setup(cfg.device, cfg.precision)
    models = {source: checkpoint.load_model(source) for source in cfg.checkpoints}
    variants = {"-": prune.Config(method="magnitude", ratio=0.0)}  # dense
    for method, sparsity in itertools.product(cfg.methods, cfg.sparsities):
        ratio, pattern = (sparsity, "") if isinstance(sparsity, float) else (0.0, sparsity)
        variants[f"{method} {sparsity}"] = prune.Config(B=cfg.B, method=method, ratio=ratio, pattern=pattern)
    for loaded, variant in itertools.product(models.values(), variants.values()):
        prune.require_prunable(loaded.raw, variant)
    out_dir = files.make_folder(cfg.out_dir)
    passes = {source: partial(forward_backward, x.raw.to(rt.device), cfg.B, rt) for source, x in models.items()}
    speeds = {row["name"]: row["median"] for row in timing.run_alternating(passes, 1 + cfg.repeats, "tok/s")}
    rows, table = [], [("model", "pruned", "parameters", "MFLOP/token", "tok/s", "loss", "HellaSwag")]
    for source, loaded in models.items():
        T, speed = loaded.raw.config.block_size, speeds[source]
        idx, val, questions = prune.load_data(cfg, T, loaded.tokenizer, rt)
        for label, variant in variants.items():
            raw = copy.deepcopy(loaded.raw)
            prune.prune_model(raw, idx, variant, rt)
            row = dict(model=source, pruned=label, tok_per_sec=speed) | prune.evaluate(raw, val, questions, cfg, rt)
            row["flops"] = raw.flops_per_token(T) - 6 * (row["parameters"] - row["nonzero_parameters"])
            rows.append(row)
            cost = f"{row['nonzero_parameters']:,}", f"{row['flops'] / 1e6:.2f}", f"{speed:,.0f}"
            scores = f"{row['loss']:.4f}", f"{row['hellaswag']:.3f}" if questions else "-"
            table.append((source, label, *cost, *scores))
            runtime.print0(f"{source}, {label}: loss {row['loss']:.4f}")
    runtime.print0(config.format_table(table))
    results = dict(torch=torch.__version__, device=str(rt.device), config=asdict(cfg), rows=rows)
    files.write_json(out_dir / "compare.json", results)
    runtime.print0(f"wrote {out_dir / 'compare.json'}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
