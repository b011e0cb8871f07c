"""Reinforcement learning with verifiable rewards (GRPO, arXiv:2402.03300): a model of sft.py learns from its own answers.

    python grpo.py demo                                  # after `python sft.py demo`: two minutes
    python grpo.py --reward="ends(100) + repetition"     # out/sft on databricks-dolly-15k: answers that come to an end
    python grpo.py --data=openai/gsm8k:main --reward="gsm8k + 0.1*ends"
    torchrun --nproc_per_node=8 grpo.py --data=rows.jsonl --reward="exact - 0.5*my_rewards.py:score"
    python sample.py --checkpoint=out/grpo --chat        # talk to the result

Rows are those of sft.py. In every step the model answers some prompts several times. Rewards (see neogpt/rewards.py)
score each answer, and its advantage is its reward minus the mean reward of the answers to the same prompt. A group
whose rewards are all equal has no signal. The loss is on the answer and its end-of-text, summed over the tokens of the
step and divided by their number. A reward can only teach what the model sometimes does: start at a success between 10
and 60 %. The first term of the reward decides whether an answer passes: if it is at least 1.

Logged at every step: reward and its terms, length (tokens per answer), no_signal (fraction of groups), cut_off (fraction
of answers without end-of-text), entropy (nats per token), gap (largest difference between log-probabilities computed
as in a rollout and as in training), tokens per second. The loss is 0 up to the lengths of answers: watch the reward.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import chat, checkpoint, config, data, finetune, generate, model, optim, rewards, runtime, training
from neogpt.run import Run

ROLLOUT_ROWS = 256  # answers that are generated together
GAP_TOKENS = 16  # tokens per answer for which the gap is computed
MAX_CONSTANT = 20  # a run ends after this many steps in a row without signal
HELD_OUT = 2**40  # number of the first held-out prompt; prompts of training are numbered from 0


@dataclass(frozen=True)
class Config(finetune.FinetuneConfig):
    checkpoint: str = "out/sft"  # the model to start from: an out_dir, a file, a Hugging Face folder or hub name
    data: str = "databricks/databricks-dolly-15k"  # rows: a file, folder or pattern, or a dataset on the hub
    out_dir: str = "out/grpo"  # log.txt, checkpoints, best.pt (highest held-out reward)
    val_data: str = ""  # held-out rows, as in data; "": the fraction val_frac of data
    eval_questions: str = ""  # rows of another ability: exact match of greedy answers; "": not evaluated
    reward: str = "ends(100) + repetition"  # a sum of rewards: see neogpt/rewards.py
    prompts_per_step: int = 16  # prompts per optimizer step over all devices
    samples_per_prompt: int = 16  # answers to each prompt: one group
    updates_per_rollout: int = 1  # optimizer steps on the same answers; more than 1 needs clip
    clip: float = 0.0  # largest distance of the probability ratio from 1 that is rewarded (PPO: 0.2); 0: no limit
    kl_beta: float = 0.0  # penalty on the KL divergence from the model to start from, if it must stay close; 0: none
    scale_by_std: bool = False  # divide advantages by the group's standard deviation: hard and easy prompts count more
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # mean over tokens; mean of answers' means; over answer_tokens
    epochs: float = 1.0  # passes over the prompts
    max_lr: float = 2.5e-6  # peak learning rate, a twentieth of that of sft.py; about ten times as much with LoRA
    warmup_frac: float = 0.0  # fraction of the steps for linear warmup; then linear to 0
    eval_every: int = 20  # steps between evaluations on the held-out prompts
    n_eval_prompts: int = 64  # held-out prompts, and rows of eval_questions
    n_eval_samples: int = 8  # answers to each held-out prompt, for pass@1 and pass@n


CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo-sft",
        data=str(config.ROOT / "demo" / "grpo.jsonl"),
        val_data=str(config.ROOT / "demo" / "grpo_held_out.jsonl"),
        eval_questions=str(config.ROOT / "demo" / "sft_held_out.jsonl"),
        out_dir="out/demo-grpo",
        reward="exact",
        B=32,
        epochs=2.0,
        max_lr=1e-4,
        n_eval_prompts=160,
        prompts=("Where does Ada live?", "What does Leo like to eat?", "Whom does Rosa like best?"),
        answer_tokens=80,
    ),
}


class Prompt(NamedTuple):
    """A row and the ids of its prompt."""

    row: chat.Row
    ids: list[int]


class Rollout(NamedTuple):
    """This rank's answers of one step."""

    examples: list[chat.Example]  # prompt and answer
    advantages: list[float]
    stats: dict[str, float]  # means over all ranks, to log
    n_targets: float  # tokens of all answers of all ranks
    n_inputs: float  # tokens that the model processes in training, of all ranks


