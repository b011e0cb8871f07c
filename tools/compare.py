"""Compare models, dense and pruned, in one table.

    python -m tools.compare demo    # after `python train_gpt2.py demo` and `python train_gpt2.py nd-demo`
    python -m tools.compare --checkpoints out/gpt2 out/ndgpt2-96m --methods wanda

Columns: nonzero parameters, training FLOPs per token without products with zeros, tokens/s of a forward and backward
pass of the dense model (dense kernels multiply zeros too), validation loss, HellaSwag acc.
"""

import copy
import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

import prune
from neogpt import checkpoint, config, files, model, runtime


@dataclass(frozen=True)
class Config(prune.EvalConfig):
    checkpoints: tuple[str, ...] = ("out/gpt2", "out/ndgpt2-96m")  # each as --checkpoint of prune.py
    methods: tuple[Literal["wanda", "magnitude"], ...] = ("wanda", "magnitude")  # pruning methods
    sparsities: tuple[float | str, ...] = (0.3, 0.5, 0.7, "2:4")  # ratios, or patterns N:M
    out_dir: str = "out/compare"  # folder for compare.md and compare.json
    repeats: int = 7  # timed passes per model; the median counts


CONFIGS = {"gpt2": Config(), "demo": Config(checkpoints=("out/demo", "out/nd-demo"), **prune.DEMO)}


def measure_speed(raw: model.GPT, B: int, rt: runtime.Runtime) -> float:
    """Tokens/s of a forward and backward pass over B sequences of block_size."""
    idx = torch.zeros(B, raw.config.block_size, dtype=torch.int64, device=rt.device)
    t0 = time.perf_counter()
    with rt.autocast():
        loss = raw(idx, idx)
    loss.backward()
    raw.lm_head.weight.grad.sum().item()  # waits for the device
    raw.zero_grad()
    return idx.numel() / (time.perf_counter() - t0)


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [("model", "pruned", "parameters", "MFLOP/token", "tok/s", "loss", "HellaSwag"), ("---", *["---:"] * 6)]
    for row in rows:
        numbers = f"{row['parameters_left']:,}", f"{row['flops'] / 1e6:.2f}", f"{row['tok_per_sec']:,.0f}"
        accuracy = f"{row['hellaswag']:.3f}" if "hellaswag" in row else "-"
        lines.append((row["model"], row["pruned"], *numbers, f"{row['loss']:.4f}", accuracy))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(cfg: Config) -> None:
    """Evaluate every model, dense and pruned, and write the table."""
    config.require("[1, inf)", repeats=cfg.repeats)
    prune.check(cfg)
    rt = runtime.setup(cfg.device, cfg.precision)
    models = [checkpoint.load_model(source) for source in cfg.checkpoints]
    variants = {"-": prune.Config(method="magnitude", ratio=0.0)}  # dense
    for method, sparsity in itertools.product(cfg.methods, cfg.sparsities):
        ratio, pattern = (sparsity, "") if isinstance(sparsity, float) else (0.0, sparsity)
        variants[f"{method} {sparsity}"] = prune.Config(B=cfg.B, method=method, ratio=ratio, pattern=pattern)
    for loaded, variant in itertools.product(models, variants.values()):
        prune.require_prunable(loaded.raw, variant)
    out_dir = files.make_folder(cfg.out_dir)
    rounds = [[measure_speed(loaded.raw.to(rt.device), cfg.B, rt) for loaded in models] for _ in range(cfg.repeats + 1)]
    speeds = [statistics.median(speeds) for speeds in zip(*rounds[1:])]  # the first round warms up
    rows = []
    for source, loaded, speed in zip(cfg.checkpoints, models, speeds):
        T = loaded.raw.config.block_size
        idx, val, questions = prune.load_data(cfg, T, loaded.tokenizer, rt)
        for label, variant in variants.items():
            raw = copy.deepcopy(loaded.raw)
            prune.prune_model(raw, idx, variant, rt)
            row = dict(model=source, pruned=label, tok_per_sec=speed) | prune.evaluate(raw, val, questions, cfg, rt)
            row["flops"] = raw.flops_per_token(T) - 6 * (row["parameters"] - row["parameters_left"])
            rows.append(row)
            runtime.print0(format_markdown([row]).splitlines()[-1])
    results = dict(torch=torch.__version__, device=str(rt.device), config=asdict(cfg), rows=rows)
    files.write_json(out_dir / "compare.json", results)
    with files.atomic_write(out_dir / "compare.md") as temporary:
        temporary.write_text(format_markdown(rows) + "\n")
    runtime.print0(f"wrote {out_dir / 'compare.md'} and compare.json")


if __name__ == "__main__":
    config.run(main, CONFIGS)
