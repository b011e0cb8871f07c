"""Reinforcement learning with verifiable rewards (GRPO, arXiv:2402.03300): a model learns from its own answers.

    python grpo.py demo                                  # after `python sft.py demo`: two to three minutes
    python grpo.py --reward="ends(100) + repetition"     # out/sft on databricks-dolly-15k: answers that come to an end
    torchrun --nproc_per_node=8 grpo.py --data=openai/gsm8k:main --reward="gsm8k + 0.1*my_rewards.py:score"

Rows are those of sft.py. In every step the model answers some prompts several times. Rewards (neogpt/rewards.py) score
each answer, and its advantage is its reward minus the mean of its group, the answers to the same prompt. A reward only
teaches what the model sometimes does: start with pass@1 between 10 and 60 %. An answer passes if the first term of
the reward is at least 1. The loss stays near 0: watch the rewards, no_signal (fraction of groups whose rewards are all
equal), cut_off (fraction of answers without end-of-text), entropy (nats per trained token) and gap (largest difference
between log-probabilities with and without the KV cache).
"""

import time
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import chat, checkpoint, config, data, finetune, generate, model, optim, rewards, runtime, training
from neogpt.run import Run

GAP_TOKENS = 16  # tokens per answer for which the gap is computed
MAX_NO_SIGNAL = 20  # a run ends after this many steps in a row without signal
FIRST_HELD_OUT = 2**40  # number of the first held-out prompt; training prompts are numbered from 0


@dataclass(frozen=True)
class Config(finetune.FinetuneConfig):
    out_dir: str = "out/grpo"  # log.txt, checkpoints, best.pt (highest held-out reward)
    eval_questions: str = ""  # rows as for sft.py: exact match of greedy answers; "": none
    reward: str = "ends(100) + repetition"  # a sum of rewards: see neogpt/rewards.py
    prompts_per_step: config.PositiveInt = 16  # prompts per optimizer step over all devices
    samples_per_prompt: Annotated[int, "[2, 65536]"] = 16  # answers to each prompt: one group
    updates_per_rollout: config.PositiveInt = 1  # optimizer steps on the same answers; more than 1 needs clip
    clip: Annotated[float, "[0, 1)"] = 0.0  # clip range of the probability ratio (epsilon in PPO, there 0.2); 0: none
    kl_beta: config.NonNegativeFloat = 0.0  # penalty on the KL divergence from the model to start from; 0: none
    scale_by_std: bool = False  # divide advantages by the group's standard deviation: hard and easy prompts count more
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # mean of tokens; of answers' means; of sums / answer_tokens
    max_lr: config.NonNegativeFloat = 2.5e-6  # peak learning rate, 1/20 of sft.py's; about ten times as much with LoRA
    warmup_frac: config.Fraction = 0.0  # fraction of the steps for linear warmup; then linear to 0
    eval_every: config.PositiveInt = 20  # steps between evaluations on the held-out prompts
    n_eval_prompts: config.PositiveInt = 64  # number of held-out prompts
    n_eval_samples: config.PositiveInt = 8  # answers to each held-out prompt, for pass@1 and pass@n


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
        max_steps=80,
        max_lr=3e-5,
        n_eval_prompts=96,
        prompts=("Where does Ada live?", "What does Leo like to eat?", "Whom does Rosa like best?"),
        answer_tokens=80,
    ),
}


def sample_answers(
    run: Run, prompts: list[finetune.Prompt], first: int, n: int, terms: rewards.Terms
) -> tuple[list[rewards.Answer], np.ndarray, np.ndarray]:
    """n sampled answers to each prompt, the values of the terms of their rewards, (answers, terms), and the rewards,
    (prompts, n), fp64. first: number of the first prompt. An answer depends on weights, prompt, seed, number of the
    prompt and index in the group, and on other prompts only through rounding. Raises ValueError if a reward fails.
    """
    numbers = first + np.arange(len(prompts))[:, None]
    indices = ((numbers << 16) + np.arange(n)).flatten().astype(np.uint64)  # of all samples of the run
    seeds = (data.mix(np.uint64(run.cfg.seed) ^ data.mix(indices)) >> 32).tolist()  # PyTorch uses 32 bits
    answers = finetune.answer(run, [prompt for prompt in prompts for _ in range(n)], seeds)
    try:
        result = [[rewards.score(terms, each) for each in answers] if run.rt.rank == 0 else None]
    except ValueError as error:
        result = [error]
    if run.rt.world_size > 1:  # of one rank, because a user's function need not return the same twice
        torch.distributed.broadcast_object_list(result)
    if isinstance(result[0], ValueError):
        raise result[0]
    values = np.array(result[0])
    return answers, values, (values @ [term.weight for term in terms.values()]).reshape(-1, n)


