"""The common part of sft.py, dpo.py and grpo.py: constants, a run that starts from another model, and evaluations."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from neogpt import chat, checkpoint, config, data, generate, lora, model, optim, runtime, training
from neogpt.run import Run

Prompt = tuple[chat.Row, list[int]]  # a row and the ids of its prompt


@dataclass(frozen=True)
class FinetuneConfig:
    """The constants that the scripts have in common."""

    checkpoint: str  # the model to start from: an out_dir, a file, a Hugging Face folder or hub name
    data: str  # rows: a file, folder or pattern, or a dataset on the hub
    out_dir: str  # where log.txt and checkpoints go
    val_frac: float = 0.03  # fraction of the data held out, selected by the seed; no prompt is in both parts
    T: int | None = None  # longest sequence, tokens; None: the model's block_size
    B: int = 8  # sequences (sft.py, grpo.py) or pairs (dpo.py) per forward pass and device. Does not change the curve
    max_steps: int | None = None  # optimizer steps, instead of epochs
    weight_decay: float = 0.0  # on matrices and embeddings
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 1337  # of the split, the order of the data, and the adapters
    lora_rank: int = 0  # train adapters of this rank; 0: train all weights
    lora_alpha: float = 32.0  # adapters are scaled by alpha / rank
    sharded: bool = False  # divide weights, gradients and moments among the devices (FSDP2); not with LoRA
    recompute: bool = False  # compute activations again in the backward pass: a third more work, much less memory
    eval_every: int = 100  # steps between evaluations on the held-out data
    n_eval_prompts: int = 0  # compare greedy answers to this many held-out prompts with the responses in the data
    prompts: tuple[str, ...] = ("What is the capital of France?", "Tell me about your day.")  # answered when evaluating
    answer_tokens: int = 128  # longest answer, tokens
    save_every: int = 500  # steps between checkpoints
    keep_last: int = 2  # number of newest checkpoints to keep
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""  # show the values of log.txt there too; "": nowhere
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


def check(cfg: Any) -> None:
    """Raise ValueError for the first constant that is out of range. cfg: a Config of sft.py, dpo.py or grpo.py."""
    config.require("[1, inf)", T=cfg.T, B=cfg.B, max_steps=cfg.max_steps, eval_every=cfg.eval_every)
    config.require("[1, inf)", save_every=cfg.save_every, keep_last=cfg.keep_last)
    config.require("[0, inf)", max_lr=cfg.max_lr, weight_decay=cfg.weight_decay, n_eval_prompts=cfg.n_eval_prompts)
    config.require("[0, inf)", answer_tokens=cfg.answer_tokens, grad_clip=cfg.grad_clip, lora_rank=cfg.lora_rank)
    config.require("(0, inf)", epochs=cfg.epochs, lora_alpha=cfg.lora_alpha)
    config.require("[0, 1]", warmup_frac=cfg.warmup_frac)
    config.require("(0, 1)", val_frac=cfg.val_frac)
    config.require("[0, 9e18]", seed=cfg.seed)
    if cfg.sharded and cfg.lora_rank:
        raise ValueError(f"--sharded with --lora_rank={cfg.lora_rank}: adapters cannot be sharded, use --lora_rank=0")


def open_run(
    cfg: Any, stage: str, stages: tuple[str, ...], rt: runtime.Runtime, compile: bool = False, dynamic: bool = False
) -> tuple[Run, int]:
    """A run that starts from the model `cfg.checkpoint`, and the sequence length T. stages: as in `load_model`.
    compile, dynamic: as in `runtime.wrap`. Raises ValueError if the run in out_dir started from other weights or has
    other adapters.
    """
    checkpoint.refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    raw, tokenizer, _, _ = checkpoint.load_model(cfg.checkpoint, stages)
    config.require(f"[1, {raw.config.block_size}]", T=cfg.T)
    if cfg.lora_rank and optim.zero_masks(raw):
        raise ValueError(f"--lora_rank={cfg.lora_rank}: merged adapters would fill the zeros of a pruned model, use 0")
    run = Run(cfg, stage, tokenizer, rt)
    run.base = lora.fingerprint(raw.state_dict())
    if run.resumed:
        if run.resumed.base != run.base:
            remedy = "use another --out_dir, or give the checkpoint file it started from"
            raise ValueError(f"the run in {cfg.out_dir} did not start from the weights of {cfg.checkpoint}: {remedy}")
        adapters = dict(lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha)
        if changed := checkpoint.differences(run.resumed.config, adapters):
            raise ValueError(f"the run in {cfg.out_dir} has other adapters ({changed}): use another --out_dir")
        if not cfg.lora_rank:
            raw = model.GPT.from_weights(raw.config, run.resumed.model)
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)  # initial weights of the adapters
        lora.add_lora(raw, cfg.lora_rank, cfg.lora_alpha)
        if run.resumed:
            lora.load_lora(raw, run.resumed.adapters)
    T = cfg.T or raw.config.block_size
    plan = dict(T=T * (1 + (stage == "dpo")), sharded=cfg.sharded, recompute=cfg.recompute)  # pairs of responses
    runtime.print0(training.check_memory(raw, cfg.B, rt, **plan))
    raw = training.place(raw, rt, sharded=cfg.sharded, recompute=cfg.recompute, compile=compile, dynamic=dynamic)
    run.attach(raw, optim.make_optimizers(raw, weight_decay=cfg.weight_decay), compile, dynamic)
    return run, T


def identify(run: Run, examples: list[chat.Example], val_examples: list[chat.Example]) -> None:
    """`run.identify` with checksums of the tokens of all examples."""
    checksums = [data.checksum(example.ids for example in part) for part in (examples, val_examples)]
    run.identify(training_data=checksums[0], validation_data=checksums[1])


def read_rows(cfg: Any, rt: runtime.Runtime) -> tuple[list[chat.Row], list[chat.Row]]:
    """The training rows cfg.data, and the held-out rows cfg.val_data, or cfg.val_frac of the data if it is ""."""
    rows = chat.read_rows(cfg.data, rt)
    if cfg.val_data:
        return rows, chat.read_rows(cfg.val_data, rt)
    return chat.split_rows(rows, [*map(chat.whole_prompt, rows)], cfg.val_frac, cfg.seed)


def encode_prompts(run: Run, rows: list[chat.Row], budget: int, source: str) -> list[Prompt]:
    """Rows -> prompts of at most `budget` tokens. Longer ones are dropped and counted."""
    prompts = [(row, chat.encode_prompt(row, budget, run.tokenizer)) for row in rows]
    usable = [prompt for prompt in prompts if len(prompt[1]) <= budget]
    if len(usable) < len(prompts):
        runtime.print0(f"{source}: {len(prompts) - len(usable):,} prompts of more than {budget} tokens dropped")
    if not usable:
        raise ValueError(f"no prompt of {source} fits into {budget} tokens")
    return usable


def answer(run: Run, prompts: list[list[int]], seeds: list[int] | None = None) -> list[tuple[list[int], bool]]:
    """The response to each prompt without end-of-text, and whether it ended with it. No seeds: greedy."""
    answers, n, eot, size = [], run.cfg.answer_tokens, run.tokenizer.eot_token, 256 if seeds else 64
    raw = run.full_model()
    with run.rt.autocast():
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            options = dict(temperature=1.0, seeds=seeds[part]) if seeds else dict(temperature=0.0)
            answers += generate.complete(raw, prompts[part], n, eot, **options)
    return answers


def greedy_answers(run: Run, prompts: list[list[int]]) -> list[tuple[str, bool]]:
    """The greedy response to each prompt, and whether it ended with end-of-text."""
    return [(run.tokenizer.decode(ids), ended) for ids, ended in answer(run, prompts)]


def score_answers(run: Run, rows: list[chat.Row]) -> dict[str, float]:
    """Compare greedy answers with the responses of all rows. Returns fractions: exact (equals the response, and ended),
    begins (equals the response, or begins with it and a space), and ended (with end-of-text).
    """
    rt, T = run.rt, run.cfg.T or run.raw.config.block_size
    budget = T - min(run.cfg.answer_tokens, T // 2)  # for the prompt, so that an answer fits into T tokens
    mine = rows[rt.rank :: rt.world_size]
    prompts = [chat.encode_prompt(row, budget, run.tokenizer) for row in mine]
    counts = torch.zeros(3)
    for (text, ended), row in zip(greedy_answers(run, prompts), mine):
        begins = text == row.response or text.startswith(row.response + " ")
        counts += torch.tensor([text == row.response and ended, begins, ended])
    fractions = runtime.all_reduce_sum(counts.to(rt.device), rt) / len(rows)
    return dict(zip(("exact", "begins", "ended"), fractions.tolist()))


def report(run: Run, scores: dict[str, float], text: str) -> bool:
    """Log and print an evaluation, and print greedy answers to cfg.prompts. scores: by name, with the held-out loss as
    "val". Returns whether that loss is the lowest of the run so far.
    """
    cfg, loss = run.cfg, scores["val"]
    best = run.step > 0 and loss < run.scores.get("best", math.inf)
    run.record(**scores)
    if best:
        run.scores["best"] = loss
    runtime.print0(f"step {run.step}: held-out loss {loss:.4f}{', the lowest so far' if best else ''}; {text}")
    run.full_model()
    if run.rt.rank == 0:
        prompts = [run.tokenizer.encode_ordinary(chat.prompt_text(prompt)) for prompt in cfg.prompts]
        for prompt, (answer, ended) in zip(cfg.prompts, greedy_answers(run, prompts)):
            runtime.print0(f"  > {prompt} -> {answer}{'' if ended else ' …'}")
    return best
