"""Direct preference optimization (arXiv:2305.18290): teach a fine-tuned model which of two answers is better.

    python dpo.py demo                                   # after `python sft.py demo`: half a minute
    python dpo.py                                        # out/sft on red_teaming_reward_modeling_pairwise
    torchrun --nproc_per_node=8 dpo.py --beta=0.2 --rpo_alpha=1
    python dpo.py --data=pairs.jsonl --loss=ipo --lora_rank=16 --max_lr=2e-5

Rows have prompt, response_a, response_b and preferred ("A" or "B"), or prompt, chosen and rejected, or conversations.
The policy starts as the reference model, whose log-probabilities are computed once and cached in out_dir.

Logged at every step and for held-out pairs: preference (loss without RPO's term), rewards/chosen, rewards/rejected
(beta times the log-ratio of policy to reference), rewards/margins, rewards/accuracies, logps/chosen, logps/rejected.
Chosen answers often become less likely too: watch logps/chosen; rpo_alpha counteracts it. tok/s counts both sequences.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import chat, checkpoint, config, data, files, finetune, optim, runtime, training
from neogpt.run import Run


@dataclass(frozen=True)
class Config(finetune.FinetuneConfig):
    data: str = "andersonbcdefg/red_teaming_reward_modeling_pairwise"  # dataset on the hub, or a file
    out_dir: str = "out/dpo"  # log.txt, checkpoints, best.pt (lowest held-out loss), reference log-probabilities
    eval_questions: str = ""  # rows as for sft.py: fraction of answers that begin with the response; "": none
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"  # DPO, robust DPO, SLiC or IPO
    beta: config.PositiveFloat = 0.1  # KL penalty strength (beta in Eq. 7)
    label_smoothing: Annotated[float, "[0, 0.5)"] = 0.0  # assumed fraction of wrong preferences (sigmoid or robust)
    rpo_alpha: config.NonNegativeFloat = 0.0  # weight of the chosen response's negative log-likelihood per token (RPO)
    pairs_per_step: config.PositiveInt = 32  # pairs per optimizer step over all devices
    max_lr: config.NonNegativeFloat = 2e-6  # peak learning rate; about ten times as much with LoRA
    warmup_frac: config.Fraction = 0.1  # fraction of the steps for linear warmup; then a cosine to 0


CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo-sft",
        data=str(config.ROOT / "demo" / "dpo.jsonl"),
        val_frac=0.1,
        eval_questions=str(config.ROOT / "demo" / "sft_held_out.jsonl"),
        out_dir="out/demo-dpo",
        pairs_per_step=16,
        rpo_alpha=1.0,
        max_lr=5e-5,
        eval_every=20,
        n_eval_prompts=160,
        prompts=("Where does Ada live?", "What does Leo like to eat?", "Whom does Rosa like best?"),
        answer_tokens=100,
    ),
}


class Pair(NamedTuple):
    """A prompt with its chosen and with its rejected response; pair[:2] is (chosen, rejected)."""

    chosen: chat.Example
    rejected: chat.Example
    reference: tuple[float, float] = (0.0, 0.0)  # log-probabilities of the responses by the reference model, nats


def parse_pair(fields: dict[str, Any]) -> tuple[chat.Row, str]:
    """The row of the chosen response, and the rejected response. Raises ValueError if the pair is unusable."""
    names = ["chosen", "rejected"]
    if "preferred" in fields:
        if fields["preferred"] not in ("A", "B"):
            raise ValueError("a preference other than A or B")
        names = ["response_a", "response_b"] if fields["preferred"] == "A" else ["response_b", "response_a"]
    chosen, rejected = (fields[name] for name in names)
    if isinstance(chosen, list) or "prompt" not in fields:  # conversations; a list of one turn has no prompt
        prompt = fields.get("prompt")
        before = prompt if isinstance(prompt, list) else [dict(role="user", content=prompt)]
        turns = [before + x if isinstance(x, list) and len(x) == 1 else x for x in (chosen, rejected)]
        row, other = map(chat.parse_turns, turns)
        if row._replace(response="") != other._replace(response=""):
            raise ValueError("different prompts")
        rejected = other.response
    else:
        row, rejected = chat.parse_row(fields | dict(response=chosen)), chat.to_text(rejected)
    if not row.response.strip() or not rejected.strip():
        raise ValueError("a blank response")
    if row.response == rejected:
        raise ValueError("equal responses")
    return row, rejected


def read_pairs(source: str) -> list[tuple[chat.Row, str]]:
    """The pairs of a file or a dataset. Unusable pairs are dropped and counted."""
    kinds = [("prompt", "response_a", "response_b", "preferred"), ("prompt", "chosen", "rejected")]
    pairs = chat.parse_rows(source, [*kinds, ("chosen", "rejected")], parse_pair)
    if all(row.instruction and x.startswith(row.instruction) for row, other in pairs for x in (row.response, other)):
        cut = [[text[len(row.instruction) :].lstrip() for text in (row.response, rejected)] for row, rejected in pairs]
        pairs = [(row._replace(response=a), b) for (row, _), (a, b) in zip(pairs, cut) if a and b and a != b]
        runtime.print0(f"{source}: all responses repeat the prompt: it is removed, and {len(pairs):,} pairs remain")
    return pairs


def tokenize_pairs(pairs: list[tuple[chat.Row, str]], T: int, tokenizer: tiktoken.Encoding, source: str) -> list[Pair]:
    """Pairs of texts -> examples of at most T input tokens. Pairs that do not fit are dropped."""
    out = []
    for row, rejected in pairs:
        ids = chat.encode_prompt(row, T, tokenizer)
        pair = Pair(*(chat.make_example(ids, text, T, tokenizer) for text in (row.response, rejected)))
        # a pair whose responses are equal after truncation has no gradient
        if all(pair[:2]) and not np.array_equal(pair.chosen.ids, pair.rejected.ids):
            out.append(pair)
    n_truncated = sum(any(e.ids[-1] != tokenizer.eot_token for e in pair[:2]) for pair in out)
    finetune.report_fit(source, T, len(pairs), len(out), n_truncated)
    return out


def collate_pairs(pairs: list[Pair], B: int, rt: runtime.Runtime) -> list[dict[str, Any]]:
    """This rank's micro-batches of B pairs, longest first: `chat.collate` of B chosen, then B rejected examples, with
    reference, (B, 2), and n, the number of pairs. Rows that `chat.shard_across_ranks` adds have no targets.
    """
    batches, ordered = [], sorted(pairs, key=lambda pair: -max(e.n_inputs for e in pair[:2]))
    for part in chat.shard_across_ranks([[pair] for pair in ordered], B, rt):
        examples = [[pair[side] for pair in row] for side in (0, 1) for row in part]
        batch = chat.collate(examples, rt.device)  # (2B, W), for a single forward pass
        batch["reference"] = torch.tensor([row[0].reference if row else (0.0, 0.0) for row in part], device=rt.device)
        batches.append(batch | dict(n=sum(map(len, part))))
    return batches


def response_logps(net: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Log-probabilities of the chosen and the rejected responses with end-of-text, summed over tokens, (2, B)."""
    nll = chat.loss(net, batch, "none").view(batch["y"].shape)  # (2B, W), 0 outside the response
    return -nll.sum(dim=1).view(2, -1)


