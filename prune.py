"""Prune a trained model with Wanda (arXiv:2306.11695): half of its weights, or two of every four, go to zero.

    python prune.py demo                                 # after `python train_gpt2.py demo`: seconds
    python prune.py --ratio=0.5                          # out/gpt2, calibrated on edu_fineweb10B
    python prune.py --hf=gpt2 --data=book.txt --pattern=2:4
    python prune.py --method=magnitude                   # the baseline
    python train_gpt2.py --init_from=out/pruned --out_dir=out/recovered \\
        --max_lr=6e-5 --max_steps=500 --warmup_steps=50

Wanda zeroes the weights that matter least to a layer's output: within every output, those with the smallest
|weight| times the norm of its input over some calibration text. Blocks are pruned in order, each on what the
pruned ones before it hand on. Embeddings, head, norms and biases stay.

Writes an ordinary checkpoint, which every script takes and trains on with its zeros kept, and report.json;
prints the sparsity of every matrix, and perplexity and HellaSwag before and after.
"""

import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tiktoken
import torch
from torch import Tensor, nn

from checkpoints import list_checkpoints, load_model, open_checkpoint, refuse_own_folder, write_checkpoint
from data import Windows, check_shards, open_data, require_data, step_windows
from files import make_folder, written_whole
from hellaswag import evaluate, find_rows, prepare, read_rows
from model import GPT, matrices
from optimizers import zero_masks
from training import Dist, autocast, check_least, check_recipe, parse, pick_precision, pick_T, setup, validate


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # what to prune: a folder of a run, or one checkpoint file
    hf: str = ""  # instead: a GPT-2 on the Hugging Face hub, or a folder in its format
    out_dir: str = "out/pruned"  # where the pruned checkpoint and report.json go

    method: Literal["wanda", "magnitude"] = "wanda"  # magnitude: the smallest weights of a matrix
    ratio: float = 0.5  # share of the weights to make zero, 0 to below 1
    pattern: str = ""  # instead of ratio: N:M keeps the N best of every M neighbouring inputs, such as 2:4
    data: str = "edu_fineweb10B"  # calibration and validation text: token shards, or one .txt file
    n_sequences: int = 128  # for calibration (16 are nearly as good: arXiv:2306.11695, figure 2)
    T: int | None = None  # length of these and of those measured on, tokens; None: the model's block_size
    B: int = 8  # sequences per forward
    seed: int = 1337  # of their choice

    val_tokens: int = 1_048_576  # tokens for the perplexity, or all there are
    hella_data: str = ""  # HellaSwag's rows, a .jsonl file; "": the validation set, downloaded once
    hella_rows: int = 1000  # score only the first so many rows; 0: all; -1: none
    sparse_kernels: bool = False  # on CUDA, with 2:4: time the matrices as semi-structured ones beside dense

    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it


HERE = Path(__file__).parent
CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo",
        out_dir="out/demo-pruned",
        data=str(HERE / "input.txt"),
        hella_data=str(HERE / "demo" / "hellaswag.jsonl"),
        hella_rows=0,
        val_tokens=2**16,
    ),
}

# --------------------------------------------------------------------------------------------------
# Masks


def drop_smallest(score: Tensor, k: int) -> Tensor:
    """Score (rows, n) -> mask, False for the k smallest of every row; of equals the first goes first."""
    smallest = score.argsort(dim=1, stable=True)[:, :k]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, smallest, False)


def read_pattern(pattern: str) -> tuple[int, int] | None:
    """ "2:4" -> (2, 4), "" -> None; SystemExit for anything else."""
    if not pattern:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m:
        raise SystemExit(f"pattern={pattern!r}: expected N:M with 0 < N < M, such as 2:4")
    return n, m


def make_mask(weight: Tensor, norm: Tensor | None, cfg: Config) -> Tensor:
    """True for the weights (out, in) that stay; norm: (in,) of the inputs for wanda, None for magnitude."""
    score = weight.abs().float() * (1.0 if norm is None else norm)  # Eq. 1, arXiv:2306.11695
    if pattern := read_pattern(cfg.pattern):
        n, m = pattern
        groups, k = score.view(-1, m), m - n
    else:  # wanda compares the weights of an output, magnitude those of a whole matrix
        groups = score.view(1, -1) if norm is None else score
        k = int(cfg.ratio * groups.size(1))
    return drop_smallest(groups, k).view(score.shape)


# --------------------------------------------------------------------------------------------------
# Block by block


