"""Prune a trained model with Wanda (arXiv:2306.11695): set half of its weights, or 2 of every 4, to zero.

    python prune.py demo                                 # after `python train_gpt2.py demo`; takes seconds
    python prune.py --checkpoint=gpt2 --data=book.txt --pattern=2:4
    python train_gpt2.py --init_from=out/pruned --out_dir=out/recovered \\
        --max_lr=6e-5 --max_steps=500 --warmup_steps=50  # training keeps the zeros

Wanda scores a weight by its absolute value times the L2 norm of its input over the calibration tokens, and prunes, for
every output, the weights with the lowest scores. Blocks are pruned in order: the input of a block is the output of the
pruned blocks before it. Embeddings, head, norms and biases are not pruned. report.json: the metrics before and after.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tiktoken
import torch
from torch import Tensor, nn

import hellaswag
from neogpt import checkpoint, config, data, files, model, runtime, training


@dataclass(frozen=True)
class EvalConfig:
    """Constants of calibration and evaluation, also for tools/compare.py."""

    data: str = "edu_fineweb10B"  # calibration and validation text: as in train_gpt2.py
    n_sequences: config.PositiveInt = 128  # calibration sequences (16 are nearly as good: arXiv:2306.11695, figure 2)
    B: config.PositiveInt = 8  # sequences per forward pass
    seed: config.Seed = 1337  # selects the calibration sequences
    val_tokens: config.PositiveInt = 1_048_576  # validation tokens for the loss; fewer if the text is shorter
    hellaswag_data: str = ""  # rows, a .jsonl or .parquet file; "": the validation set, downloaded once
    hellaswag_rows: config.NonNegativeInt | None = 1000  # score only this many rows; None: all; 0: no HellaSwag
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it


@dataclass(frozen=True)
class Config(EvalConfig):
    checkpoint: str = "out/gpt2"  # the model to prune: an out_dir, a file, a Hugging Face folder or hub name
    out_dir: str = "out/pruned"  # folder for the pruned checkpoint and report.json
    method: Literal["wanda", "magnitude"] = "wanda"  # magnitude: prune the smallest weights of each matrix
    ratio: float = 0.5  # fraction of the weights to prune, in [0, 1)
    pattern: str = ""  # used instead of ratio: N:M keeps N of every M consecutive inputs, for example 2:4


DEMO = dict(data=f"{config.ROOT}/input.txt", hellaswag_data=f"{config.ROOT}/demo/hellaswag.jsonl", val_tokens=2**16)
CONFIGS = {"gpt2": Config(), "demo": Config(checkpoint="out/demo", out_dir="out/demo-pruned", **DEMO)}


def require_prunable(raw: model.GPT, cfg: Config) -> None:
    """Raise ValueError unless ratio and pattern are valid for this model."""
    config.require("[0, 1)", ratio=cfg.ratio)
    n, _, m = cfg.pattern.partition(":")
    if cfg.pattern and not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f"--pattern={cfg.pattern}: expected N:M with 0 < N < M, for example 2:4")
    for name, linear in model.weight_matrices(raw).items() if cfg.pattern else ():
        if linear.in_features % int(m):
            raise ValueError(f"--pattern={cfg.pattern}: {m} does not divide the {linear.in_features} inputs of {name}")


def make_mask(weight: Tensor, norm: Tensor | None, cfg: Config) -> Tensor:
    """The mask of a weight matrix, (out, in): True is kept. norm: L2 norm of each input, (in,), for Wanda, or None."""
    score = weight.abs().float() * (1.0 if norm is None else norm)  # Eq. 1, arXiv:2306.11695
    if cfg.pattern:
        n, m = map(int, cfg.pattern.split(":"))
        groups, n_pruned = score.view(-1, m), m - n
    else:  # Wanda compares the weights of one output, magnitude pruning those of the whole matrix
        groups = score.view(1, -1) if norm is None else score
        n_pruned = int(cfg.ratio * groups.size(1))
    lowest = groups.argsort(dim=1, stable=True)[:, :n_pruned]  # stable: the first of equal scores is pruned first
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False).view(score.shape)


@torch.no_grad()
def prune_model(raw: model.GPT, idx: Tensor, cfg: Config, rt: runtime.Runtime) -> None:
    """Prune the model in place, block by block. idx: calibration tokens, (n, T). Needs memory for (n, T, C) floats."""
    if cfg.method == "magnitude":
        for linear in model.weight_matrices(raw).values():
            linear.weight.mul_(make_mask(linear.weight, None, cfg))
        return
    squared_norms: dict[nn.Module, Tensor] = {}  # per linear layer: (in,) fp32, sums over all tokens

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(module, nn.Linear):
            squares = inputs[0].float().flatten(0, -2).square().sum(0)
            squared_norms[module] = squared_norms.get(module, 0) + squares

    x = torch.cat([raw.embed(rows) for rows in idx.split(cfg.B)])  # (n, T, C), the input of the block
    for block in raw.transformer.h:
        with nn.modules.module.register_module_forward_pre_hook(add), rt.autocast():
            for rows in x.split(cfg.B):
                block(rows)
        for linear in model.weight_matrices(block).values():
            linear.weight.mul_(make_mask(linear.weight, squared_norms[linear].sqrt(), cfg))
        with rt.autocast():
            for rows in x.split(cfg.B):
                rows.copy_(block(rows))


def load_data(
    cfg: EvalConfig, T: int, tokenizer: tiktoken.Encoding, rt: runtime.Runtime
) -> tuple[Tensor, data.Windows, hellaswag.Questions | None]:
    """Calibration tokens (n_sequences, T) from the training split, the validation windows, and HellaSwag."""
    train, val = (data.Windows(shards, T) for shards in data.open_data(cfg.data, tokenizer))
    config.require(f"[1, {len(train)}]", n_sequences=cfg.n_sequences)  # at most all training windows
    windows = train.read(data.windows_at(0, cfg.n_sequences, len(train), cfg.seed))  # (n_sequences, T + 1)
    rows = [] if cfg.hellaswag_rows == 0 else hellaswag.read_rows(cfg.hellaswag_data, cfg.hellaswag_rows)
    questions = hellaswag.prepare(rows, tokenizer, "completion", T) if rows else None
    return torch.from_numpy(windows[:, :-1]).to(rt.device), val, questions


def evaluate(
    raw: model.GPT, val: data.Windows, questions: hellaswag.Questions | None, cfg: EvalConfig, rt: runtime.Runtime
) -> dict[str, Any]:
    """Fraction of zeros, numbers of parameters, loss in nats per token, perplexity, HellaSwag's acc and acc_norm."""
    is_zero = torch.cat([linear.weight.flatten() == 0 for linear in model.weight_matrices(raw).values()])
    n_params, n_zeros = raw.n_params(), int(is_zero.sum())
    metrics = dict(sparsity=n_zeros / len(is_zero), parameters=n_params, nonzero_parameters=n_params - n_zeros)
    loss = training.validate(raw, val, cfg.val_tokens, cfg.B, rt)
    metrics |= dict(loss=loss, perplexity=math.exp(min(loss, 99)))
    if questions:
        accuracy = hellaswag.evaluate(raw, questions, rt).accuracy
        metrics |= dict(hellaswag=accuracy["sum"], hellaswag_norm=accuracy["per token"])
    return metrics


