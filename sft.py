"""Supervised fine-tuning: teach a pretrained model to answer, from rows of prompts and responses.

    python sft.py demo                                   # after `python train_gpt2.py demo`: half a minute
    python sft.py                                        # out/gpt2 on databricks-dolly-15k
    torchrun --nproc_per_node=8 sft.py --checkpoint=gpt2     # OpenAI's weights, eight GPUs
    python sft.py --data=rows.jsonl --lora_rank=16 --max_lr=5e-4

Rows have a prompt, perhaps a context, and a response (names: ALIASES in neogpt/chat.py), or are conversations. The loss
is on the last response and the end-of-text after it. In rows that are too long, the oldest turns are left out, then the
context is truncated, then the response. Unusable rows are dropped and counted.
"""

import math
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor, nn

from neogpt import chat, config, data, finetune, model, optim, runtime, training
from neogpt.run import Run


@dataclass(frozen=True)
class Config(finetune.FinetuneConfig):
    checkpoint: str = "out/gpt2"  # the model to start from: an out_dir, a file, a Hugging Face folder or hub name
    out_dir: str = "out/sft"  # log.txt, checkpoints, best.pt (lowest held-out loss) and, with LoRA, adapter/ for PEFT
    packing: bool = False  # several rows per sequence, without attention between them: less padding
    rows_per_step: config.PositiveInt = 32  # rows per optimizer step over all devices
    epochs: config.PositiveFloat = 3.0  # passes over the data
    max_lr: config.NonNegativeFloat = 5e-5  # peak learning rate; about ten times as much with LoRA
    warmup_frac: config.Fraction = 0.03  # fraction of the steps for linear warmup; then a cosine to 0
    compile: bool | None = None  # torch.compile the step; None: on CUDA with packing, which has a fixed shape


CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo",
        data=str(config.ROOT / "demo" / "sft.jsonl"),
        val_data=str(config.ROOT / "demo" / "sft_held_out.jsonl"),
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


def make_examples(rows: list[chat.Row], T: int, tokenizer: tiktoken.Encoding, source: str) -> list[chat.Example]:
    """Rows -> examples of at most T input tokens. Rows whose prompt is longer are dropped."""
    examples = []
    for row in rows:
        # the context is truncated so that the response fits; its end-of-text is a target, but no input
        budget = max(1, T - len(tokenizer.encode_ordinary(row.response)))
        prompt = chat.encode_prompt(row, budget, tokenizer)
        if example := chat.make_example(prompt, row.response, T, tokenizer):
            examples.append(example)
    n_truncated = sum(example.ids[-1] != tokenizer.eot_token for example in examples)
    finetune.report_fit(source, T, len(rows), len(examples), n_truncated)
    return examples


def loss_fn(net: nn.Module, batch: dict) -> tuple[Tensor, dict]:
    """The cross-entropy of a micro-batch of `chat.collate`, summed over the target tokens (those with y >= 0)."""
    return chat.loss(net, batch, "sum"), {}


@torch.no_grad()
def evaluate(run: Run, examples: list[chat.Example], rows: list[chat.Row]) -> bool:
    """Evaluate on held-out examples and on greedy answers to `rows`; return whether the loss is the lowest so far."""
    cfg, rt, raw, sums = run.cfg, run.rt, run.full_model(), []
    sequences = [[example] for example in sorted(examples, key=lambda e: -len(e.ids))]  # sorted: little padding
    for bins in chat.shard_across_ranks(sequences, cfg.B, rt):
        batch = chat.collate(bins, rt.device)
        with rt.autocast():
            logits = raw(batch["x"])  # one example per sequence: no positions and mask
            loss = model.cross_entropy(logits, batch["y"], "sum")
        n_correct = (logits[..., : raw.config.n_tokens].argmax(-1) == batch["y"]).sum()
        sums.append(torch.stack([loss, n_correct.float()]))
    loss, n_correct = runtime.all_reduce_sum(torch.stack(sums).sum(0), rt).tolist()
    n = sum(len(e.ids) - e.n_prompt for e in examples)  # target tokens
    scores = dict(val=loss / n, perplexity=math.exp(min(loss / n, 99)), accuracy=n_correct / n)
    return finetune.report(run, scores | finetune.score_answers(run, rows))


def main(cfg: Config) -> None:
    """Fine-tune; evaluate, answer and save in between."""
    rt = runtime.setup(cfg.device, cfg.precision, cfg.deterministic)
    compiled = cfg.packing and rt.device.type == "cuda" if cfg.compile is None else cfg.compile
    run, rt, T = finetune.open_run(cfg, "sft", ("pretraining", "sft"), rt, compiled, dynamic=not cfg.packing)
    rows, val_rows = finetune.read_rows(cfg)
    examples = make_examples(rows, T, run.tokenizer, cfg.data)
    val_examples = make_examples(val_rows, T, run.tokenizer, cfg.val_data or "the held-out part")
    n = cfg.rows_per_step
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(examples) / n))

    def read(step: int) -> training.Batch:
        chosen = [examples[i] for i in run.items(step, n, len(examples))]
        parts, width = chat.shard_across_ranks(chat.pack(chosen, T if cfg.packing else 0), cfg.B, rt), 1
        if cfg.packing and compiled:  # a fixed shape for the compiler
            parts, width = [bins + [[]] * (cfg.B - len(bins)) for bins in parts], T
        n_tokens = sum(example.n_inputs for example in chosen)
        return training.Batch([chat.collate(bins, rt.device, width) for bins in parts], n, n_tokens)

    checksums = [data.checksum(example.ids for example in part) for part in (examples, val_examples)]
    run.identify(training_data=checksums[0], validation_data=checksums[1])
    run.warm_up(read(run.step), loss_fn)
    runtime.print0(f"{len(examples):,} rows to train on, {len(val_examples):,} held out; {max_steps:,} steps of {n}")
    ids, n_prompt = examples[0]
    prompt, target = (run.tokenizer.decode(part.tolist()) for part in (ids[:n_prompt], ids[n_prompt:]))
    runtime.print0(f"the first row, with the loss on [the text in brackets]: {prompt}[{target}]")
    lr_at = optim.schedule("cosine", max_steps, round(cfg.warmup_frac * max_steps), cfg.max_lr)
    batches = data.prefetch(read, run.step, max_steps)
    for step in run.steps(max_steps):
        best = run.due(cfg.eval_every) and evaluate(run, val_examples, val_rows[: cfg.n_eval_prompts])
        if best or run.due(cfg.save_every):
            run.save(best)
        if run.last:
            break
        run.update(next(batches), loss_fn, lr=lr_at(step))
    run.finish()


if __name__ == "__main__":
    config.run(main, CONFIGS)