def squared_norms(block: nn.Module, x: Tensor, B: int, amp: torch.autocast) -> dict[str, Tensor]:
    """The squared norm of every input of the block's matrices over all positions of x (n, T, C)."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, linear in matrices(block).items():

        def add(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            total = inputs[0].float().flatten(0, -2).square().sum(0, dtype=torch.float32)
            sums[name] = sums[name] + total if name in sums else total

        hooks.append(linear.register_forward_pre_hook(add))
    with amp:
        for rows in x.split(B):
            block(rows)
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def prune(raw: GPT, idx: Tensor, cfg: Config, amp: torch.autocast) -> dict[str, Tensor]:
    """Prune the model in place; return the masks (out, in) by parameter name, True where a weight stays.

    idx: (n, T) calibration tokens on the model's device. Only one block's inputs are held: (n, T, C).
    """
    x = torch.cat(
        [raw.transformer.wte(rows) + raw.transformer.wpe.weight[: idx.size(1)] for rows in idx.split(cfg.B)]
    )
    masks = {}
    for layer, block in enumerate(raw.transformer.h):
        norms = squared_norms(block, x, cfg.B, amp) if cfg.method == "wanda" else {}
        for name, linear in matrices(block).items():
            mask = make_mask(linear.weight, norms[name].sqrt() if norms else None, cfg)
            masks[f"transformer.h.{layer}.{name}.weight"] = mask & (linear.weight != 0)  # or zero before
        for name, linear in matrices(block).items():  # all are scored before any is pruned
            linear.weight.mul_(masks[f"transformer.h.{layer}.{name}.weight"])
        if norms:  # the next block sees what the pruned one makes
            with amp:
                for at in range(0, len(x), cfg.B):
                    x[at : at + cfg.B] = block(x[at : at + cfg.B]).to(x.dtype)
    return masks


# --------------------------------------------------------------------------------------------------
# Measures


def calibration(
    data: str, T: int, n_sequences: int, seed: int, tokenizer: tiktoken.Encoding
) -> tuple[Tensor, Windows]:
    """Calibration tokens (n_sequences, T) from the training part, chosen by the seed; the validation part."""
    require_data(data)
    if Path(data).is_dir():
        check_shards(data, tokenizer.n_vocab)
    train, val = (Windows(shards, T) for shards in open_data(data, tokenizer))
    if len(train) < n_sequences:
        raise SystemExit(
            f"{data} has {len(train)} sequences of {T} tokens, and n_sequences={n_sequences}: give more "
            "text, or take fewer or shorter sequences"
        )
    chosen = train.read(step_windows(0, n_sequences, len(train), seed))[:, :-1]
    return torch.from_numpy(chosen), val


Measure = Callable[[GPT], dict[str, float]]


def make_measure(
    cfg: Config, tokenizer: tiktoken.Encoding, val: Windows, T: int, amp: torch.autocast, dist: Dist
) -> Measure:
    """A function from a model to its loss, perplexity and HellaSwag accuracies."""
    questions = None
    if cfg.hella_rows >= 0:
        rows = read_rows(find_rows(cfg.hella_data, dist), cfg.hella_rows, print)
        questions = prepare(rows, tokenizer, "completion", T, print)

    def measure(raw: GPT) -> dict[str, float]:
        loss = validate(raw, val, cfg.val_tokens, cfg.B, amp, dist)
        scores = dict(loss=loss, perplexity=math.exp(min(loss, 99)))
        if questions:
            accuracy = evaluate(raw, questions, amp, dist).accuracy
            scores |= dict(hella=accuracy["sum"], hella_norm=accuracy["per token"])
        return scores

    return measure


def sparsity(raw: GPT) -> dict[str, Any]:
    """Zeros in the blocks' matrices: by matrix, in all, and what is left of the model's parameters."""
    zeros, sizes = {}, {}
    for layer, block in enumerate(raw.transformer.h):
        for name, linear in matrices(block).items():
            zeros[f"h.{layer}.{name}"] = int((linear.weight == 0).sum())
            sizes[f"h.{layer}.{name}"] = linear.weight.numel()
    n_zeros = sum(zeros.values())
    return dict(
        by_matrix={name: zeros[name] / sizes[name] for name in zeros},
        sparsity=n_zeros / sum(sizes.values()),
        parameters=raw.n_params(),
        parameters_left=raw.n_params() - n_zeros,
    )


def time_sparse_kernels(raw: GPT, idx: Tensor) -> dict[str, float]:
    """Milliseconds of a forward pass in bf16 over idx (B, T), with dense and with 2:4 matrices; medians.

    The model is left with semi-structured matrices: for timing only.
    """

    def median_ms() -> float:
        times = []
        for _ in range(25):
            torch.cuda.synchronize()
            t0 = time.perf_counter()
            raw.hidden(idx)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - t0) * 1e3)
        return statistics.median(times[5:])

    raw.to(torch.bfloat16)
    # PyTorch 2.11 would else hand on transposed results, which no fused attention takes
    torch.sparse.SparseSemiStructuredTensor._FUSE_TRANSPOSE = True
    with torch.no_grad():
        dense = median_ms()
        for block in raw.transformer.h:
            for linear in matrices(block).values():
                linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(linear.weight.detach()))
        sparse = median_ms()
    return dict(dense_ms=dense, sparse_ms=sparse, speedup=dense / sparse)


def check(cfg: Config, raw: GPT) -> None:
    """SystemExit that names the constant which does not fit the model or is out of range."""
    check_least(cfg, 1, "n_sequences", "B")
    check_recipe(cfg)
    if not 0 <= cfg.ratio < 1:
        raise SystemExit(f"ratio={cfg.ratio} must be at least 0 and below 1")
    if pattern := read_pattern(cfg.pattern):
        for name, linear in matrices(raw.transformer.h[0]).items():
            if linear.in_features % pattern[1]:
                raise SystemExit(
                    f"pattern={cfg.pattern} does not divide the {linear.in_features} inputs of {name}"
                )
    if cfg.sparse_kernels and cfg.pattern != "2:4":
        raise SystemExit("--sparse_kernels needs --pattern=2:4")


def table(before: dict[str, Any], after: dict[str, Any], cfg: Config) -> str:
    """Before and after, as text."""
    names = [name for name in ("loss", "perplexity", "hella", "hella_norm") if name in before]
    what = f"{cfg.method} {cfg.pattern or format(cfg.ratio, '.0%')}"
    lines = [("", "parameters", "zeros", *names)]
    for label, found in (("before", before), (what, after)):
        numbers = [f"{found['parameters_left']:,}", f"{found['sparsity']:.1%}"]
        lines.append((label, *numbers, *(f"{found[name]:.4f}" for name in names)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def main(cfg: Config) -> None:
    """Measure, prune, measure again, and write the checkpoint and the report."""
    dist = setup(cfg.device, deterministic=False)
    if dist.world_size > 1:
        raise SystemExit("prune.py runs as one process")
    out_dir = Path(cfg.out_dir)
    if not cfg.hf:
        refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    adapter = not cfg.hf and (Path(cfg.checkpoint) / "adapter_config.json").is_file()
    source = {} if cfg.hf or adapter else open_checkpoint(cfg.checkpoint)
    stage, step = source.get("stage", "sft" if adapter else "pretraining"), source.get("step", 0)
    path = out_dir / f"ckpt_{step:06d}.pt"
    if others := [other.name for other in list_checkpoints(out_dir) if other != path]:
        raise SystemExit(f"{out_dir} holds other checkpoints ({', '.join(others)}): choose another --out_dir")
    if path.exists() and (out_dir / "log.txt").exists():
        raise SystemExit(f"{out_dir} holds a run of its own: choose another --out_dir")
    raw, tokenizer = load_model(cfg.checkpoint, cfg.hf)
    check(cfg, raw)
    if cfg.sparse_kernels and dist.device.type != "cuda":
        raise SystemExit("--sparse_kernels needs a CUDA device")
    T = pick_T(cfg.T, raw.config.block_size)
    idx, val = calibration(cfg.data, T, cfg.n_sequences, cfg.seed, tokenizer)
    idx = idx.to(dist.device)
    amp = autocast(pick_precision(cfg.precision, dist.device), dist.device)
    raw.to(dist.device)

    make_folder(out_dir)
    measure = make_measure(cfg, tokenizer, val, T, amp, dist)
    before = sparsity(raw) | measure(raw)
    if zero_masks(raw):
        print(f"already pruned: {before['sparsity']:.1%} of the weights are zero; they stay so")
    prune(raw, idx, cfg, amp)
    after = sparsity(raw) | measure(raw)
    print("\n".join(f"{name:>24} {share:6.1%} zeros" for name, share in after["by_matrix"].items()))
    print(table(before, after, cfg))

    state = dict(stage=stage, step=step, tokenizer=tokenizer.name, model=raw.state_dict())
    write_checkpoint(path, state | dict(model_config=asdict(raw.config), pruned=asdict(cfg)))
    report = dict(config=asdict(cfg), before=before, after=after)

    def write_report() -> None:
        with written_whole(out_dir / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    write_report()
    print(f"written: {path} and {out_dir / 'report.json'}")
    if cfg.sparse_kernels:
        report["sparse_kernels"] = found = time_sparse_kernels(raw, idx[: cfg.B])
        write_report()
        print(f"a forward pass: {found['dense_ms']:.2f} ms dense, {found['sparse_ms']:.2f} ms 2:4")


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
