"""Compare models, dense, with int8 weights (on a CPU) and pruned, in one table.

    python -m tools.compare demo    # after `python train_gpt2.py demo` and `python train_gpt2.py nd-demo`
    python -m tools.compare --checkpoints out/gpt2 out/ndgpt2-96m --methods wanda

Columns: nonzero parameters, training FLOPs per token without products with zeros, validation loss, HellaSwag acc. The
speed of a model does not depend on its zeros, because dense kernels multiply them too; tools/bench.py measures it.
"""

import copy
import itertools
from dataclasses import asdict, dataclass
from typing import Literal

import prune
from neogpt import checkpoint, config, cpu, files, runtime


@dataclass(frozen=True)
class Config(prune.EvalConfig):
    checkpoints: tuple[str, ...] = ("out/gpt2", "out/ndgpt2-96m")  # each as --checkpoint of prune.py
    methods: tuple[Literal["wanda", "magnitude"], ...] = ("wanda", "magnitude")  # pruning methods
    sparsities: tuple[float | str, ...] = (0.3, 0.5, 0.7, "2:4")  # ratios, or patterns N:M
    out_dir: str = "out/compare"  # folder of compare.json


CONFIGS = {"gpt2": Config(), "demo": Config(checkpoints=("out/demo", "out/nd-demo"), **prune.DEMO)}


def main(cfg: Config) -> None:
    """Evaluate every model, dense and pruned; print the table and write its rows."""
    rt = runtime.setup(cfg.device, cfg.precision)
    models = [checkpoint.load_model(source) for source in cfg.checkpoints]
    unpruned = ("-", "int8") if rt.device.type == "cpu" else ("-",)  # the kernel of int8 weights needs a CPU
    variants = dict.fromkeys(unpruned, prune.Config(method="magnitude", ratio=0.0))
    for method, sparsity in itertools.product(cfg.methods, cfg.sparsities):
        ratio, pattern = (sparsity, "") if isinstance(sparsity, float) else (0.0, sparsity)
        variants[f"{method} {sparsity}"] = prune.Config(B=cfg.B, method=method, ratio=ratio, pattern=pattern)
    for loaded, variant in itertools.product(models, variants.values()):
        prune.require_prunable(loaded.raw, variant)
    out_dir = files.make_folder(cfg.out_dir)
    rows, table = [], [("model", "variant", "nonzero", "MFLOP/token", "loss", "HellaSwag")]
    for source, loaded in zip(cfg.checkpoints, models):
        T = loaded.raw.config.block_size
        idx, val, questions = prune.load_data(cfg, T, loaded.tokenizer, rt)
        for label, variant in variants.items():
            raw = copy.deepcopy(loaded.raw).to(rt.device)
            prune.prune_model(raw, idx, variant, rt)
            if label == "int8":
                cpu.use_int8(raw)
            row = dict(model=source, variant=label) | prune.evaluate(raw, val, questions, cfg, rt)
            n, n_zeros = loaded.raw.n_params(), row["parameters"] - row["nonzero_parameters"]  # int8 unties the head
            row |= dict(parameters=n, nonzero_parameters=n - n_zeros, flops=raw.flops_per_token(T) - 6 * n_zeros)
            rows.append(row)
            cost = f"{row['nonzero_parameters']:,}", f"{row['flops'] / 1e6:.2f}"
            table.append((source, label, *cost, f"{row['loss']:.4f}", f"{row['hellaswag']:.3f}" if questions else "-"))
            runtime.print0(f"{source}, {label}: loss {row['loss']:.4f}")
    runtime.print0(config.format_table(table))
    files.write_json(out_dir / "compare.json", dict(config=asdict(cfg), rows=rows))
    runtime.print0(f"wrote {out_dir / 'compare.json'}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
