"""Supervised fine-tuning: teach a pretrained model to answer, from rows of prompts and responses.

    python sft.py demo                                   # after `python train_gpt2.py demo`: half a minute
    python sft.py                                        # out/gpt2 on databricks-dolly-15k
    torchrun --nproc_per_node=8 sft.py --checkpoint=gpt2     # OpenAI's weights, eight GPUs
    python sft.py --data=rows.jsonl --lora_rank=16 --max_lr=5e-4
    python sample.py --checkpoint=out/sft --chat         # talk to the result

Rows have the fields of databricks-dolly-15k (instruction, context, response), or prompt and response. The loss is on
the response and the end-of-text after it. For a row that is too long the context is truncated first, then the response;
rows without a response are dropped and counted.

Writes log.txt and checkpoints into out_dir (the same command continues; dpo.py, hellaswag.py and sample.py read them),
best.pt (the one with the lowest held-out loss) and, with LoRA, the adapters in PEFT's format.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor, nn

from neogpt import chat, config, data, finetune, model, optim, runtime, training
from neogpt.chat import Example
from neogpt.run import Run

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # the model to start from: an out_dir, a file, a Hugging Face folder or hub name
    data: str = "databricks/databricks-dolly-15k"  # dataset on the hub, or a .json, .jsonl or .parquet file
    val_data: str = ""  # held-out rows, likewise; "": a part of data
    val_frac: float = 0.03  # the fraction of data held out, selected by the seed; split by prompt
    out_dir: str = "out/sft"  # where log.txt and checkpoints go

    T: int | None = None  # longest sequence, tokens; None: the model's block_size
    packing: bool = False  # several rows per sequence, without attention between them: less padding
    B: int = 8  # sequences per forward pass and device. Does not change the curve
    rows_per_step: int = 32  # rows per optimizer step over all devices
    epochs: float = 3.0  # passes over the data
    max_steps: int | None = None  # optimizer steps, instead of epochs
    max_lr: float = 5e-5  # peak learning rate; about ten times as much with LoRA
    warmup_frac: float = 0.03  # fraction of the steps for linear warmup; then a cosine to 0
    weight_decay: float = 0.0  # on matrices and embeddings
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 1337  # of the split, the order of the rows, and the adapters
    lora_rank: int = 0  # train adapters of this rank; 0: train all weights
    lora_alpha: float = 32.0  # adapters are scaled by alpha / rank

    eval_every: int = 100  # steps between held-out losses
    n_eval_prompts: int = 0  # score greedy answers to this many held-out prompts
    prompts: tuple[str, ...] = (  # answered when evaluating
        "What is the capital of France?",
        "Write a short poem about the sea.",
    )
    answer_tokens: int = 128  # longest answer, tokens
    save_every: int = 500  # steps between checkpoints
    keep_last: int = 2  # number of newest checkpoints to keep

    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool | None = None  # torch.compile the step; None: on CUDA with packing, which has a fixed shape
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


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
        n_eval_prompts=160,
        prompts=("Where does Ada live?", "What does Leo like to eat?", "Whom does Rosa like best?"),
        answer_tokens=80,
    ),
}


def make_examples(rows: Sequence[chat.Row], T: int, tokenizer: tiktoken.Encoding, source: str) -> list[Example]:
    """Rows -> examples of at most T input tokens. Truncated and dropped rows are counted and reported."""
    examples, n_truncated = [], 0
    for row in rows:
        # leave room for the response and its end-of-text, whose last token is only predicted
        budget = max(1, T - len(tokenizer.encode_ordinary(row.response)))
        prompt = chat.encode_prompt(row.instruction, row.context, budget, tokenizer)
        if example := chat.make_example(prompt, row.response, T, tokenizer):
            n_truncated += example.ids[-1] != tokenizer.eot_token
            examples.append(example)
    if len(examples) < len(rows):
        runtime.print0(f"{source}: {len(rows) - len(examples):,} rows dropped: prompts exceed T={T} tokens")
    if n_truncated:
        runtime.print0(f"{source}: {n_truncated:,} responses truncated to T={T} tokens")
    if not examples:
        raise ValueError(f"no row of {source} is usable with T={T}")
    return examples


def make_bins(examples: Sequence[Example], T: int, packing: bool) -> list[list[Example]]:
    """Packed sequences, or one example per sequence, longest first so that neighbors need little padding."""
    return chat.pack(examples, T) if packing else [[e] for e in sorted(examples, key=lambda e: -len(e.ids))]


@torch.no_grad()
def evaluate(raw: model.GPT, examples: Sequence[Example], B: int, rt: runtime.Runtime) -> tuple[float, float]:
    """Held-out loss, nats per target token, and token accuracy."""
    sums = []
    for bins in chat.shard_across_ranks(make_bins(examples, 0, packing=False), B, rt):
        batch = chat.collate(bins, rt.device)
        with rt.autocast():
            logits, loss = chat.forward(raw, batch, "sum")
        hits = (logits[..., : raw.config.n_tokens].argmax(-1) == batch["y"]).sum()
        n = loss.new_tensor(batch["n"], dtype=torch.float32)
        sums.append(torch.stack([loss.float(), hits.float(), n]))
    loss, hits, n = runtime.all_reduce_sum(torch.stack(sums).sum(0), rt).tolist()
    return loss / n, hits / n


def read_data(cfg: Config, rt: runtime.Runtime) -> tuple[list[chat.Row], list[chat.Row]]:
    """The rows to train on and the held-out rows."""
    rows = chat.read_rows(cfg.data, rt)
    if cfg.val_data:
        return rows, chat.read_rows(cfg.val_data, rt)
    prompts = [chat.prompt_text(row.instruction, row.context) for row in rows]
    train, held_out = chat.split_rows(prompts, cfg.val_frac, cfg.seed)
    return [rows[i] for i in train], [rows[i] for i in held_out]


def evaluate_and_report(
    run: Run, examples: Sequence[Example], questions: list[tuple[list[int], str]], tokenizer: tiktoken.Encoding
) -> bool:
    """Evaluate on held-out rows, log and print the results; return whether the loss is the lowest so far."""
    cfg, rt = run.cfg, run.rt
    loss, accuracy = evaluate(run.raw, examples, cfg.B, rt)
    best = run.step > 0 and loss < run.scores.get("best", math.inf)
    scores = dict(val=loss, accuracy=accuracy)
    text = f"step {run.step}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 99)):.2f}, "
    text += f"token accuracy {accuracy:.3f}{', the best so far' if best else ''}"
    if questions:
        score = chat.score_answers(run.raw, questions, cfg.answer_tokens, tokenizer, rt)
        scores |= score._asdict()
        text += f"; {len(questions)} answers: {score.exact:.1%} exact match, {score.ended:.1%} ended"
    run.record(**scores)
    if best:
        run.scores["best"] = loss
    runtime.print0(text)
    chat.show_answers(run.raw, cfg.prompts, cfg.answer_tokens, tokenizer, rt)
    return best


def main(cfg: Config) -> None:
    """Fine-tune; evaluate, answer and save in between."""
    finetune.check(cfg)
    config.require("[1, inf)", rows_per_step=cfg.rows_per_step)
    rt = runtime.setup(cfg.device, cfg.precision, cfg.deterministic)
    compiled = cfg.packing and rt.device.type == "cuda" if cfg.compile is None else cfg.compile
    stages = ("pretraining", "sft")
    run, tokenizer, T = finetune.open_run(cfg, "sft", stages, rt, compiled, dynamic=not cfg.packing)
    rows, val_rows = read_data(cfg, rt)
    examples = make_examples(rows, T, tokenizer, cfg.data)
    val_examples = make_examples(val_rows, T, tokenizer, cfg.val_data or "the held-out part")
    questions = finetune.encode_questions(val_rows[: cfg.n_eval_prompts], cfg, T, tokenizer)
    n = cfg.rows_per_step
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(examples) / n))

    def loss_fn(net: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        with rt.autocast():
            return chat.forward(net, batch, "sum")[1], {}

    def read(step: int) -> training.Batch:
        chosen = [examples[i] for i in run.items(step, n, len(examples))]
        parts = chat.shard_across_ranks(make_bins(chosen, T, cfg.packing), cfg.B, rt)
        width = 1
        if cfg.packing and compiled:  # a fixed shape for the compiler
            parts, width = [bins + [[]] * (cfg.B - len(bins)) for bins in parts], T
        n_tokens = sum(example.n_inputs for example in chosen)
        return training.Batch([chat.collate(bins, rt.device, width) for bins in parts], n, n_tokens)

    run.warm_up(read(run.step), loss_fn)
    ids, n_prompt = examples[0]
    prompt, target = (tokenizer.decode(part.tolist()) for part in (ids[:n_prompt], ids[n_prompt:]))
    runtime.print0(
        f"{len(examples):,} rows to train on, {len(val_examples):,} held out; {max_steps:,} steps of {n} rows\n"
        f"the first row, with the loss on [the text in brackets]: {prompt}[{target}]"
    )
    lr_at = optim.schedule("cosine", max_steps, round(cfg.warmup_frac * max_steps), cfg.max_lr)
    batches = data.prefetch(read, run.step, max_steps)
    for step in run.steps(max_steps):
        best = run.due(cfg.eval_every) and evaluate_and_report(run, val_examples, questions, tokenizer)
        if best or run.due(cfg.save_every):
            run.save(best)
        if run.last:
            break
        run.update(next(batches), loss_fn, lr=lr_at(step))
    run.finish()


if __name__ == "__main__":
    config.run(main, CONFIGS)
