"""Direct preference optimisation (arXiv:2305.18290): teach a checkpoint of sft.py which answer is better.

    python dpo.py demo                                   # after `python sft.py demo`: half a minute
    python dpo.py                                        # out/sft on red_teaming_reward_modeling_pairwise
    torchrun --nproc_per_node=8 dpo.py --beta=0.2 --rpo_alpha=1
    python dpo.py --data=pairs.jsonl --loss=ipo --lora_rank=16 --max_lr=2e-5
    python sample.py --checkpoint=out/dpo --chat         # talk to the result

Rows have the fields of red_teaming_reward_modeling_pairwise (prompt, response_a, response_b and preferred,
which is "A" or "B") or prompt, chosen and rejected. The policy starts as the reference; the reference's
log-probabilities are computed once, before the first step, and kept in out_dir.

A reward is beta times the log-ratio of policy to reference. Logged every step, and for held-out pairs:
rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected. The
probability of the chosen answers often falls too, only less: watch logps/chosen; rpo_alpha holds it up.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import load_model
from data import prefetch
from files import written_whole
from finetune import (
    Example,
    Run,
    Say,
    collate,
    encode_prompt,
    forward,
    load_rows,
    make_example,
    open_run,
    read_rows,
    save,
    score_answers,
    share,
    show_answers,
    split_rows,
    step_examples,
    text_fields,
    unknown_fields,
)
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

Loss = Literal["sigmoid", "robust", "hinge", "ipo"]


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/sft"  # what to start from: a folder of sft.py, or one checkpoint file
    hf: str = ""  # instead: a GPT-2 on the Hugging Face hub, or a folder in its format
    data: str = "andersonbcdefg/red_teaming_reward_modeling_pairwise"  # a dataset, or a file
    val_frac: float = 0.03  # part held out, chosen by the seed; pairs with the same prompt stay together
    questions: str = ""  # prompts and responses, as for sft.py: how answers begin is scored; "": not
    out_dir: str = "out/dpo"  # where log.txt and checkpoints go
    resume: Literal["auto", "never"] = "auto"  # auto: continue out_dir's newest checkpoint; never: refuse

    loss: Loss = "sigmoid"  # sigmoid: DPO; robust: arXiv:2403.00409; hinge: SLiC; ipo: arXiv:2310.12036
    beta: float = 0.1  # how dearly the policy pays for leaving the reference
    label_smoothing: float = 0.0  # share of preferences taken to be wrong, for sigmoid (cDPO) and robust
    rpo_alpha: float = 0.0  # weight of the chosen response's negative log-likelihood per token (RPO)

    T: int | None = None  # longest sequence, tokens; None: the model's block_size
    B: int = 8  # pairs per forward and device. Does not change the curve
    pairs_per_step: int = 32  # pairs per optimizer step over all devices
    epochs: float = 1.0  # times that every pair is seen
    max_steps: int | None = None  # instead of epochs: so many optimizer steps
    patience: int = 0  # stop after so many evaluations without a larger held-out margin; 0: never
    max_lr: float = 2e-6  # peak learning rate; with LoRA about ten times as much
    min_lr_frac: float = 0.0  # the cosine ends at this share of max_lr
    warmup_frac: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0  # on matrices and embeddings
    beta1: float = 0.9  # AdamW: memory of gradients
    beta2: float = 0.95  # AdamW: memory of squared gradients
    eps: float = 1e-8  # AdamW: added to their root
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 1337  # of the split, the order of the pairs, and the adapters
    lora_rank: int = 0  # train adapters of this rank instead of the weights; 0: the weights
    lora_alpha: float = 32.0  # adapters count alpha / rank
    keep_masks: bool = True  # weights that prune.py made zero stay zero
    lora_merge: bool = True  # checkpoints hold the merged model; False: only the adapters, which are small

    eval_every: int = 100  # steps between measures on the held-out pairs
    answer_rows: int = 0  # compare greedy answers to so many held-out prompts with the chosen; 0: none
    prompts: tuple[str, ...] = (  # answered before, during and after
        "What is the capital of France?",
        "How can I make friends in a new city?",
        "Tell me about your day.",
    )
    answer_tokens: int = 128  # longest answer, tokens
    save_every: int = 500  # steps between checkpoints; the best one is kept beside them
    keep: int = 2  # newest checkpoints kept

    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool = False  # torch.compile the training step; seldom pays, and resuming may move last bits
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


DEMO = Path(__file__).parent / "demo"
CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo-sft",
        data=str(DEMO / "dpo.jsonl"),
        val_frac=0.1,
        questions=str(DEMO / "sft_held_out.jsonl"),
        out_dir="out/demo-dpo",
        pairs_per_step=16,
        rpo_alpha=1.0,
        max_lr=5e-5,
        eval_every=20,
        answer_rows=160,
        prompts=("Where does Ada live?", "What does Leo like to eat?", "Whom does Rosa like best?"),
        answer_tokens=100,
    ),
}

# --------------------------------------------------------------------------------------------------
# Pairs


class Pair(NamedTuple):
    """Two responses to one prompt."""

    prompt: str
    chosen: str
    rejected: str


class Tokens(NamedTuple):
    """A pair as sequences, and the reference's log-probabilities of the two responses, in nats."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (0.0, 0.0)


