"""What supervised fine-tuning and preference optimisation share: rows, their masks, batches, answers, resume.

Rows come from a local .json, .jsonl or .parquet file, or from a dataset on the Hugging Face hub. A response's
tokens and the end-of-text behind it are the targets; the prompt's are not.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import (
    differences,
    find_resume,
    load_model,
    refuse_own_folder,
    require_checkpoint_space,
    save_checkpoint,
    without_tensors,
    write_checkpoint,
)
from data import permute, prompt_text, step_windows
from files import make_folder, one_line
from lora import add_lora, fingerprint, load_lora, lora_weights, merged_weights, save_adapter
from model import GPT
from optimizers import keep_zeros, load_moments, make_optimizers, zero_masks
from sampling import generate
from training import (
    Dist,
    Log,
    autocast,
    barrier,
    check_least,
    check_recipe,
    pick_precision,
    require_compiler,
    total,
)

Say = Callable[[str], None]

# -----------------------------------------------------------------------------
# Rows


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a .json (a list), .jsonl or .parquet file; ValueError says what is wrong."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
    elif path.suffix == ".jsonl":
        # not splitlines: JSON may hold U+2028 and the like as they are
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        raise ValueError("expected a .json, .jsonl or .parquet file")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it does not hold rows with named fields")
    return rows


def load_rows(source: str, dist: Dist) -> list[dict[str, Any]]:
    """The rows of a local file, or of the split `train` of a dataset on the Hugging Face hub."""
    path = Path(source)
    if path.suffix in (".json", ".jsonl", ".parquet") or path.exists():
        try:
            return read_file(path)
        except FileNotFoundError as error:
            raise SystemExit(f"no file {source}") from error
        except Exception as error:  # json's, pyarrow's and the disk's
            raise SystemExit(f"cannot read the rows of {source}: {one_line(error)}") from error

    from datasets import load_dataset

    def load() -> list[dict[str, Any]]:
        try:
            return load_dataset(source, split="train").to_list()
        except Exception as error:  # the hub's many errors
            raise SystemExit(
                f"cannot get {source} from the Hugging Face hub ({one_line(error)}): check the name and the "
                "connection, or give a local .json, .jsonl or .parquet file"
            ) from error

    rows = load() if dist.rank == 0 else []
    barrier(dist)  # the others read what rank 0 has downloaded
    return rows or load()


def text_fields(row: dict[str, Any], names: Sequence[str], source: str, number: int) -> list[str]:
    """The fields as text, "" for null; SystemExit names one that is missing or something else."""
    values = []
    for name in names:
        if name not in row:
            raise SystemExit(f"{source}, row {number}: no field {name!r}, only {', '.join(row)}")
        value = "" if row[name] is None else row[name]
        if not isinstance(value, str):
            raise SystemExit(f"{source}, row {number}: {name} is {type(value).__name__}, not text")
        values.append(value)
    return values


def unknown_fields(source: str, row: dict[str, Any], expected: str) -> SystemExit:
    """The error for rows that are of none of the known kinds."""
    return SystemExit(f"{source} has the fields {', '.join(row) or '(none)'}: expected {expected}")


class Row(NamedTuple):
    """An instruction, perhaps about a context, and the response to it."""

    instruction: str
    context: str
    response: str


def read_rows(source: str, dist: Dist, say: Say) -> list[Row]:
    """The rows of a file or a dataset; blank responses are dropped and counted."""
    fields = load_rows(source, dist)
    known = {name for row in fields for name in row}
    if {"instruction", "response"} <= known:
        names = ("instruction", "context", "response")
    elif {"prompt", "response"} <= known:
        names = ("prompt", "response")
    else:
        expected = "instruction, context and response, or prompt and response"
        raise unknown_fields(source, fields[0] if fields else {}, expected)
    rows = []
    for number, row in enumerate(fields, 1):
        row = dict(context="") | row  # which rows may leave out
        instruction, *context, response = text_fields(row, names, source, number)
        rows.append(Row(instruction.strip(), "".join(context).strip(), response))
    kept = [row for row in rows if row.response.strip()]
    if len(kept) < len(rows):
        say(f"{source}: {len(rows) - len(kept):,} of {len(rows):,} rows dropped: blank responses")
    return kept


def split_rows(prompts: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on and of those held out: about this fraction, chosen by the seed.

    Rows with the same prompt stay on one side: what is held out was never answered in training.
    """
    distinct = list(dict.fromkeys(prompts))
    order = permute(np.arange(len(distinct)), len(distinct), seed, 0)
    n_held_out = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    held_out = {distinct[i] for i in order[:n_held_out]}
    train = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
    return train, [i for i, prompt in enumerate(prompts) if prompt in held_out]


