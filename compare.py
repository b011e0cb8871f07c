"""Compare trained models and what is left of them when they are pruned: one table.

    python compare.py demo        # after `python train_gpt2.py demo` and `python train_gpt2.py nd-demo`
    python compare.py --checkpoints out/gpt2 out/ndgpt2-96m --methods wanda

For every checkpoint, dense and pruned in every way: parameters that are not zero, FLOPs to train on a token
that are not spent on zeros, tokens/s of a forward and backward pass (zeros are multiplied too, so once for
each model; the models take turns), validation loss, and HellaSwag. Writes compare.md and compare.json.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import prune as pruning
from checkpoints import load_model
from files import make_folder, written_whole
from model import GPT
from training import autocast, check_least, parse, pick_precision, setup


@dataclass(frozen=True)
class Config:
    checkpoints: tuple[str, ...] = ("out/gpt2", "out/ndgpt2-96m")  # folders of runs, or checkpoint files
    methods: tuple[Literal["wanda", "magnitude"], ...] = ("wanda", "magnitude")  # of pruning
    prunings: tuple[str, ...] = ("0.3", "0.5", "0.7", "2:4")  # ratios, or patterns N:M
    out_dir: str = "out/compare"  # where the table goes

    data: str = "edu_fineweb10B"  # calibration and validation text: token shards, or one .txt file
    n_sequences: int = 128  # for calibration
    B: int = 8  # sequences per forward
    repeats: int = 7  # timed passes of each model; the median counts
    seed: int = 1337  # of the choice of the calibration sequences
    val_tokens: int = 1_048_576  # tokens for the loss, or all there are
    hella_data: str = ""  # HellaSwag's rows, a .jsonl file; "": the validation set, downloaded once
    hella_rows: int = 1000  # score only the first so many rows; 0: all; -1: none

    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it


DEMO = pruning.CONFIGS["demo"]
CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoints=("out/demo", "out/nd-demo"),
        data=DEMO.data,
        hella_data=DEMO.hella_data,
        hella_rows=0,
        val_tokens=DEMO.val_tokens,
    ),
}


def speeds(models: list[GPT], cfg: Config, amp: torch.autocast) -> list[float]:
    """Tokens/s of a forward and backward pass of each model over B full sequences; they take turns."""
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(cfg.repeats + 1):
        for model, taken in zip(models, times):
            device = model.lm_head.weight.device
            idx = torch.zeros(cfg.B, model.config.block_size, dtype=torch.int64, device=device)
            t0 = time.perf_counter()
            with amp:
                _, loss = model(idx, idx)
            loss.backward()
            model.lm_head.weight.grad.sum().item()  # waits for the device
            if repeat:  # the first warms up
                taken.append(time.perf_counter() - t0)
            model.zero_grad()
    return [cfg.B * m.config.block_size / statistics.median(t) for m, t in zip(models, times)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ("model", "pruned", "parameters", "MFLOP/token", "tok/s", "loss", "HellaSwag")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in rows:
        numbers = (f"{row['parameters']:,}", f"{row['flops'] / 1e6:.2f}", f"{row['tok_per_sec']:,.0f}")
        hella = f"{row['hella']:.3f}" if "hella" in row else "-"
        lines.append((row["model"], row["pruned"], *numbers, f"{row['loss']:.4f}", hella))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(cfg: Config) -> None:
    """Measure every checkpoint, dense and pruned, and write the table."""
    check_least(cfg, 1, "n_sequences", "B", "repeats")
    dist = setup(cfg.device, deterministic=False)
    if dist.world_size > 1:
        raise SystemExit("compare.py runs as one process")
    make_folder(Path(cfg.out_dir))
    device = dist.device
    amp = autocast(pick_precision(cfg.precision, device), device)
    loaded = [load_model(checkpoint, "") for checkpoint in cfg.checkpoints]
    names = [field for field in asdict(DEMO) if hasattr(cfg, field)]
    base = pruning.Config(**{name: getattr(cfg, name) for name in names if name != "out_dir"})
    amounts: dict[str, dict[str, Any]] = {}
    for amount in cfg.prunings:
        try:
            amounts[amount] = dict(pattern=amount) if ":" in amount else dict(ratio=float(amount))
        except ValueError as error:
            raise SystemExit(f"prunings: {amount!r} is neither a ratio nor a pattern such as 2:4") from error
        for raw, _ in loaded:
            pruning.check(replace(base, **amounts[amount]), raw)
    tok_per_sec = speeds([raw.to(device) for raw, _ in loaded], cfg, amp)
    rows = []
    for checkpoint, (raw, tokenizer), speed in zip(cfg.checkpoints, loaded, tok_per_sec):
        T = raw.config.block_size
        idx, val = pruning.calibration(cfg.data, T, cfg.n_sequences, cfg.seed, tokenizer)
        idx = idx.to(device)
        measure = pruning.make_measure(base, tokenizer, val, T, amp, dist)
        for how in ("-", *((method, amount) for method in cfg.methods for amount in cfg.prunings)):
            copy = GPT.from_weights(raw.config, {k: v.clone() for k, v in raw.state_dict().items()})
            if how != "-":
                method, amount = how
                one = replace(base, method=method, **amounts[amount])
                pruning.prune(copy, idx, one, amp)
            found = pruning.sparsity(copy)
            row = dict(model=checkpoint, pruned=how if how == "-" else " ".join(how))
            row |= dict(parameters=found["parameters_left"], tok_per_sec=speed, sparsity=found["sparsity"])
            row["flops"] = raw.flops_per_token(T) - 6 * (raw.n_params() - found["parameters_left"])
            rows.append(row | measure(copy))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    with written_whole(Path(cfg.out_dir) / "compare.md") as temporary:
        temporary.write_text(table(rows) + "\n", encoding="utf-8")
    with written_whole(Path(cfg.out_dir) / "compare.json") as temporary:
        facts = dict(torch=torch.__version__, device=str(device), config=asdict(cfg), rows=rows)
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"written: {Path(cfg.out_dir) / 'compare.md'} and compare.json")


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