def read_pairs(source: str, dist: Dist, say: Say) -> list[Pair]:
    """The pairs of a file or a dataset; blank or equal responses and unknown preferences are dropped and
    counted."""
    rows = load_rows(source, dist)
    known = set(rows[0]) if rows else set()
    pairs, dropped = [], dict(blank=0, equal=0, preferred=0)
    if {"prompt", "response_a", "response_b", "preferred"} <= known:
        names = ("prompt", "response_a", "response_b", "preferred")
    elif {"prompt", "chosen", "rejected"} <= known:
        names = ("prompt", "chosen", "rejected")
    else:
        expected = "prompt, response_a, response_b and preferred, or prompt, chosen and rejected"
        raise unknown_fields(source, rows[0] if rows else {}, expected)
    for number, row in enumerate(rows, 1):
        prompt, a, b, *preferred = text_fields(row, names, source, number)
        if not a.strip() or not b.strip():
            dropped["blank"] += 1
        elif a == b:
            dropped["equal"] += 1
        elif preferred and preferred[0] not in ("A", "B"):
            dropped["preferred"] += 1
        else:
            pairs.append(Pair(prompt.strip(), b, a) if preferred == ["B"] else Pair(prompt.strip(), a, b))
    if n := sum(dropped.values()):
        say(
            f"{source}: {n:,} of {len(rows):,} pairs dropped: {dropped['blank']:,} with a blank response, "
            f"{dropped['equal']:,} with equal ones, {dropped['preferred']:,} preferring neither A nor B"
        )
    return pairs


def prepare(
    pairs: Sequence[Pair], T: int, tokenizer: tiktoken.Encoding, source: str, say: Say
) -> list[Tokens]:
    """Pairs -> sequences of at most T inputs. What had to be cut or dropped is counted and said."""
    tokens, n_cut = [], 0
    for pair in pairs:
        prompt = encode_prompt(pair.prompt, "", T, tokenizer)
        chosen, rejected = (make_example(prompt, text, T, tokenizer) for text in (pair.chosen, pair.rejected))
        # cut to the same beginning they would teach nothing
        if chosen and rejected and not np.array_equal(chosen.ids, rejected.ids):
            n_cut += not chosen.ids[-1] == rejected.ids[-1] == tokenizer.eot_token
            tokens.append(Tokens(chosen, rejected))
    if len(tokens) < len(pairs):
        say(f"{source}: {len(pairs) - len(tokens):,} pairs dropped: nothing to compare within T={T} tokens")
    if n_cut:
        say(f"{source}: {n_cut:,} pairs with a response cut to fit into T={T} tokens")
    if not tokens:
        raise SystemExit(f"no pair of {source} is left to learn from")
    return tokens


def micro_batches(tokens: Sequence[Tokens], B: int, dist: Dist) -> list[dict[str, Any]]:
    """This rank's part of the pairs, the longest first: chosen above rejected, to go through one forward."""
    longest = sorted(tokens, key=lambda t: -max(len(t.chosen.ids), len(t.rejected.ids)))
    batches = []
    for rows in share([[pair] for pair in longest], B, dist):
        chosen, rejected = (
            [[getattr(pair, side) for pair in row] for row in rows] for side in Tokens._fields[:2]
        )
        batch = collate([*chosen, *rejected], dist.device)  # (2B, W)
        reference = [pair.reference for row in rows for pair in row] + [(0.0, 0.0)] * rows.count([])
        present = [float(len(row)) for row in rows]  # a rank that has run out of pairs takes part with none
        batch |= dict(reference=torch.tensor(reference, device=dist.device))  # (B, 2)
        batch |= dict(present=torch.tensor(present, device=dist.device), n=int(sum(present)))  # (B,)
        batches.append(batch)
    return batches