# -----------------------------------------------------------------------------
# Tokens and masks


class Example(NamedTuple):
    """A prompt and a response as one sequence."""

    ids: np.ndarray  # (n,) int64: prompt, response, end-of-text (unless the response was cut)
    n_prompt: int  # the first so many ids are read, the others are to be predicted


def encode(text: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """The text's ids; specials spelled out in it stay ordinary text."""
    return tokenizer.encode_ordinary(text)


def encode_prompt(instruction: str, context: str, room: int, tokenizer: tiktoken.Encoding) -> list[int]:
    """The templated prompt's ids, the end of the context cut so that they are at most `room` if possible.

    The prompt is tokenised apart from the response: their boundary cannot shift.
    """
    ids = encode(prompt_text(instruction, context), tokenizer)
    kept = encode(context, tokenizer)
    while len(ids) > room and kept:
        kept = kept[: max(0, len(kept) - (len(ids) - room))]
        context = tokenizer.decode(kept).rstrip("\ufffd")  # half a character
        ids = encode(prompt_text(instruction, context), tokenizer)
    return ids


def make_example(prompt: list[int], response: str, T: int, tokenizer: tiktoken.Encoding) -> Example | None:
    """The example, its response's tail cut where T inputs do not hold it; None if no target is left.

    The last id is only predicted, so T inputs make T + 1 ids.
    """
    ids = [*prompt, *encode(response, tokenizer), tokenizer.eot_token][: T + 1]
    return Example(np.array(ids, dtype=np.int64), len(prompt)) if len(ids) > len(prompt) else None


def collate(bins: Sequence[Sequence[Example]], device: torch.device, width: int = 1) -> dict[str, Any]:
    """Bins of examples -> a batch; each bin becomes a row, its examples one behind the other.

    x, y: (B, W) int64, y = -100 where nothing is to be predicted. n: number of targets. If a bin holds
    several examples also pos (B, W), which begins at 0 in each, and mask (B, 1, W, W), which keeps each to
    itself. Padding stands on the right, where a causal model never looks, up to the longest or to `width`.
    """
    W = max(width, *(sum(len(e.ids) - 1 for e in row) for row in bins))
    x, pos, doc = (np.zeros((len(bins), W), dtype=np.int64) for _ in range(3))
    y = np.full((len(bins), W), -100)
    for b, row in enumerate(bins):
        at = 0
        for k, (ids, n_prompt) in enumerate(row, 1):
            to = at + len(ids) - 1
            x[b, at:to], pos[b, at:to], doc[b, at:to] = ids[:-1], np.arange(to - at), k
            y[b, at + n_prompt - 1 : to] = ids[n_prompt:]
            at = to
    batch = dict(x=torch.from_numpy(x), y=torch.from_numpy(y))
    if width > 1 or any(len(row) > 1 for row in bins):  # the same tensors at every step for the compiler
        same = torch.from_numpy(doc)[:, :, None] == torch.from_numpy(doc)[:, None, :]  # (B, W, W)
        batch |= dict(pos=torch.from_numpy(pos), mask=same.tril()[:, None])
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} | dict(
        n=int((y >= 0).sum())
    )


def forward(model: nn.Module, batch: dict[str, Any], reduction: str) -> tuple[Tensor, Tensor]:
    """The model's logits and loss for a batch of `collate`."""
    pos, mask = batch.get("pos"), batch.get("mask")
    return model(batch["x"], batch["y"], reduction=reduction, pos=pos, mask=mask)


