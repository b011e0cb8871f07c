"""What sft.py and dpo.py share: checks of their constants, and a run that starts from another model."""

from typing import Any

import tiktoken
import torch

from neogpt import chat, checkpoint, config, lora, model, optim, runtime
from neogpt.run import Run


def check(cfg: Any) -> None:
    """Raise ValueError for the first shared constant that is out of range."""
    config.require("[1, inf)", T=cfg.T, B=cfg.B, max_steps=cfg.max_steps, eval_every=cfg.eval_every)
    config.require("[1, inf)", save_every=cfg.save_every, keep_last=cfg.keep_last)
    config.require("[0, inf)", max_lr=cfg.max_lr, weight_decay=cfg.weight_decay, grad_clip=cfg.grad_clip)
    config.require("[0, inf)", n_eval_prompts=cfg.n_eval_prompts, answer_tokens=cfg.answer_tokens)
    config.require("[0, inf)", lora_rank=cfg.lora_rank)
    config.require("(0, inf)", epochs=cfg.epochs, lora_alpha=cfg.lora_alpha)
    config.require("[0, 1]", warmup_frac=cfg.warmup_frac)
    config.require("(0, 1)", val_frac=cfg.val_frac)
    config.require("[0, 9e18]", seed=cfg.seed)


def open_run(
    cfg: Any, stage: str, stages: tuple[str, ...], rt: runtime.Runtime, compile: bool = False, dynamic: bool = False
) -> tuple[Run, tiktoken.Encoding, int]:
    """A run that starts from the model `cfg.checkpoint`, the tokenizer, and the sequence length T.

    cfg: a Config of sft.py or dpo.py. stages: those that the starting checkpoint may come from. Raises ValueError if
    the run in out_dir started from other weights or has other adapters.
    """
    checkpoint.refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    raw, tokenizer, _, _ = checkpoint.load_model(cfg.checkpoint, stages)
    config.require(f"[1, {raw.config.block_size}]", T=cfg.T)
    if cfg.lora_rank and optim.zero_masks(raw):
        raise ValueError(f"--lora_rank={cfg.lora_rank}: merged adapters would fill the zeros of a pruned model, use 0")
    run = Run(cfg, stage, tokenizer.name, rt)
    run.base = lora.fingerprint(raw.state_dict())
    if run.resumed:
        old = run.resumed.config
        if run.resumed.base != run.base:
            raise ValueError(
                f"the run in {cfg.out_dir} started from other weights than {cfg.checkpoint} holds now: use another "
                "--out_dir, or give the checkpoint file it started from"
            )
        if (old["lora_rank"], old["lora_alpha"]) != (cfg.lora_rank, cfg.lora_alpha):
            raise ValueError(f"{cfg.out_dir} has --lora_rank={old['lora_rank']} --lora_alpha={old['lora_alpha']}")
    torch.manual_seed(cfg.seed)  # initial weights of the adapters
    if cfg.lora_rank:
        lora.add_lora(raw, cfg.lora_rank, cfg.lora_alpha)
        if run.resumed:
            lora.load_lora(raw, run.resumed.adapters)
    elif run.resumed:
        raw = model.GPT.from_weights(raw.config, run.resumed.model)
    raw.to(rt.device)
    run.attach(raw, optim.make_optimizers(raw, weight_decay=cfg.weight_decay), compile, dynamic)
    return run, tokenizer, cfg.T or raw.config.block_size


def encode_questions(
    rows: list[chat.Row], cfg: Any, T: int, tokenizer: tiktoken.Encoding
) -> list[tuple[list[int], str]]:
    """(prompt ids, reference response) of each row, with room for an answer within T tokens."""
    budget = T - min(cfg.answer_tokens, T // 2)
    return [(chat.encode_prompt(r.instruction, r.context, budget, tokenizer), r.response) for r in rows]
