"""The common part of sft.py, dpo.py and grpo.py: constants, a run that starts from another model, and evaluations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from neogpt import chat, checkpoint, config, generate, lora, model, optim, rewards, runtime, training
from neogpt.run import Run

Prompt = tuple[chat.Row, list[int]]  # a row and the ids of its prompt


@dataclass(frozen=True)
class FinetuneConfig:
    """The constants that the scripts have in common."""

    checkpoint: str = "out/sft"  # the model to start from: an out_dir, a file, a Hugging Face folder or hub name
    data: str = "databricks/databricks-dolly-15k"  # rows: a file, folder or pattern, or a dataset on the hub
    val_data: str = ""  # held-out rows, as in data; "": the fraction val_frac of data
    val_frac: Annotated[float, "(0, 1)"] = 0.03  # fraction of the prompts, with all their rows, selected by the seed
    T: config.PositiveInt | None = None  # longest sequence, tokens; None: the model's block_size
    B: config.PositiveInt = 8  # sequences or pairs per forward pass and device. Does not change the curve
    epochs: config.PositiveFloat = 1.0  # passes over the data
    max_steps: config.PositiveInt | None = None  # optimizer steps, instead of epochs
    weight_decay: config.NonNegativeFloat = 0.0  # on matrices and embeddings
    grad_clip: config.NonNegativeFloat = 1.0  # largest gradient norm; 0: no clipping
    seed: config.Seed = 1337  # of the split, the order of the data, the adapters, and the answers of grpo.py
    lora_rank: config.NonNegativeInt = 0  # train adapters of this rank; 0: train all weights
    lora_alpha: config.PositiveFloat = 32.0  # adapters are scaled by alpha / rank
    sharded: bool = False  # divide weights, gradients and moments among the devices (FSDP2); not with LoRA
    recompute: bool = False  # compute activations again in the backward pass: a third more work, much less memory
    eval_every: config.PositiveInt = 100  # steps between evaluations on the held-out data
    n_eval_prompts: config.NonNegativeInt = 0  # held-out prompts whose greedy answers are compared with the responses
    prompts: tuple[str, ...] = ("What is the capital of France?", "Tell me about your day.")  # answered when evaluating
    answer_tokens: config.NonNegativeInt = 128  # longest answer, tokens
    save_every: config.PositiveInt = 500  # steps between checkpoints
    keep_last: config.PositiveInt = 2  # number of newest checkpoints to keep
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""  # show the values of log.txt there too; "": nowhere
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


def open_run(
    cfg: Any, stage: str, stages: tuple[str, ...], rt: runtime.Runtime, compile: bool = False, dynamic: bool = False
) -> tuple[Run, runtime.Runtime, int]:
    """A run that starts from the model `cfg.checkpoint`, its Runtime, and the sequence length T. stages: as in
    `load_model`; compile, dynamic: as in `training.wrap`. Raises ValueError if the run in out_dir has another start.
    """
    if cfg.sharded and cfg.lora_rank:
        raise ValueError(f"--sharded with --lora_rank={cfg.lora_rank}: adapters cannot be sharded, use --lora_rank=0")
    checkpoint.refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    raw, tokenizer, _, _ = checkpoint.load_model(cfg.checkpoint, stages)
    config.require(f"[1, {raw.config.block_size}]", T=cfg.T)
    if cfg.lora_rank and optim.zero_masks(raw):
        raise ValueError(f"--lora_rank={cfg.lora_rank}: merged adapters would fill the zeros of a pruned model, use 0")
    run = Run(cfg, stage, tokenizer, rt)
    rt = run.rt
    run.base = lora.fingerprint(raw.state_dict())
    if run.resumed:
        start = dict(weights=run.base, lora_rank=cfg.lora_rank)
        start |= dict(lora_alpha=cfg.lora_alpha) if cfg.lora_rank else {}
        if changed := checkpoint.differences(run.resumed.config | dict(weights=run.resumed.base), start):
            problem = f"the run in {cfg.out_dir} has another start than {cfg.checkpoint} ({changed})"
            raise ValueError(f"{problem}: use another --out_dir, or the old --checkpoint file and LoRA options")
        if not cfg.lora_rank:
            raw = model.GPT.from_weights(raw.config, run.resumed.model)
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)  # initial weights of the adapters
        lora.add_lora(raw, cfg.lora_rank, cfg.lora_alpha)
        if run.resumed:
            lora.load_lora(raw, run.resumed.adapters)
    T = cfg.T or raw.config.block_size
    plan = dict(T=T * (1 + (stage == "dpo")), sharded=cfg.sharded, recompute=cfg.recompute)  # a pair is two sequences
    plan |= dict(muon=False, compiled=compile and not dynamic)
    runtime.print0(training.check_memory(raw, cfg.B, rt, **plan))
    net = training.wrap(raw, rt, cfg.sharded, cfg.recompute, compile, dynamic)
    run.attach(raw, net, optim.make_optimizers(raw, weight_decay=cfg.weight_decay))
    return run, rt, T


def read_rows(cfg: Any, read: Callable = chat.read_rows, prompt_of: Callable = chat.whole_prompt) -> tuple[list, list]:
    """The training rows cfg.data, and the held-out rows cfg.val_data, or cfg.val_frac of the data if it is ""."""
    rows = read(cfg.data)
    if cfg.val_data:
        return rows, read(cfg.val_data)
    return chat.split_rows(rows, [*map(prompt_of, rows)], cfg.val_frac, cfg.seed)


def report_fit(source: str, budget: int, n_rows: int, n_usable: int, n_truncated: int = 0) -> None:
    """Print how many rows of a source do not fit into `budget` tokens. Raises ValueError if none is usable."""
    if not n_usable:
        raise ValueError(f"no row of {source} fits into {budget} tokens")
    if n_usable < n_rows:
        runtime.print0(f"{source}: {n_rows - n_usable:,} rows dropped: they do not fit into {budget} tokens")
    if n_truncated:
        runtime.print0(f"{source}: {n_truncated:,} rows with a response truncated to fit into {budget} tokens")


def encode_prompts(run: Run, rows: list[chat.Row], budget: int, source: str) -> list[Prompt]:
    """Rows -> prompts of at most `budget` tokens. Longer prompts are dropped."""
    prompts = [(row, chat.encode_prompt(row, budget, run.tokenizer)) for row in rows]
    usable = [prompt for prompt in prompts if len(prompt[1]) <= budget]
    report_fit(source, budget, len(rows), len(usable))
    return usable


def answer(run: Run, prompts: list[Prompt], seeds: list[int] | None = None) -> list[rewards.Answer]:
    """The answer to each prompt, on all ranks: sampled with these seeds, or greedy. Each rank generates its part."""
    raw, answers, n, eot, rt = run.full_model(), [], run.cfg.answer_tokens, run.tokenizer.eot_token, run.rt
    size = 256 if seeds else 64  # prompts per batch
    per_rank = -(-len(prompts) // rt.world_size)
    own = range(len(prompts))[rt.rank * per_rank : (rt.rank + 1) * per_rank]
    for start in own[::size]:
        part = slice(start, min(start + size, own.stop))
        options = dict(temperature=1.0, seeds=seeds[part]) if seeds else dict(temperature=0.0)
        with rt.autocast():
            found = generate.complete(raw, [ids for _, ids in prompts[part]], n, eot, **options)
        for (row, _), (ids, ended) in zip(prompts[part], found):
            texts = chat.whole_prompt(row), row.response, run.tokenizer.decode(ids)
            answers.append(rewards.Answer(*texts, ids + [eot] * ended, ended))
    return sum(runtime.all_gather(answers, rt), [])


def score_answers(run: Run, rows: list[chat.Row]) -> dict[str, float]:
    """Means over greedy answers: rewards exact and begins (rewards.py), fraction that ended; {} without rows."""
    T = run.cfg.T or run.raw.config.block_size
    budget = T - min(run.cfg.answer_tokens, T // 2)  # for the prompt, so that an answer fits into T tokens
    answers = answer(run, [(row, chat.encode_prompt(row, budget, run.tokenizer)) for row in rows])
    scores = [[rewards.exact(each), rewards.begins(each), each.ended] for each in answers]
    return dict(zip(("exact", "begins", "ended"), torch.tensor(scores).mean(dim=0).tolist())) if rows else {}


def report(run: Run, scores: dict[str, float]) -> bool:
    """Print and log an evaluation and answers to cfg.prompts. Returns whether "val" is the lowest after step 0."""
    best = run.step > 0 and scores["val"] < run.scores.get("best", math.inf)
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    runtime.print0(f"step {run.step}, held out: {text}{' (lowest val so far)' if best else ''}")
    rows = [chat.Row(prompt, "", "") for prompt in run.cfg.prompts]
    for row, each in zip(rows, answer(run, [(row, chat.encode_prompt(row, 0, run.tokenizer)) for row in rows])):
        runtime.print0(f"  > {row.instruction} -> {each.text}{'' if each.ended else ' …'}")
    run.record(**scores)
    if best:
        run.scores["best"] = scores["val"]
    return best