def pack(examples: Sequence[Example], T: int) -> list[list[Example]]:
    """Examples -> bins of at most T inputs: longest first, each into the first bin that has room."""
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        need = len(example.ids) - 1
        at = next((i for i, free in enumerate(room) if free >= need), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(T)
        bins[at].append(example)
        room[at] -= need
    return bins


def share(bins: list[list[Example]], B: int, dist: Dist) -> list[list[list[Example]]]:
    """This rank's part of a step's bins, in micro-batches of B; every rank has equally many bins."""
    short = -len(bins) % dist.world_size
    mine = (bins + [[] for _ in range(short)])[dist.rank :: dist.world_size]
    return [mine[i : i + B] for i in range(0, len(mine), B)]


def step_examples(examples: Sequence[Any], step: int, n_rows: int, seed: int) -> list[Any]:
    """The rows of a training step: a permutation of its own for every epoch."""
    return [examples[i] for i in step_windows(step, n_rows, len(examples), seed)]


# -----------------------------------------------------------------------------
# Answers


def greedy_answers(
    raw: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, tokenizer: tiktoken.Encoding
) -> list[tuple[str, bool]]:
    """The most likely response to each prompt, and whether it came to its end-of-text."""
    answers: list[tuple[str, bool]] = []
    for at in range(0, len(prompts), 64):
        rows = prompts[at : at + 64]
        new: list[list[int]] = [[] for _ in rows]
        for tokens in generate(raw, rows, max_new_tokens, temperature=0, stop=tokenizer.eot_token):
            for row, token in zip(new, tokens):
                if token is not None:
                    row.append(token)
        for row in new:
            ended = row[-1:] == [tokenizer.eot_token]
            answers.append((tokenizer.decode(row[: len(row) - ended]), ended))
    return answers


class Score(NamedTuple):
    """Shares of greedy answers."""

    exact: float  # equal to the reference response
    begins: float  # equal to it or beginning with it and a space
    ended: float  # that came to their end-of-text


def score_answers(
    raw: GPT,
    questions: Sequence[tuple[list[int], str]],
    max_new_tokens: int,
    tokenizer: tiktoken.Encoding,
    amp: torch.autocast,
    dist: Dist,
) -> Score:
    """How greedy answers to (prompt ids, reference) compare with the references, over all ranks."""
    mine = questions[dist.rank :: dist.world_size]
    with amp:
        answers = greedy_answers(raw, [prompt for prompt, _ in mine], max_new_tokens, tokenizer)
    counts = torch.zeros(3, dtype=torch.float64)
    for (text, ended), (_, reference) in zip(answers, mine):
        begins = text == reference or text.startswith(reference + " ")
        counts += torch.tensor([text == reference and ended, begins, ended], dtype=torch.float64)
    # float32 suffices for counts, and not every device has more
    shares = (total(counts.float().to(dist.device), dist) / len(questions)).tolist()
    return Score(*shares)


# -----------------------------------------------------------------------------
# The run: model, optimizer and checkpoints


class Run(NamedTuple):
    """What a script that goes on from another's checkpoint works with."""

    raw: GPT
    model: nn.Module  # raw, compiled and wrapped; only train_step sees it
    tokenizer: tiktoken.Encoding
    optimizers: list[torch.optim.Optimizer]
    state: dict[str, Any] | None  # of the checkpoint to continue from
    base: str  # fingerprint of the weights that the run started from
    amp: torch.autocast
    compiled: bool


def open_run(cfg: Any, stage: str, stages: tuple[str, ...], dist: Dist, say: Say) -> Run:
    """The model to start from, or to continue with, on the device; SystemExit if they do not fit together.

    cfg: a Config of sft.py or dpo.py. stages: those the starting checkpoint may be of.
    """
    out_dir = Path(cfg.out_dir)
    check_recipe(cfg)
    if not cfg.hf:
        refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    if not 0 < cfg.val_frac < 1:
        raise SystemExit(f"val_frac={cfg.val_frac} must be above 0 and below 1")
    check_least(cfg, 0, "answer_rows", "answer_tokens", "lora_rank")
    raw, tokenizer = load_model(cfg.checkpoint, cfg.hf, say, stages)
    masks = zero_masks(raw) if cfg.keep_masks else {}
    if cfg.lora_rank and masks:
        raise SystemExit(
            "merged adapters would fill the zeros of a pruned model: leave --lora_rank at 0, or give up the "
            "zeros with --keep_masks=False"
        )
    make_folder(out_dir)
    state = find_resume(out_dir, cfg.resume, dist, say)
    base = fingerprint(raw.state_dict())
    if state:
        if state.get("stage") != stage or "optimizers" not in state:
            raise SystemExit(f"the checkpoint in {out_dir} is not of {stage}: choose another --out_dir")
        if state["base"] != base:
            raise SystemExit(
                f"the run in {out_dir} started from other weights than {cfg.hf or cfg.checkpoint} has now: "
                "choose another --out_dir, or give the checkpoint file it started from"
            )
        for name in ("lora_rank", "lora_alpha"):
            if state["config"][name] != getattr(cfg, name):
                raise SystemExit(f"the run in {out_dir} has --{name}={state['config'][name]}")
    torch.manual_seed(cfg.seed)  # the adapters' initial weights
    if cfg.lora_rank:
        add_lora(raw, cfg.lora_rank, cfg.lora_alpha)
        if state:
            load_lora(raw, state["adapters"])
    elif state:
        raw = GPT.from_weights(raw.config, state["model"])
    raw.to(dist.device)
    betas = (cfg.beta1, cfg.beta2)
    optimizers = make_optimizers(
        raw, optimizer="adamw", weight_decay=cfg.weight_decay, betas=betas, eps=cfg.eps
    )
    if masks:
        keep_zeros(optimizers, raw, {name: mask.to(dist.device) for name, mask in masks.items()})
        say(f"{len(masks)} pruned matrices: their zeros stay zero")
    if state:
        load_moments(optimizers, state["optimizers"])
        changed = differences(state["config"], cfg.__dict__) or "nothing"
        say(f"continuing {out_dir} from step {state['step']}; changed: {changed}")
    one_shape = getattr(cfg, "packing", False)  # dpo.py has none
    compiled = one_shape and dist.device.type == "cuda" if cfg.compile is None else cfg.compile
    if compiled:
        require_compiler(dist.device)
    model: nn.Module = torch.compile(raw, dynamic=not one_shape) if compiled else raw
    if dist.world_size > 1:
        model = DistributedDataParallel(model)
    if dist.rank == 0:
        require_checkpoint_space(out_dir, raw.n_params(), cfg.keep, n_best=1)
    amp = autocast(pick_precision(cfg.precision, dist.device), dist.device)
    return Run(raw, model, tokenizer, optimizers, without_tensors(state), base, amp, compiled)


def save(cfg: Any, stage: str, run: Run, best: bool, **facts: Any) -> None:
    """Write a checkpoint, best.pt (without the optimizer) if it is the best, and the adapters if any."""
    raw, folder = run.raw, Path(cfg.out_dir)
    weights = merged_weights(raw) if cfg.lora_rank else raw.state_dict()
    state = dict(
        stage=stage,
        model=weights,
        model_config=raw.config.__dict__,
        config=cfg.__dict__,
        tokenizer=run.tokenizer.name,
        base=run.base,
        **facts,
    )
    if best:
        write_checkpoint(folder / "best.pt", state)
    if cfg.lora_rank:
        state |= dict(adapters=lora_weights(raw), model=weights if cfg.lora_merge else {})
        save_adapter(folder / "adapter", raw, cfg.hf or cfg.checkpoint, run.base)
    state["optimizers"] = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
    save_checkpoint(folder, state, cfg.keep)


def show_answers(run: Run, cfg: Any, log: Log, dist: Dist) -> None:
    """Note the greedy answers to the configuration's prompts."""
    if dist.rank == 0 and cfg.prompts:
        prompts = [encode(prompt_text(text), run.tokenizer) for text in cfg.prompts]
        with run.amp:
            answers = greedy_answers(run.raw, prompts, cfg.answer_tokens, run.tokenizer)
        for text, (answer, ended) in zip(cfg.prompts, answers):
            log.note(f"  > {text} -> {answer}{'' if ended else ' …'}")