def answer_tokens(cfg: Config, T: int) -> int:
    """The longest answer, so that prompt and answer fit into T tokens: as in finetune.score_answers."""
    return min(cfg.answer_tokens, T // 2)


def encode_prompts(rows: Sequence[chat.Row], budget: int, tokenizer: tiktoken.Encoding, source: str) -> list[Prompt]:
    """Rows -> prompts of at most `budget` tokens. Longer ones are dropped and counted."""
    prompts = [Prompt(row, chat.encode_prompt(row, budget, tokenizer)) for row in rows]
    usable = [prompt for prompt in prompts if len(prompt.ids) <= budget]
    if len(usable) < len(prompts):
        runtime.print0(f"{source}: {len(prompts) - len(usable):,} prompts of more than {budget} tokens dropped")
    if not usable:
        raise ValueError(f"no prompt of {source} fits into {budget} tokens")
    return usable


def answer(
    run: Run, prompts: list[Prompt], numbers: np.ndarray, n: int, terms: dict, tokenizer: tiktoken.Encoding
) -> tuple[list[rewards.Answer], np.ndarray]:
    """n sampled answers to each prompt, and the values of their rewards, (len(prompts), n, terms) fp64. numbers: one per
    prompt; an answer depends on the weights, the prompt, the seed of the run, its number and its place in the group.
    Raises ValueError on all ranks if a reward fails.
    """
    eot, problem = tokenizer.eot_token, ""
    samples = (numbers.astype(np.uint64)[:, None] << 16) + np.arange(n, dtype=np.uint64)  # (prompts, n)
    seeds = data.mix(np.uint64(run.cfg.seed) ^ data.mix(samples.flatten())) >> 32  # PyTorch uses 32 bits
    repeated, answers = [prompt for prompt in prompts for _ in range(n)], []
    limit = answer_tokens(run.cfg, run.cfg.T or run.raw.config.block_size)
    for start in range(0, len(repeated), ROLLOUT_ROWS):
        part = repeated[start : start + ROLLOUT_ROWS]
        options = dict(temperature=1.0, seeds=seeds[start : start + ROLLOUT_ROWS].tolist())
        with run.rt.autocast():
            outputs = generate.complete(run.raw, [prompt.ids for prompt in part], limit, eot, **options)
        for (row, _), (ids, ended) in zip(part, outputs):
            texts = chat.whole_prompt(row), row.response, tokenizer.decode(ids)
            answers.append(rewards.Answer(*texts, ids + [eot] * ended, ended))
    values = np.zeros((len(answers), len(terms)))
    try:
        values[:] = [rewards.score(terms, each) for each in answers] if answers else values
    except ValueError as error:
        problem = str(error)
    problems = [problem] * run.rt.world_size
    if run.rt.world_size > 1:
        torch.distributed.all_gather_object(problems, problem)
    if any(problems):
        raise ValueError(next(filter(None, problems)))
    return answers, values.reshape(len(prompts), n, len(terms))


def advantages_of(totals: np.ndarray, scale_by_std: bool) -> np.ndarray:
    """The advantages of rewards (groups, n): zeros for a group of equal rewards. 1e-4 as in TRL."""
    deviations = totals - totals.mean(axis=1, keepdims=True)
    if scale_by_std:
        deviations /= totals.std(axis=1, ddof=1, keepdims=True) + 1e-4
    return np.where(np.ptp(totals, axis=1, keepdims=True) > 0, deviations, 0.0)  # exactly 0, for AdamW


def rollout(run: Run, prompts: list[Prompt], terms: dict, tokenizer: tiktoken.Encoding) -> Rollout:
    """Answer the prompts of this step and score the answers. Each rank does its share of the groups."""
    cfg, rt, n = run.cfg, run.rt, run.cfg.samples_per_prompt
    chosen = run.items(run.step, cfg.prompts_per_step, len(prompts))
    mine = np.arange(cfg.prompts_per_step)[rt.rank :: rt.world_size]
    asked = [prompts[i] for i in chosen[mine]]
    answers, values = answer(run, asked, run.n_sequences + mine, n, terms, tokenizer)
    totals = values @ np.array([weight for weight, _ in terms.values()])  # (groups, n)
    advantages = advantages_of(totals, cfg.scale_by_std)
    examples = [
        chat.Example(np.array(prompt.ids + each.ids), len(prompt.ids))
        for prompt, each in zip([prompt for prompt in asked for _ in range(n)], answers)
    ]
    counts = [len(answers), len(asked), sum(len(each.ids) for each in answers), sum(e.n_inputs for e in examples)]
    counts += [sum(not each.ended for each in answers), int((np.ptp(totals, axis=1) == 0).sum()), totals.sum()]
    counts = torch.tensor([*counts, *values.sum(axis=(0, 1))], dtype=torch.float64)
    n_answers, n_groups, n_targets, n_inputs, n_cut, n_constant, total, *parts = runtime.all_reduce_sum(
        counts, rt
    ).tolist()
    stats = dict(reward=total / n_answers) | {f"reward/{term}": x / n_answers for term, x in zip(terms, parts)}
    stats |= dict(length=n_targets / n_answers, no_signal=n_constant / n_groups, cut_off=n_cut / n_answers)
    if rt.rank == 0:
        stats["gap"] = rollout_gap(run, examples[:n])
        first = answers[0]
        text = ", ".join(f"{name} {value:.3f}" for name, value in stats.items())
        runtime.print0(
            f"step {run.step}: {text} > {first.prompt}{first.text}{'' if first.ended else ' …'} [{totals[0, 0]:g}]"
        )
    return Rollout(examples, advantages.flatten().tolist(), stats, n_targets, n_inputs)


def log_probs(net: nn.Module, batch: dict[str, Any], n_ids: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the targets, 0 where there is none, and the entropies of the predictions (without
    gradients), both (B, W) in nats. n_ids: the tokenizer's ids, without the padding of the vocabulary.
    """
    logits = net(batch["x"])[..., :n_ids].float()
    logps = -model.cross_entropy(logits, batch["y"], "none").view(batch["y"].shape)
    with torch.no_grad():
        every = F.log_softmax(logits, dim=-1)
        return logps, -(every.exp() * every).sum(dim=-1)


@torch.no_grad()
def rollout_gap(run: Run, examples: list[chat.Example]) -> float:
    """The largest difference between log-probabilities of the first tokens of some answers to one prompt, computed with
    the KV cache and without it.
    """
    raw, batch, start = run.raw, chat.collate([[e] for e in examples], run.rt.device), examples[0].n_prompt - 1
    n_ids, width = raw.config.n_tokens, min(GAP_TOKENS, batch["x"].size(1) - start)
    y = batch["y"][:, start : start + width]
    with run.rt.autocast():
        logps, _ = log_probs(raw, batch, n_ids)
        cache = generate.KVCache(raw.config.n_layer, raw.config.block_size)
        logits, gaps = generate.prefill(raw, batch["x"][:, : start + 1].tolist(), cache), []
        for t, targets in enumerate(y.T):
            cached = -F.cross_entropy(logits[:, :n_ids].float(), targets, ignore_index=-100, reduction="none")
            gaps.append((cached - logps[:, start + t]).abs().max())
            if t + 1 < width:
                logits = generate.decode_one_token(raw, batch["x"][:, start + t + 1], cache)
                cache.advance(cache.longest + 1)
    return torch.stack(gaps).max().item()


def micro_batches(rolled: Rollout, cfg: Config, T: int, rt: runtime.Runtime) -> list[dict[str, Any]]:
    """`chat.collate` of B answers, longest first, which also have advantage and weight, (B, 1). The loss is the mean
    over tokens, in which weight 1 is that of dapo.
    """
    n_answers, batches = cfg.prompts_per_step * cfg.samples_per_prompt, []
    order = sorted(range(len(rolled.examples)), key=lambda i: -len(rolled.examples[i].ids))
    for start in range(0, max(1, len(order)), cfg.B):  # a rank without answers has an empty row
        part = order[start : start + cfg.B]
        batch = chat.collate([[rolled.examples[i]] for i in part] or [[]], rt.device)
        lengths = (batch["y"] >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        divisors = dict(dapo=rolled.n_targets / n_answers, grpo=lengths, dr_grpo=answer_tokens(cfg, T))
        batch["weight"] = rolled.n_targets / n_answers / (divisors[cfg.loss] * torch.ones_like(lengths))
        batch["advantage"] = torch.tensor([[rolled.advantages[i]] for i in part] or [[0.0]], device=rt.device)
        batches.append(batch)
    return batches


@torch.no_grad()
def add_log_probs(run: Run, batches: list[dict[str, Any]], reference: nn.Module | None) -> list[dict[str, Any]]:
    """Add the log-probabilities of the model before the updates, if there are several, and those of the reference."""
    nets = dict(old=run.raw if run.cfg.updates_per_rollout > 1 else None, reference=reference)
    for name, net in nets.items():
        for batch in batches if net else ():
            with run.rt.autocast():
                batch[name], _ = log_probs(net, batch, run.raw.config.n_tokens)
    return batches


def grpo_loss(net: nn.Module, batch: dict[str, Any], cfg: Config, n_ids: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the detached metrics of a micro-batch, summed over its targets. Without old log-probabilities, the
    ratio is 1, and the gradient that of -advantage · log-probability.
    """
    logps, entropy = log_probs(net, batch, n_ids)
    mask = batch["y"] >= 0
    ratio = (logps - batch.get("old", logps.detach())).exp()
    gain = ratio * batch["advantage"]
    if cfg.clip:
        gain = torch.minimum(gain, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * batch["advantage"])
    loss, metrics = -gain, dict(entropy=entropy)
    if cfg.clip:
        metrics["clipped"] = (gain < ratio * batch["advantage"]).float()
    if cfg.kl_beta:
        logratio = batch["reference"] - logps
        metrics["kl"] = logratio.exp() - logratio - 1  # k3 of http://joschu.net/blog/kl-approx.html: never below 0
        loss = loss + cfg.kl_beta * metrics["kl"]
    return (loss * batch["weight"] * mask).sum(), {name: (x.detach() * mask).sum() for name, x in metrics.items()}


def evaluate(
    run: Run, prompts: list[Prompt], questions: list[chat.Row], terms: dict, tokenizer: tiktoken.Encoding
) -> bool:
    """Evaluate on held-out prompts, log and print the results; return whether the reward is the highest so far."""
    cfg, rt, k = run.cfg, run.rt, run.cfg.n_eval_samples
    mine = np.arange(len(prompts))[rt.rank :: rt.world_size]
    answers, values = answer(run, [prompts[i] for i in mine], HELD_OUT + mine, k, terms, tokenizer)
    passed = values[:, :, 0] >= 1  # (prompts, k)
    total = (values @ np.array([weight for weight, _ in terms.values()])).mean(axis=1).sum()
    sums = [total, passed.mean(axis=1).sum(), passed.any(axis=1).sum(), sum(each.ended for each in answers) / k]
    sums = runtime.all_reduce_sum(torch.tensor(sums, dtype=torch.float64), rt) / len(prompts)
    scores = dict(zip(("val/reward", "pass@1", f"pass@{k}", "ended"), sums.tolist()))
    text = "reward {:.3f}, pass@1 {:.1%}, pass@{k} {:.1%}, {:.1%} ended".format(*scores.values(), k=k)
    if questions:
        scores["exact"] = finetune.score_answers(run, questions, tokenizer)["exact"]
        text += f"; {len(questions)} other questions: {scores['exact']:.1%} exact match"
    return finetune.report(run, dict(val=-scores["val/reward"]) | scores, text, tokenizer)


def check_signal(run: Run, stats: dict[str, float], n_constant: int) -> int:
    """The number of steps in a row without signal. Raises ValueError after MAX_CONSTANT, when the run is saved."""
    if stats["no_signal"] < 1:
        return 0
    if n_constant + 1 == MAX_CONSTANT:
        run.save()
        run.wait_for_writer()
        problem = f"all rewards of a group were equal in {MAX_CONSTANT} steps in a row (mean {stats['reward']:g})"
        raise ValueError(f"{problem}: the model always succeeds or always fails; use another --reward or --data")
    if not n_constant:
        runtime.print0(f"step {run.step}: all rewards of a group are equal, so the gradient of the rewards is 0")
    return n_constant + 1


def identify(run: Run, prompts: list[Prompt], val_prompts: list[Prompt], terms: dict) -> None:
    """`run.identify` with checksums of prompts, references and the files of rewards."""
    parts = [
        [np.array(p.ids) for p in part] + [np.frombuffer(p.row.response.encode(), np.uint8) for p in part]
        for part in (prompts, val_prompts)
    ]
    paths = [Path(term.partition(".py:")[0] + ".py").expanduser() for term in terms if ".py:" in term]
    code = data.checksum(np.frombuffer(path.read_bytes(), np.uint8) for path in paths)
    run.identify(training_data=data.checksum(parts[0]), validation_data=data.checksum(parts[1]), rewards=code)


def main(cfg: Config) -> None:
    """Answer, score, update; evaluate and save in between."""
    finetune.check(cfg)
    config.require("[1, inf)", prompts_per_step=cfg.prompts_per_step, updates_per_rollout=cfg.updates_per_rollout)
    config.require("[1, inf)", n_eval_prompts=cfg.n_eval_prompts, n_eval_samples=cfg.n_eval_samples)
    config.require("[1, inf)", answer_tokens=cfg.answer_tokens)
    config.require("[2, 65536]", samples_per_prompt=cfg.samples_per_prompt)
    config.require("[0, inf)", kl_beta=cfg.kl_beta)
    config.require("[0, 1)" if cfg.updates_per_rollout == 1 else "(0, 1)", clip=cfg.clip)
    terms = rewards.parse(cfg.reward)
    rt = runtime.setup(cfg.device, cfg.precision, cfg.deterministic)
    run, tokenizer, T = finetune.open_run(cfg, "grpo", ("sft", "dpo"), rt)
    rows = chat.read_rows(cfg.data, rt)
    if cfg.val_data:
        val_rows = chat.read_rows(cfg.val_data, rt)
    else:
        rows, val_rows = chat.split_rows(rows, [*map(chat.whole_prompt, rows)], cfg.val_frac, cfg.seed)
    budget = T - answer_tokens(cfg, T)
    prompts = encode_prompts(rows, budget, tokenizer, cfg.data)
    val_prompts = encode_prompts(val_rows, budget, tokenizer, cfg.val_data or "the held-out part")[: cfg.n_eval_prompts]
    questions = chat.read_rows(cfg.eval_questions, rt)[: cfg.n_eval_prompts] if cfg.eval_questions else []
    n = cfg.prompts_per_step
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(prompts) / n))
    runtime.print0(f"{len(prompts):,} prompts to train on, {len(val_prompts):,} held out; {max_steps:,} steps of {n}")
    reference = checkpoint.load_model(cfg.checkpoint).raw.to(rt.device) if cfg.kl_beta else None
    loss_fn = partial(grpo_loss, cfg=cfg, n_ids=run.raw.config.n_tokens)
    identify(run, prompts, val_prompts, terms)
    empty = Rollout([], [], {}, 1.0, 0.0)
    run.warm_up(training.Batch(add_log_probs(run, micro_batches(empty, cfg, T, rt), reference), 0, 0), loss_fn)
    lr_at = optim.schedule("wsd", max_steps, round(cfg.warmup_frac * max_steps), cfg.max_lr, decay_frac=1.0)
    n_constant = 0
    for step in run.steps(max_steps):
        best = run.due(cfg.eval_every) and evaluate(run, val_prompts, questions, terms, tokenizer)
        if best or run.due(cfg.save_every):
            run.save(best)
        if run.last:
            break
        started = time.perf_counter()
        rolled = rollout(run, prompts, terms, tokenizer)
        n_constant = check_signal(run, rolled.stats, n_constant)
        answered = time.perf_counter()
        batches = add_log_probs(run, micro_batches(rolled, cfg, T, rt), reference)
        for i in range(cfg.updates_per_rollout):
            batch = training.Batch(batches, n if i == 0 else 0, int(rolled.n_inputs))
            run.update(batch, loss_fn, lr=lr_at(step))
        run.read_results(0)
        seconds = answered - started, time.perf_counter() - answered
        speed = {"tok/s/rollout": rolled.n_targets / seconds[0]}
        speed["tok/s/training"] = cfg.updates_per_rollout * rolled.n_inputs / seconds[1]
        run.log.scalars(step, **rolled.stats, **speed)
    run.finish()


if __name__ == "__main__":
    config.run(main, CONFIGS)
