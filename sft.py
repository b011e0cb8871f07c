"""Supervised fine-tuning: teach a checkpoint of train_gpt2.py to answer, from rows of prompts and responses.

    python sft.py demo                                   # after `python train_gpt2.py demo`: half a minute
    python sft.py                                        # out/gpt2 on databricks-dolly-15k
    torchrun --nproc_per_node=8 sft.py --hf=gpt2         # from OpenAI's weights, on eight GPUs
    python sft.py --data=rows.jsonl --lora_rank=16 --max_lr=5e-4
    python sample.py --checkpoint=out/sft --chat         # talk to the result

Rows have the fields of databricks-dolly-15k (instruction, context, response) or prompt and response. Only the
response and the end-of-text behind it are learned. Where a row is too long its context is cut first, then the
response's tail; rows without a response are dropped and counted.

Writes checkpoints into out_dir (which continue when the same command is run again, and which dpo.py,
hellaswag.py and sample.py take), best.pt (the one with the lowest held-out loss), log.txt, and with LoRA the
adapters in PEFT's format.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor, nn

from data import prefetch, prompt_text
from finetune import (
    Example,
    Row,
    collate,
    encode,
    encode_prompt,
    forward,
    make_example,
    open_run,
    pack,
    read_rows,
    save,
    score_answers,
    share,
    show_answers,
    split_rows,
    step_examples,
)
from model import GPT
from training import (
    Dist,
    Log,
    backward,
    check_least,
    cleanup,
    cosine_lr,
    count_bad,
    parse,
    pick_T,
    setup,
    stop_on_signals,
    total,
    train_step,
)


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # what to start from: a folder of train_gpt2.py, or one checkpoint file
    hf: str = ""  # instead: a GPT-2 on the Hugging Face hub, or a folder in its format
    data: str = "databricks/databricks-dolly-15k"  # dataset on the hub, or a .json, .jsonl or .parquet file
    val_data: str = ""  # held-out rows, likewise; "": a part of data
    val_frac: float = 0.03  # that part, chosen by the seed; rows with the same prompt stay together
    out_dir: str = "out/sft"  # where log.txt and checkpoints go
    resume: Literal["auto", "never"] = "auto"  # auto: continue out_dir's newest checkpoint; never: refuse

    T: int | None = None  # longest sequence, tokens; None: the model's block_size
    packing: bool = False  # several rows in one sequence, each to itself: less padding
    B: int = 8  # sequences per forward and device. Does not change the curve
    rows_per_step: int = 32  # rows per optimizer step over all devices
    epochs: float = 3.0  # times that every row is seen
    max_steps: int | None = None  # instead of epochs: so many optimizer steps
    max_lr: float = 5e-5  # peak learning rate; with LoRA about ten times as much
    min_lr_frac: float = 0.0  # the cosine ends at this share of max_lr
    warmup_frac: float = 0.03  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0  # on matrices and embeddings
    beta1: float = 0.9  # AdamW: memory of gradients
    beta2: float = 0.95  # AdamW: memory of squared gradients
    eps: float = 1e-8  # AdamW: added to their root
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 1337  # of the split, the order of the rows, and the adapters
    lora_rank: int = 0  # train adapters of this rank instead of the weights; 0: the weights
    lora_alpha: float = 32.0  # adapters count alpha / rank
    keep_masks: bool = True  # weights that prune.py made zero stay zero
    lora_merge: bool = True  # checkpoints hold the merged model; False: only the adapters, which are small

    eval_every: int = 100  # steps between held-out losses
    answer_rows: int = 0  # score the greedy answers to so many held-out prompts, beside the loss; 0: none
    prompts: tuple[str, ...] = (  # answered before, during and after
        "What is the capital of France?",
        "Give me three tips for a good night's sleep.",
        "Write a short poem about the sea.",
    )
    answer_tokens: int = 128  # longest answer, tokens
    save_every: int = 500  # steps between checkpoints; the best one is kept beside them
    keep: int = 2  # newest checkpoints kept

    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool | None = None  # of the step; None: on CUDA with packing. Else resuming may move last bits
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


DEMO = Path(__file__).parent / "demo"
CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo",
        data=str(DEMO / "sft.jsonl"),
        val_data=str(DEMO / "sft_held_out.jsonl"),
        out_dir="out/demo-sft",
        rows_per_step=16,
        epochs=4.0,
        max_lr=1e-3,
        eval_every=41,
        answer_rows=160,
        prompts=("Where does Ada live?", "What does Leo like to eat?", "Whom does Rosa like best?"),
        answer_tokens=80,
    ),
}


def prepare(
    rows: Sequence[Row], T: int, tokenizer: tiktoken.Encoding, source: str, log: Log
) -> list[Example]:
    """Rows -> examples of at most T inputs. What had to be cut or dropped is counted and said."""
    examples, n_cut = [], 0
    for row in rows:
        # the response and its end-of-text should fit behind the prompt; one of its ids is only predicted
        room = max(1, T - len(encode(row.response, tokenizer)))
        prompt = encode_prompt(row.instruction, row.context, room, tokenizer)
        example = make_example(prompt, row.response, T, tokenizer)
        n_cut += example is not None and example.ids[-1] != tokenizer.eot_token
        if example:
            examples.append(example)
    if len(examples) < len(rows):
        log.note(f"{source}: {len(rows) - len(examples):,} rows dropped: prompts longer than T={T} tokens")
    if n_cut:
        log.note(f"{source}: {n_cut:,} responses cut to fit into T={T} tokens")
    if not examples:
        raise SystemExit(f"no row of {source} is left to learn from")
    return examples


def bins_of(examples: Sequence[Example], T: int, packing: bool) -> list[list[Example]]:
    """One example per sequence, longest first so that neighbours need little padding; or packed."""
    return pack(examples, T) if packing else [[e] for e in sorted(examples, key=lambda e: -len(e.ids))]


@torch.no_grad()
def measure(
    raw: GPT, examples: Sequence[Example], B: int, amp: torch.autocast, dist: Dist
) -> tuple[float, float]:
    """Held-out loss, nats per target token, and the share of targets that are the most likely token."""
    sums = []
    for rows in share(bins_of(examples, 0, packing=False), B, dist):
        batch = collate(rows, dist.device)
        with amp:
            logits, loss = forward(raw, batch, "sum")
        hits = (logits[..., : raw.config.n_tokens].argmax(-1) == batch["y"]).sum()
        sums.append(
            torch.stack([loss.float(), hits.float(), loss.new_tensor(batch["n"], dtype=torch.float32)])
        )
    loss, hits, n = total(torch.stack(sums).sum(0), dist).tolist()
    return loss / n, hits / n


def main(cfg: Config) -> None:
    """Fine-tune for the given epochs; measure, answer and save on the way."""
    check_least(cfg, 1, "B", "rows_per_step", "eval_every", "save_every", "keep")
    if cfg.max_steps is not None:
        check_least(cfg, 1, "max_steps")
    dist = setup(cfg.device, cfg.deterministic)
    stop_requested = stop_on_signals()
    out_dir = Path(cfg.out_dir)
    notes: list[str] = []  # until there is a log
    run = open_run(cfg, "sft", ("pretraining", "sft"), dist, notes.append)
    raw, tokenizer, amp, state = run.raw, run.tokenizer, run.amp, run.state
    log = Log(out_dir, dist)
    log.header(cfg, device=dist.device, devices=dist.world_size, tokenizer=tokenizer.name)
    for text in notes:
        log.note(text)

    # data: rows held out, and examples to learn from
    T = pick_T(cfg.T, raw.config.block_size)
    rows = read_rows(cfg.data, dist, log.note)
    if cfg.val_data:
        val_rows = read_rows(cfg.val_data, dist, log.note)
    else:
        train, held_out = split_rows(
            [prompt_text(r.instruction, r.context) for r in rows], cfg.val_frac, cfg.seed
        )
        rows, val_rows = [rows[i] for i in train], [rows[i] for i in held_out]
    examples = prepare(rows, T, tokenizer, cfg.data, log)
    val_examples = prepare(val_rows, T, tokenizer, cfg.val_data or "the held-out part", log)
    room = T - min(cfg.answer_tokens, T // 2)  # for the prompt where an answer shall follow
    questions = [
        (encode_prompt(row.instruction, row.context, room, tokenizer), row.response)
        for row in val_rows[: cfg.answer_rows]
    ]
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(examples) / cfg.rows_per_step))

    def loss_fn(model: nn.Module, batch: dict) -> Tensor:
        with amp:
            return forward(model, batch, "sum")[1]

    def read(step: int) -> list[dict]:
        chosen = step_examples(examples, step, cfg.rows_per_step, cfg.seed)
        parts = share(bins_of(chosen, T, cfg.packing), cfg.B, dist)
        if cfg.packing and run.compiled:  # one shape for the compiler
            return [collate(bins + [[]] * (cfg.B - len(bins)), dist.device, T) for bins in parts]
        return [collate(bins, dist.device) for bins in parts]

    if run.compiled or dist.world_size > 1:  # before the clock and the first step: see train_gpt2.py
        backward(run.model, read(0)[0], loss_fn, 1.0)
        raw.zero_grad()

    first = examples[0]
    prompt, response = (
        tokenizer.decode(list(ids)) for ids in (first.ids[: first.n_prompt], first.ids[first.n_prompt :])
    )
    log.note(
        f"{len(examples):,} rows to learn from, {len(val_examples):,} held out; {max_steps:,} steps of "
        f"{cfg.rows_per_step} rows\nthe first row, with [what is learned]: {prompt}[{response}]"
    )
    start = state["step"] if state else 0
    if start > max_steps:
        raise SystemExit(
            f"the run in {out_dir} is at step {start} already, and this one has {max_steps} steps"
        )
    scores = state["scores"] if state else {}
    best_loss = scores.get("best", math.inf)
    schedule = dict(max_steps=max_steps, warmup_steps=round(cfg.warmup_frac * max_steps))
    schedule |= dict(max_lr=cfg.max_lr, min_lr_frac=cfg.min_lr_frac)
    batches = prefetch(read, start, max_steps)
    bad_steps, stopped = 0, False
    for step in range(start, max_steps + 1):
        last, best = step == max_steps, False
        if (step % cfg.eval_every == 0 or last) and not stopped:
            loss, accuracy = measure(raw, val_examples, cfg.B, amp, dist)
            best = step > 0 and loss < best_loss
            best_loss = loss if best else best_loss
            scores = dict(val=loss, accuracy=accuracy, best=best_loss)
            text = f"step {step}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 99)):.2f}, "
            text += f"token accuracy {accuracy:.3f}{', the best so far' if best else ''}"
            if questions:
                score = score_answers(raw, questions, cfg.answer_tokens, tokenizer, amp, dist)
                scores |= score._asdict()
                text += (
                    f"; of {len(questions)} answers {score.exact:.1%} exactly right, {score.ended:.1%} ended"
                )
            log.scalars(step, **{name: value for name, value in scores.items() if name != "best"})
            log.note(text)
            show_answers(run, cfg, log, dist)
        if dist.rank == 0 and (best or step > start and (step % cfg.save_every == 0 or last or stopped)):
            save(cfg, "sft", run, best, step=step, scores=scores)
        if last or stopped:
            break

        t0 = time.perf_counter()
        lr = cosine_lr(step, **schedule)
        micro_batches, stop = next(batches), stop_requested()
        limits = dict(grad_clip=cfg.grad_clip, dist=dist, stop=stop)
        out = train_step(run.model, run.optimizers, micro_batches, loss_fn, lr=lr, **limits)()
        dt = time.perf_counter() - t0
        log.scalars(step, train=out.loss, lr=lr, norm=out.grad_norm)
        log.line(
            step, max_steps, out, lr, dt, sum(b["x"].numel() for b in micro_batches) * dist.world_size, None
        )
        bad_steps, stopped = count_bad(bad_steps, out), out.stop

    log.note(f"stopped at step {step}; the same command continues" if stopped else f"done: {out_dir}")
    cleanup(dist)


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