def main(cfg: Config) -> None:
    """Evaluate, prune, evaluate again, and write the checkpoint and the report."""
    rt = runtime.setup(cfg.device, cfg.precision)
    if rt.world_size > 1:
        raise ValueError("prune.py runs as one process: start it with python, not torchrun")
    checkpoint.refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    raw, tokenizer, stage, step = checkpoint.load_model(cfg.checkpoint)
    require_prunable(raw, cfg)
    out_dir = files.make_folder(cfg.out_dir)
    path = out_dir / f"ckpt_{step:06d}.pt"
    for other in (*checkpoint.list_checkpoints(out_dir), out_dir / "log.txt"):
        if other.exists() and other != path:
            raise ValueError(f"--out_dir={out_dir} holds {other.name} of another run: use another --out_dir")
    idx, val, questions = load_data(cfg, raw.config.block_size, tokenizer, rt)
    raw.to(rt.device)
    before = evaluate(raw, val, questions, cfg, rt)
    prune_model(raw, idx, cfg, rt)
    after = evaluate(raw, val, questions, cfg, rt)
    rows = [(name, f"{before[name]:,.10g}", f"{after[name]:,.10g}") for name in before]
    runtime.print0(config.format_table([("", "before", f"{cfg.method} {cfg.pattern or cfg.ratio}"), *rows]))
    ckpt = checkpoint.Checkpoint(stage, step, raw.state_dict(), asdict(raw.config), tokenizer.name, pruned=asdict(cfg))
    checkpoint.write(path, ckpt)
    files.write_json(out_dir / "report.json", dict(config=asdict(cfg), before=before, after=after))
    runtime.print0(f"wrote {path} and {out_dir / 'report.json'}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