def rollout(run: Run, prompts: list[finetune.Prompt], terms: rewards.Terms) -> tuple[training.Batch, dict[str, float]]:
    """The data of this step, answered and scored, and its statistics to log."""
    cfg, n = run.cfg, run.cfg.samples_per_prompt
    asked = [prompts[i] for i in run.items(run.step, cfg.prompts_per_step, len(prompts))]
    answers, values, totals = sample_answers(run, asked, run.n_sequences, n, terms)
    repeated = [ids for _, ids in asked for _ in range(n)]
    examples = [chat.Example(np.array(ids + each.ids), len(ids)) for ids, each in zip(repeated, answers)]
    stats = dict(no_signal=np.mean(np.ptp(totals, axis=1) == 0), length=np.mean([len(each.ids) for each in answers]))
    stats |= dict(cut_off=np.mean([not each.ended for each in answers]), reward=totals.mean())
    stats |= {f"reward/{term}": value for term, value in zip(terms, values.mean(axis=0))}
    stats["gap"] = rollout_gap(run, examples[:n])
    text = ", ".join(f"{name} {value:.3g}" for name, value in stats.items())
    sample = f"{answers[0].prompt}-> {answers[0].text}{'' if answers[0].ended else ' …'}".replace("\n", " ")
    runtime.print0(f"step {run.step}: {text}\n  > {sample} [{totals[0, 0]:g}]")
    return make_batch(run, examples, totals), stats