# --------------------------------------------------------------------------------------------------
# Losses


def log_probs(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses and their end-of-text, (B,) of the chosen and (B,) of the rejected
    ones."""
    nll = forward(model, batch, "none")[1].view(batch["y"].shape)  # (2B, W), 0 where nothing is predicted
    chosen, rejected = -nll.sum(dim=1).view(2, -1)
    return chosen, rejected


def preference_loss(
    c: Tensor, r: Tensor, lengths: Tensor, *, loss: Loss, beta: float, label_smoothing: float
) -> Tensor:
    """Each pair's loss, (B,).

    c, r: (B,) log π - log π_ref of the chosen and the rejected response. lengths: (2, B) their tokens, which
    ipo divides by as its authors do.
    """
    h, eps = c - r, label_smoothing
    if loss == "sigmoid":  # Eq. 7, arXiv:2305.18290; with smoothing Eq. 3 of its note on conservative DPO
        return -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)
    if loss == "robust":  # Eq. 8, arXiv:2403.00409: unbiased if a share eps of the preferences is flipped
        return (-(1 - eps) * F.logsigmoid(beta * h) + eps * F.logsigmoid(-beta * h)) / (1 - 2 * eps)
    if loss == "hinge":  # arXiv:2309.06657
        return F.relu(1 - beta * h)
    return (c / lengths[0] - r / lengths[1] - 1 / (2 * beta)) ** 2  # Eq. 17, arXiv:2310.12036


def loss_at_zero(loss: Loss, beta: float) -> float:
    """The loss while the policy is the reference."""
    return {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * beta**2)}[loss]


METRICS = ("preference", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
METRICS += ("logps/chosen", "logps/rejected")


def compare(model: nn.Module, batch: dict[str, Any], cfg: Config) -> tuple[Tensor, Tensor]:
    """The batch's summed loss, and the sums of METRICS over its pairs, (7,), detached."""
    chosen, rejected = log_probs(model, batch)
    c, r = chosen - batch["reference"][:, 0], rejected - batch["reference"][:, 1]
    lengths = (batch["y"] >= 0).sum(dim=1).clamp(min=1).view(2, -1)
    settings = dict(loss=cfg.loss, beta=cfg.beta, label_smoothing=cfg.label_smoothing)
    preference = preference_loss(c, r, lengths, **settings)
    loss = preference - cfg.rpo_alpha * chosen / lengths[0]  # arXiv:2404.19733
    values = (preference, cfg.beta * c, cfg.beta * r, cfg.beta * (c - r), (c > r).float(), chosen, rejected)
    present = batch["present"]
    return (loss * present).sum(), (torch.stack(values) * present).sum(dim=1).detach()


@torch.no_grad()
def measure(run: Run, tokens: Sequence[Tokens], cfg: Config, dist: Dist) -> dict[str, float]:
    """The loss and METRICS over held-out pairs."""
    sums = []
    for batch in micro_batches(tokens, cfg.B, dist):
        with run.amp:
            loss, metrics = compare(run.raw, batch, cfg)
        sums.append(torch.cat([loss.float()[None], metrics.float()]))
    means = total(torch.stack(sums).sum(dim=0), dist) / len(tokens)
    return dict(zip(("loss", *METRICS), means.tolist()))


def add_reference(
    run: Run, splits: Sequence[list[Tokens]], cfg: Config, dist: Dist, say: Say
) -> list[list[Tokens]]:
    """The splits with the reference's log-probabilities: from out_dir, or computed once and written there."""
    flat = [pair for split in splits for pair in split]
    hashed = hashlib.sha256(f"{run.base} {run.amp.fast_dtype if run.amp._enabled else ''}".encode())
    for pair in flat:
        for example in pair[:2]:
            hashed.update(f"{len(example.ids)} {example.n_prompt}".encode() + example.ids.tobytes())
    path = Path(cfg.out_dir) / f"reference_{hashed.hexdigest()[:16]}.npz"
    found = read_reference(path, len(flat))
    if dist.world_size > 1:  # all compute, or none
        found = found if total(torch.tensor(float(found is None), device=dist.device), dist) == 0 else None
    if found is None:
        say(f"computing the reference's log-probabilities of {len(flat):,} pairs")
        started = run.raw if run.state is None else load_model(cfg.checkpoint, cfg.hf, say)[0].to(dist.device)
        found = reference_log_probs(started, flat, run.amp, cfg.B, dist)
        if dist.rank == 0:
            with written_whole(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, log_probs=found)
    pairs = iter(Tokens(*pair[:2], (c, r)) for pair, (c, r) in zip(flat, found.tolist()))
    return [[next(pairs) for _ in split] for split in splits]


def read_reference(path: Path, n_pairs: int) -> np.ndarray | None:
    """The kept log-probabilities, (n_pairs, 2); None if there are none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as archive:  # which has checksums
            found = archive["log_probs"]
    except Exception:  # the disk's, zipfile's and numpy's many; they are computed anew, and the log says so
        return None
    return found if found.shape == (n_pairs, 2) and np.isfinite(found).all() else None


@torch.no_grad()
def reference_log_probs(
    raw: nn.Module, tokens: Sequence[Tokens], amp: torch.autocast, B: int, dist: Dist
) -> np.ndarray:
    """Log-probabilities of every pair's two responses, (n, 2), each computed by one rank."""
    out = torch.zeros(len(tokens), 2, device=dist.device)
    order = sorted(range(len(tokens)), key=lambda i: -max(len(e.ids) for e in tokens[i][:2]))
    alone = Dist(0, 1, dist.device)
    for at in range(dist.rank * B, len(order), B * dist.world_size):
        rows = order[at : at + B]
        (batch,) = micro_batches([tokens[i] for i in rows], B, alone)  # sorted already: they keep their order
        with amp:
            out[rows] = torch.stack(log_probs(raw, batch), dim=1).float()
    return total(out, dist).cpu().numpy()


def check(cfg: Config) -> None:
    """SystemExit that names the first constant out of range."""
    check_least(cfg, 1, "B", "pairs_per_step", "eval_every", "save_every", "keep")
    if cfg.max_steps is not None:
        check_least(cfg, 1, "max_steps")
    for name in ("rpo_alpha", "patience"):
        if getattr(cfg, name) < 0:
            raise SystemExit(f"{name}={getattr(cfg, name)} must be at least 0")
    if not cfg.beta > 0:
        raise SystemExit(f"beta={cfg.beta} must be above 0")
    if not 0 <= cfg.label_smoothing < 0.5:
        raise SystemExit(f"label_smoothing={cfg.label_smoothing} must be at least 0 and below 0.5")
    if cfg.label_smoothing and cfg.loss not in ("sigmoid", "robust"):
        raise SystemExit(f"label_smoothing is for --loss=sigmoid and robust, not {cfg.loss}")


def main(cfg: Config) -> None:
    """Optimise for the given epochs; measure, answer and save on the way."""
    check(cfg)
    dist = setup(cfg.device, cfg.deterministic)
    stop_requested = stop_on_signals()
    notes: list[str] = []  # until there is a log
    run = open_run(cfg, "dpo", ("sft",), dist, notes.append)
    raw, tokenizer, amp, state = run.raw, run.tokenizer, run.amp, run.state
    out_dir = Path(cfg.out_dir)
    log = Log(out_dir, dist)
    log.header(cfg, device=dist.device, devices=dist.world_size, tokenizer=tokenizer.name)
    for text in notes:
        log.note(text)

    # data: pairs to learn from, pairs held out, and questions to score the answers to
    T = pick_T(cfg.T, raw.config.block_size)
    pairs = read_pairs(cfg.data, dist, log.note)
    if len({pair.prompt for pair in pairs}) < 2:
        raise SystemExit(f"{cfg.data} leaves {len(pairs)} pairs: at least two prompts are needed")
    splits = split_rows([pair.prompt for pair in pairs], cfg.val_frac, cfg.seed)
    held_out = [pairs[i] for i in splits[1]]
    train, val = (prepare([pairs[i] for i in split], T, tokenizer, cfg.data, log.note) for split in splits)
    train, val = add_reference(run, (train, val), cfg, dist, log.note)
    room = T - min(cfg.answer_tokens, T // 2)  # for the prompt where an answer shall follow
    chosen = [(encode_prompt(p.prompt, "", room, tokenizer), p.chosen) for p in held_out[: cfg.answer_rows]]
    rows = read_rows(cfg.questions, dist, log.note) if cfg.questions else []
    questions = [(encode_prompt(row.instruction, row.context, room, tokenizer), row.response) for row in rows]
    max_steps = cfg.max_steps or max(1, round(cfg.epochs * len(train) / cfg.pairs_per_step))
    log.note(f"{len(train):,} pairs to learn from, {len(val):,} held out; {max_steps:,} steps")

    metrics: list[Tensor] = []  # of the step's micro-batches

    def loss_fn(model: nn.Module, batch: dict) -> Tensor:
        with amp:
            loss, sums = compare(model, batch, cfg)
        metrics.append(sums)
        return loss

    def read(step: int) -> list[dict]:
        return micro_batches(step_examples(train, step, cfg.pairs_per_step, cfg.seed), cfg.B, dist)

    if run.compiled or dist.world_size > 1:  # before the clock and the first step: see train_gpt2.py
        backward(run.model, read(0)[0], loss_fn, 1.0)
        raw.zero_grad()

    start = state["step"] if state else 0
    if start > max_steps:
        raise SystemExit(
            f"the run in {out_dir} is at step {start} already, and this one has {max_steps} steps"
        )
    scores = state["scores"] if state else {}
    best_loss, best_margin, best_step = scores.get("best", (math.inf, -math.inf, 0))
    schedule = dict(max_steps=max_steps, warmup_steps=round(cfg.warmup_frac * max_steps))
    schedule |= dict(max_lr=cfg.max_lr, min_lr_frac=cfg.min_lr_frac)
    batches = prefetch(read, start, max_steps)
    bad_steps, stopped, enough = 0, False, False
    for step in range(start, max_steps + 1):
        last, best = step == max_steps, False
        if (step % cfg.eval_every == 0 or last) and not stopped:
            means = measure(run, val, cfg, dist)
            margin, best = means["rewards/margins"], 0 < step and means["loss"] < best_loss
            best_loss = means["loss"] if best else best_loss
            if margin > best_margin:
                best_margin, best_step = margin, step
            # by steps: a resumed run, which measures once more where it goes on, must not count that
            enough = 0 < cfg.patience * cfg.eval_every <= step - best_step
            scores = {f"val/{name}": value for name, value in means.items()}
            text = f"step {step}: held-out loss {means['loss']:.4f}, margin {margin:.3f}, "
            text += f"accuracy {means['rewards/accuracies']:.1%}, "
            text += f"log-probabilities {means['logps/chosen']:.2f} and {means['logps/rejected']:.2f}"
            for name, asked in (("chosen", chosen), ("right", questions)):
                if asked:
                    score = score_answers(raw, asked, cfg.answer_tokens, tokenizer, amp, dist)
                    scores[name] = score.exact if name == "chosen" else score.begins
                    what = (
                        "equal to the chosen ones" if name == "chosen" else f"of {len(asked)} begin rightly"
                    )
                    text += f"; answers {what}: {scores[name]:.1%}"
            log.scalars(step, val=means["loss"], **scores)
            log.note(text)
            show_answers(run, cfg, log, dist)
        last = last or enough
        if dist.rank == 0 and (best or step > start and (step % cfg.save_every == 0 or last or stopped)):
            kept = scores | dict(best=(best_loss, best_margin, best_step))
            save(cfg, "dpo", run, best, step=step, scores=kept)
        if last or stopped:
            break

        t0 = time.perf_counter()
        lr = cosine_lr(step, **schedule)
        micro, stop = next(batches), stop_requested()
        metrics.clear()
        limits = dict(grad_clip=cfg.grad_clip, dist=dist, stop=stop)
        out = train_step(run.model, run.optimizers, micro, loss_fn, lr=lr, **limits)()
        sums = total(torch.stack(metrics).sum(dim=0), dist) / cfg.pairs_per_step
        means = dict(zip(METRICS, sums.tolist()))
        if step == 0 and not out.skipped:
            # sums over hundreds of tokens, computed in other batches: in bf16 or TF32 they differ visibly
            coarse = amp._enabled or dist.device.type == "cuda"
            expected, tolerance = loss_at_zero(cfg.loss, cfg.beta), 0.5 if coarse else 1e-3
            assert abs(means["preference"] - expected) <= tolerance * expected, (
                f"the policy does not start as the reference: loss {means['preference']}, not {expected}"
            )
        dt = time.perf_counter() - t0
        log.scalars(step, train=out.loss, lr=lr, norm=out.grad_norm, **means)
        log.line(step, max_steps, out, lr, dt, sum(b["x"].numel() for b in micro) * dist.world_size, None)
        bad_steps, stopped = count_bad(bad_steps, out), out.stop

    log.note(f"stopped at step {step}; the same command continues" if stopped else f"done: {out_dir}")
    cleanup(dist)


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