def preference_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor, cfg: Config) -> Tensor:
    """The loss of each pair, (B,). *_logratios: log π - log π_ref, (B,). lengths: tokens of the responses, (2, B)."""
    logits, beta, eps = chosen_logratios - rejected_logratios, cfg.beta, cfg.label_smoothing
    if cfg.loss == "sigmoid":  # Eq. 7, arXiv:2305.18290; with smoothing: Eq. 3 of the note on conservative DPO
        return -(1 - eps) * F.logsigmoid(beta * logits) - eps * F.logsigmoid(-beta * logits)
    if cfg.loss == "robust":  # Eq. 8, arXiv:2403.00409: unbiased if the fraction eps of the preferences is wrong
        return (-(1 - eps) * F.logsigmoid(beta * logits) + eps * F.logsigmoid(-beta * logits)) / (1 - 2 * eps)
    if cfg.loss == "hinge":  # arXiv:2309.06657
        return F.relu(1 - beta * logits)
    # Eq. 17, arXiv:2310.12036; log-ratios per token, as its authors compute it
    return (chosen_logratios / lengths[0] - rejected_logratios / lengths[1] - 1 / (2 * beta)) ** 2


def dpo_loss(net: nn.Module, batch: dict[str, Any], cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the detached metrics of a micro-batch of `collate_pairs`, summed over its pairs."""
    chosen, rejected = response_logps(net, batch)
    chosen_logratios, rejected_logratios = chosen - batch["reference"][:, 0], rejected - batch["reference"][:, 1]
    lengths = (batch["y"] >= 0).sum(dim=1).view(2, -1)
    is_pair, lengths = lengths[0] > 0, lengths.clamp(min=1)  # rows without targets do not count
    preference = preference_loss(chosen_logratios, rejected_logratios, lengths, cfg)
    loss = preference - cfg.rpo_alpha * chosen / lengths[0]  # arXiv:2404.19733
    metrics = {
        "preference": preference,
        "rewards/chosen": cfg.beta * chosen_logratios,
        "rewards/rejected": cfg.beta * rejected_logratios,
        "rewards/margins": cfg.beta * (chosen_logratios - rejected_logratios),
        "rewards/accuracies": (chosen_logratios > rejected_logratios).float(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    sums = (torch.stack(list(metrics.values())) * is_pair).sum(dim=1).detach()
    return (loss * is_pair).sum(), dict(zip(metrics, sums))


@torch.no_grad()
def reference_logps(raw: nn.Module, pairs: list[Pair], B: int, rt: runtime.Runtime) -> np.ndarray:
    """Log-probabilities of the chosen and rejected responses, (n, 2) fp32. Each pair is computed by one rank."""
    out = torch.zeros(len(pairs), 2, device=rt.device)
    order = sorted(range(len(pairs)), key=lambda i: -max(e.n_inputs for e in pairs[i][:2]))
    alone = rt._replace(rank=0, world_size=1)
    for start in range(rt.rank * B, len(order), B * rt.world_size):
        rows = order[start : start + B]
        (batch,) = collate_pairs([pairs[i] for i in rows], B, alone)  # keeps the order, which is longest first
        with rt.autocast():
            out[rows] = response_logps(raw, batch).T.float()
    return runtime.all_reduce_sum(out, rt).cpu().numpy()


def add_reference(run: Run, pairs: list[Pair]) -> list[Pair]:
    """The pairs with reference log-probabilities: from the cache in out_dir, or computed once and written there."""
    rt = run.rt
    examples = [example for pair in pairs for example in pair[:2]]
    checksum = data.checksum(array for e in examples for array in (np.array([len(e.ids), e.n_prompt]), e.ids))
    path, logps = run.out_dir / f"reference_{run.base}_{rt.precision}_{checksum}.npz", np.empty(0)
    with suppress(Exception):  # a missing or damaged file: zipfile and numpy raise many kinds
        logps = np.load(path)["log_probs"]
    is_usable = logps.shape == (len(pairs), 2) and np.isfinite(logps).all()
    if runtime.all_reduce_sum(torch.tensor(float(not is_usable), device=rt.device), rt):  # on any rank
        runtime.print0(f"computing the reference log-probabilities of {len(pairs):,} pairs")
        start = checkpoint.load_model(run.cfg.checkpoint).raw.to(rt.device) if run.resumed else run.full_model()
        logps = reference_logps(start, pairs, run.cfg.B, rt)
        if rt.rank == 0:
            with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, log_probs=logps)
    return [pair._replace(reference=tuple(row)) for pair, row in zip(pairs, logps.tolist())]


@torch.no_grad()
def evaluate(run: Run, pairs: list[Pair], held_out: list[chat.Row], questions: list[chat.Row]) -> bool:
    """Evaluate on held-out pairs and on greedy answers; return whether the loss is the lowest so far."""
    cfg, rt, raw, sums = run.cfg, run.rt, run.full_model(), []
    for batch in collate_pairs(pairs, cfg.B, rt):
        with rt.autocast():
            loss, metrics = dpo_loss(raw, batch, cfg)
        sums.append(torch.stack([loss, *metrics.values()]))
    means = runtime.all_reduce_sum(torch.stack(sums).sum(dim=0), rt) / len(pairs)
    scores = dict(zip(("val", *(f"val/{name}" for name in metrics)), means.tolist()))
    if run.step == 0:  # the policy is the reference model, so log-ratios are 0 but for rounding to fp32, TF32 or bf16
        n_targets = sum(len(e.ids) - e.n_prompt for pair in pairs for e in pair[:2]) / len(pairs)
        logratio = (abs(scores["val/rewards/chosen"]) + abs(scores["val/rewards/rejected"])) / cfg.beta / n_targets
        tolerance = 1e-2 if rt.precision == "bf16" or rt.device.type == "cuda" else 1e-4
        assert logratio <= tolerance, f"the policy does not start as the reference: log-ratio {logratio} per token"
    if held_out:
        scores["exact"] = finetune.score_answers(run, held_out)["exact"]  # equal to the chosen responses
    if questions:
        scores["begins"] = finetune.score_answers(run, questions)["begins"]
    return finetune.report(run, scores)


def main(cfg: Config) -> None:
    """Optimize preferences; evaluate, answer and save in between."""
    if cfg.label_smoothing and cfg.loss not in ("sigmoid", "robust"):
        raise ValueError(f"--label_smoothing={cfg.label_smoothing} with --loss={cfg.loss}: use sigmoid or robust")
    rt = runtime.setup(cfg.device, cfg.precision, cfg.deterministic)
    run, rt, T = finetune.open_run(cfg, "dpo", ("sft",), rt)
    texts, val_texts = finetune.read_rows(cfg, read_pairs, lambda pair: chat.whole_prompt(pair[0]))
    questions = chat.read_rows(cfg.eval_questions) if cfg.eval_questions else []
    train = tokenize_pairs(texts, T, run.tokenizer, cfg.data)
    val = tokenize_pairs(val_texts, T, run.tokenizer, cfg.val_data or "the held-out part")
    pairs = add_reference(run, train + val)
    train, val = pairs[: len(train)], pairs[len(train) :]
    held_out = [row for row, _ in val_texts[: cfg.n_eval_prompts]]
    n = cfg.pairs_per_step
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(train) / n))
    runtime.print0(f"{len(train):,} pairs to train on, {len(val):,} held out; {max_steps:,} steps of {n}")

    def read(step: int) -> training.Batch:
        batch = [train[i] for i in run.items(step, n, len(train))]
        n_tokens = sum(example.n_inputs for pair in batch for example in pair[:2])
        return training.Batch(collate_pairs(batch, cfg.B, rt), n, n_tokens)

    loss_fn = partial(dpo_loss, cfg=cfg)
    checksums = [data.checksum(e.ids for pair in part for e in pair[:2]) for part in (train, val)]
    run.identify(training_data=checksums[0], validation_data=checksums[1])
    run.warm_up(read(run.step), loss_fn)
    lr_at = optim.schedule("cosine", max_steps, round(cfg.warmup_frac * max_steps), cfg.max_lr)
    batches = data.prefetch(read, run.step, max_steps)
    for step in run.steps(max_steps):
        best = run.due(cfg.eval_every) and evaluate(run, val, held_out, questions)
        if best or run.due(cfg.save_every):
            run.save(best)
        if run.last:
            break
        run.update(next(batches), loss_fn, lr=lr_at(step))
    run.finish()


if __name__ == "__main__":
    config.run(main, CONFIGS)