def make_batch(run: Run, examples: list[chat.Example], totals: np.ndarray) -> training.Batch:
    """This rank's micro-batches of B examples, longest first: `chat.collate` with advantages, (B, 1), and weights: the
    weighted sum over target tokens, divided by their number in the step, is the loss of cfg.loss. Examples without
    gradient are left out, unless no example has one. totals: the rewards, (groups, n).
    """
    cfg, rt, advantages = run.cfg, run.rt, totals - totals.mean(axis=1, keepdims=True)
    if cfg.scale_by_std:
        advantages /= totals.std(axis=1, ddof=1, keepdims=True) + 1e-4  # 1e-4 as in TRL
    advantages[np.ptp(totals, axis=1) == 0] = 0  # the mean of equal rewards can be rounded
    rows = [*zip(examples, advantages.flatten().tolist())]
    trained = [(e, advantage) for e, advantage in rows if advantage or cfg.kl_beta] or rows
    trained.sort(key=lambda row: -len(row[0].ids))
    n_targets, n_trained = (sum(len(e.ids) - e.n_prompt for e, _ in part) for part in (rows, trained))
    per_answer, batches = n_trained / (cfg.prompts_per_step * cfg.samples_per_prompt), []
    for part in chat.shard_across_ranks([[row] for row in trained], cfg.B, rt):
        batch = chat.collate([[e for e, _ in row] for row in part], rt.device)
        lengths = (batch["y"] >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        weights = dict(dapo=n_trained / n_targets, grpo=per_answer / lengths, dr_grpo=per_answer / cfg.answer_tokens)
        batch["weight"] = weights[cfg.loss]
        batch["advantage"] = torch.tensor([[row[0][1] if row else 0.0] for row in part], device=rt.device)
        batches.append(batch)
    return training.Batch(batches, cfg.prompts_per_step, sum(e.n_inputs for e, _ in trained))


def log_probs(net: nn.Module, batch: dict[str, Any], n_ids: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, 0 where there is none, and detached entropies over n_ids ids, (B, W), nats."""
    logits = net(batch["x"])[..., :n_ids].float()
    logps = -model.cross_entropy(logits, batch["y"], "none").view(batch["y"].shape)
    with torch.no_grad():
        all_logps = F.log_softmax(logits, dim=-1)
        return logps, -(all_logps.exp() * all_logps).sum(dim=-1)


@torch.no_grad()
def rollout_gap(run: Run, examples: list[chat.Example]) -> float:
    """The largest difference between the log-probabilities of a group's first tokens with and without the KV cache."""
    raw, start = run.full_model(), examples[0].n_prompt - 1
    batch = chat.collate([[e] for e in examples], run.rt.device)
    part, cache = slice(start, start + GAP_TOKENS), generate.KVCache(raw.config.n_layer, raw.config.block_size)
    with run.rt.autocast():
        logps, _ = log_probs(raw, batch, raw.config.n_tokens)
        logits = [generate.prefill(raw, batch["x"][:, : start + 1].tolist(), cache)]
        for tokens in batch["x"][:, part][:, 1:].T:
            logits.append(generate.decode_one_token(raw, tokens, cache))
            cache.advance(cache.longest + 1)
    cached = -model.cross_entropy(torch.stack(logits, dim=1)[..., : raw.config.n_tokens], batch["y"][:, part], "none")
    return (cached - logps[:, part].flatten()).abs().max().item()


def grpo_loss(net: nn.Module, batch: dict, cfg: Config, n_ids: int, reference: nn.Module | None) -> tuple[Tensor, dict]:
    """The loss and the detached metrics of a micro-batch, summed over its targets. The first update on a micro-batch
    adds to it what the next ones need: the log-probabilities before the updates, and those of the reference.
    """
    logps, entropy = log_probs(net, batch, n_ids)
    mask = batch["y"] >= 0
    ratio = (logps - batch.setdefault("old", logps.detach())).exp()  # in the first update it is 1
    objective = ratio * batch["advantage"]  # its gradient is then that of advantage · log-probability
    metrics = dict(entropy=entropy)
    if cfg.clip:
        clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * batch["advantage"]
        metrics["clipped"], objective = (clipped < objective).float(), torch.minimum(objective, clipped)
    if reference:
        if "reference" not in batch:
            with torch.no_grad():
                batch["reference"], _ = log_probs(reference, batch, n_ids)
        logratio = batch["reference"] - logps
        metrics["kl"] = logratio.exp() - logratio - 1  # k3 of http://joschu.net/blog/kl-approx.html: never below 0
        objective = objective - cfg.kl_beta * metrics["kl"]
    return -(objective * batch["weight"] * mask).sum(), {name: (x.detach() * mask).sum() for name, x in metrics.items()}


def evaluate(run: Run, prompts: list[finetune.Prompt], questions: list[chat.Row], terms: rewards.Terms) -> bool:
    """Evaluate on held-out prompts; return whether the reward is the highest so far."""
    k = run.cfg.n_eval_samples
    answers, values, totals = sample_answers(run, prompts, FIRST_HELD_OUT, k, terms)
    passed = (values[:, 0] >= 1).reshape(-1, k)
    sums = [totals.sum() / k, passed.sum() / k, passed.any(axis=1).sum(), sum(each.ended for each in answers) / k]
    means = (np.array(sums) / len(prompts)).tolist()
    scores = dict(val=-means[0]) | dict(zip(("val/reward", "pass@1", f"pass@{k}", "ended"), means))
    if questions:
        scores["exact"] = finetune.score_answers(run, questions)["exact"]
    return finetune.report(run, scores)


def main(cfg: Config) -> None:
    """Answer, score, update; evaluate and save in between."""
    if cfg.updates_per_rollout > 1 and not cfg.clip:
        raise ValueError(f"--updates_per_rollout={cfg.updates_per_rollout} needs clipping, but --clip=0.0: use 0.2")
    terms = rewards.parse(cfg.reward)
    rt = runtime.setup(cfg.device, cfg.precision, cfg.deterministic)
    run, rt, T = finetune.open_run(cfg, "grpo", ("sft", "dpo"), rt)
    config.require(f"[1, {T // 2}]", answer_tokens=cfg.answer_tokens)
    rows, val_rows = finetune.read_rows(cfg)
    budget = T - cfg.answer_tokens
    prompts = finetune.encode_prompts(run, rows, budget, cfg.data)
    val_prompts = finetune.encode_prompts(run, val_rows[: cfg.n_eval_prompts], budget, "held-out data")
    questions = chat.read_rows(cfg.eval_questions) if cfg.eval_questions else []
    n = cfg.prompts_per_step
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(prompts) / n))
    runtime.print0(f"{len(prompts):,} prompts to train on, {len(val_prompts):,} held out; {max_steps:,} steps of {n}")
    reference = checkpoint.load_model(cfg.checkpoint).raw.to(rt.device) if cfg.kl_beta else None
    loss_fn = partial(grpo_loss, cfg=cfg, n_ids=run.raw.config.n_tokens, reference=reference)
    facts = dict(training_data=prompts, validation_data=val_prompts, reward_code=[t.code for t in terms.values()])
    run.identify(**{name: f"{zlib.crc32(repr(value).encode()):08x}" for name, value in facts.items()})
    run.warm_up(make_batch(run, [chat.Example(np.array([0, 0]), 1)] * 2, np.zeros((1, 2))), loss_fn)
    lr_at = optim.schedule("wsd", max_steps, round(cfg.warmup_frac * max_steps), cfg.max_lr, decay_frac=1.0)
    n_no_signal = 0
    for step in run.steps(max_steps):
        best = run.due(cfg.eval_every) and evaluate(run, val_prompts, questions, terms)
        if best or run.due(cfg.save_every):
            run.save(best)
        if run.last:
            break
        started = time.perf_counter()
        batch, stats = rollout(run, prompts, terms)
        n_no_signal = n_no_signal + 1 if stats["no_signal"] == 1 else 0
        if n_no_signal == MAX_NO_SIGNAL:
            run.save()
            run.wait_for_writer()
            problem = f"no group had different rewards in {n_no_signal} steps (mean reward {stats['reward']:g})"
            raise ValueError(f"{problem}: the model always succeeds or always fails; use another --reward or --data")
        answered = time.perf_counter()
        for i in range(cfg.updates_per_rollout):
            run.update(batch._replace(n_sequences=0 if i else n), loss_fn, lr=lr_at(step))
        run.read_results(0)
        stats["rollout_speed"] = stats["length"] * n * cfg.samples_per_prompt / (answered - started)
        stats["training_speed"] = batch.n_tokens * cfg.updates_per_rollout / (time.perf_counter() - answered)
        run.log.scalars(step, **stats)
    run.finish()


if __name__ == "__main__":
    config.run(main, CONFIGS)
