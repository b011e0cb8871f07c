"""HellaSwag (arXiv:1905.07830): does a model find the right one of four endings the likeliest?

    python hellaswag.py demo                         # after `python train_gpt2.py demo`: its own rows
    python hellaswag.py                              # out/gpt2's newest checkpoint; fetches the rows once
    python hellaswag.py --hf=gpt2 --style=harness    # OpenAI's GPT-2, as lm-evaluation-harness scores it
    python hellaswag.py --checkpoint=out/gpt2/ckpt_019073.pt --out=rows.jsonl
    torchrun --nproc_per_node=8 hellaswag.py         # eight GPUs: the same numbers to the last bit

"My HellaSwag does not match": two conventions are in use. `completion` (build-nanogpt, llm.c) continues `ctx`
as it stands with " " + ending. `harness` (lm-evaluation-harness, task hellaswag) puts the activity before it,
capitalises ctx_b and removes the traces of WikiHow's markup. In both, acc takes the ending with the largest
log-probability, summed over its tokens; acc_norm divides the sum before, in completion style by the number of
tokens, in harness style by that of characters. A run prints all, and per UTF-8 byte. To compare with:

                       acc     acc_norm
    GPT-2 124M         0.2859  0.2955      completion style, OpenAI's weights
    GPT-2 124M         0.2892  0.3114      harness style
    GPT-2 350M … 1558M         0.3752, 0.4320, 0.4889         completion style
    GPT-3 124M … 1558M         0.337, 0.436, 0.510, 0.547     its paper

One standard error is 0.0046 with the 10,042 rows of the validation set; guessing gives 0.25.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoints import load_model
from files import written_whole
from model import GPT
from training import Dist, autocast, barrier, cleanup, parse, pick_precision, setup, total

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
DOWNLOADED = Path(__file__).parent / ".cache" / "hellaswag" / "hellaswag_val.jsonl"
N_ROWS = 10_042  # in the validation set
N_ENDINGS = 4

Style = Literal["completion", "harness"]
ACC_NORM: dict[Style, str] = {"completion": "per token", "harness": "per character"}
PUBLISHED: dict[Style, dict[str, dict[str, float]]] = {  # see the top of this file
    "completion": {"GPT-2 124M": {"sum": 0.2859, "per token": 0.2955}, "GPT-3 124M": {"per token": 0.337}},
    "harness": {"GPT-2 124M": {"sum": 0.2892, "per character": 0.3114}},
}


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # a checkpoint file, or the out_dir of a run: its newest
    hf: str = ""  # instead: a GPT-2 of the Hugging Face hub ("gpt2", "gpt2-xl"), or a folder in its format
    data: str = ""  # rows, a .jsonl file; "": the validation set, downloaded once into .cache/hellaswag
    limit: int = 0  # score only the first so many rows; 0: all
    style: Style = "completion"  # completion: like build-nanogpt, llm.c; harness: like lm-evaluation-harness
    out: str = ""  # write every row's sums and predictions into this .jsonl file
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it


CONFIGS = {
    "gpt2": Config(),
    "demo": Config(checkpoint="out/demo", data=str(Path(__file__).parent / "demo" / "hellaswag.jsonl")),
}

# -----------------------------------------------------------------------------
# Rows: from a file to contexts and endings


class Row(NamedTuple):
    """A row of the file, checked but for the texts that only one style needs."""

    where: str  # "file:line", for messages
    index: int  # its place among the file's rows, from 0
    label: int  # the right ending, 0 … 3
    fields: dict  # as they stand in the file


def count_rows(path: Path) -> int:
    """How many lines of a file are whole JSON values."""
    n = 0
    for line in path.read_bytes().splitlines():
        try:
            json.loads(line)
            n += 1
        except ValueError:
            pass
    return n


def download(path: Path) -> None:
    """Fetch the validation set to `path`, whole or not at all; SystemExit says what to do without network."""
    import requests

    otherwise = f"put the file there yourself, as {path}, or name one with --data="
    with written_whole(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # identity: the length of a compressed answer would not be the file's
            headers = {"Accept-Encoding": "identity"}
            with requests.get(URL, stream=True, timeout=30, headers=headers) as answer:
                answer.raise_for_status()
                size = int(answer.headers.get("Content-Length", 0)) or None
                bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name)
                with bar, open(temporary, "wb") as file:
                    for piece in answer.iter_content(2**16):
                        bar.update(file.write(piece))
        except requests.RequestException as error:
            raise SystemExit(f"cannot download {URL} ({type(error).__name__}): {otherwise}") from error
        if (n := count_rows(temporary)) != N_ROWS:
            raise SystemExit(f"{URL} sent {n:,} of {N_ROWS:,} rows: try again, or {otherwise}")


def find_rows(data: str, dist: Dist) -> Path:
    """The file to read: `data`, or the validation set, which rank 0 downloads unless it is there."""
    if data:
        return Path(data)
    if dist.rank == 0:
        if not DOWNLOADED.exists():
            download(DOWNLOADED)
        elif (n := count_rows(DOWNLOADED)) != N_ROWS:  # put there by hand, and not whole
            raise SystemExit(f"{DOWNLOADED} has {n:,} of {N_ROWS:,} rows: remove it to download it again")
    barrier(dist)
    return DOWNLOADED


def check_row(where: str, index: int, fields: object) -> Row | None:
    """The row, or None if it has no label, like the test split's; SystemExit names what is wrong with it."""
    if not isinstance(fields, dict):
        raise SystemExit(f"{where} is not an object with ctx, endings and label: {fields!r:.60}")
    label, endings = fields.get("label"), fields.get("endings")
    if not isinstance(endings, list) or len(endings) != N_ENDINGS:
        found = len(endings) if isinstance(endings, list) else "no list of them"
        raise SystemExit(f"{where}: expected {N_ENDINGS} endings, found {found}")
    for number, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise SystemExit(f"{where}: ending {number} has no text: {ending!r}")
    if label is None or label == "":
        return None
    if isinstance(label, str) and label.strip().isdecimal():  # the hub's edition has "3"
        label = int(label)
    if type(label) is not int or not 0 <= label < N_ENDINGS:
        raise SystemExit(f"{where}: the label {label!r} is none of 0 … {N_ENDINGS - 1}")
    return Row(where, index, label, fields)


def read_rows(path: str | Path, limit: int, say: Callable[[str], None]) -> list[Row]:
    """The first `limit` (0: all) rows of a .jsonl file that have a label; SystemExit names file and line."""
    try:
        # not splitlines, which also cuts at characters that may stand inside a text, such as U+2028
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read rows from {path}: {error}") from error
    rows, index = [], 0
    for number, line in enumerate(lines, 1):
        if limit and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}:{number} is not JSON ({error}): is the file whole?") from error
        row = check_row(f"{path}:{number}", index, fields)
        rows += [row] if row else []
        index += 1
    if not rows:
        raise SystemExit(f"none of the {index} rows of {path} has a label: the validation split has them")
    if index > len(rows):
        say(f"{path}: left out {index - len(rows):,} rows without a label")
    return rows


def clean(text: str) -> str:
    """Remove WikiHow's markup as lm-evaluation-harness does, in its order and each step once."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def texts(row: Row, style: Style) -> tuple[str, list[str]]:
    """A row's context and endings in the words of a style; SystemExit if a field that it needs is missing."""
    fields = row.fields
    needed = ["ctx"] if style == "completion" else ["activity_label"]
    if style == "harness":  # some editions have only ctx: the two, joined by a space
        needed += ["ctx_a", "ctx_b"] if "ctx_b" in fields else ["ctx"]
    for name in needed:
        if not isinstance(fields.get(name), str):
            raise SystemExit(f"{row.where}: {style} style needs a text in the field {name!r}")
    if style == "completion":
        return fields["ctx"], fields["endings"]
    ctx = f"{fields['ctx_a']} {fields['ctx_b'].capitalize()}" if "ctx_b" in fields else fields["ctx"]
    endings = [clean(ending) for ending in fields["endings"]]
    if not all(map(str.strip, endings)):
        raise SystemExit(f"{row.where}: an ending has no text behind its markup: {fields['endings']}")
    return clean(f"{fields['activity_label']}: {ctx}"), endings


# -----------------------------------------------------------------------------
# Tokens: a context and its endings in one sequence


def encode(
    context: str, endings: list[str], style: Style, tokenizer: tiktoken.Encoding
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a context, end-of-text if it is empty, and of each ending behind it.

    Completion style tokenises them apart. Harness style tokenises context and ending together and takes away
    as many tokens as the context has alone; spaces at the context's end count as the ending's.
    """
    endings, spaces = [" " + ending for ending in endings], ""
    if style == "harness":
        bare = context.rstrip()
        context, spaces = bare, context[len(bare) :]
    head = tokenizer.encode_ordinary(context)
    if style == "completion" or not head:
        return head or [tokenizer.eot_token], [tokenizer.encode_ordinary(ending) for ending in endings]
    return head, [tokenizer.encode_ordinary(context + spaces + ending)[len(head) :] for ending in endings]


class Packed(NamedTuple):
    """A context followed by endings of it, which see the context and not each other, so that the context is
    computed only once. Arrays over the t tokens the model is fed and the p it predicts; all int64.
    """

    tokens: np.ndarray  # (t,) ids; without the endings' last, which are only predicted
    pos: np.ndarray  # (t,) positions: every ending goes on from the context's end
    part: np.ndarray  # (t,) 0 for the context, then 1, 2, … for the endings
    source: np.ndarray  # (p,) which of the t tokens predicts
    target: np.ndarray  # (p,) the id it is to predict
    slot: np.ndarray  # (p,) 4 · row + ending, the sum that the log-probability belongs to


class Questions(NamedTuple):
    """n rows, ready to be scored any number of times."""

    packed: list[Packed]  # longest first
    index: np.ndarray  # (n,) places in the file
    label: np.ndarray  # (n,)
    length: dict[str, np.ndarray]  # (n, 4) what sums are divided by: 1 for "sum", tokens for "per token", …


def pack(context: list[int], endings: list[list[int]], slots: list[int]) -> Packed:
    """A context and endings, none of them empty, in one sequence."""
    n = start = len(context)
    tokens, pos, part, source = list(context), list(range(n)), [0] * n, []
    for number, ending in enumerate(endings, 1):
        fed = len(ending) - 1
        tokens += ending[:-1]
        pos += range(n, n + fed)
        part += [number] * fed
        source += [n - 1, *range(start, start + fed)]
        start += fed
    target = [token for ending in endings for token in ending]
    slot = [slot for slot, ending in zip(slots, endings) for _ in ending]
    return Packed(*(np.array(x, dtype=np.int64) for x in (tokens, pos, part, source, target, slot)))


def cut(context: list[int], ending: list[int], block_size: int) -> tuple[list[int], list[int]]:
    """Keep the last tokens, as many as the model can be fed and, of the ending, can predict from them."""
    both = (context + ending)[-block_size - 1 :]  # the last one is only predicted
    n = min(len(ending), len(both) - 1)
    return both[:-n], both[-n:]


def prepare(
    rows: list[Row], tokenizer: tiktoken.Encoding, style: Style, block_size: int, say: Callable[[str], None]
) -> Questions:
    """Tokenise rows; SystemExit names one that cannot be scored.

    An ending that does not fit behind its context gets a sequence of its own, without the context's
    beginning; rows with such endings are counted.
    """
    packed, lengths, n_cut = [], [], 0
    for i, row in enumerate(rows):
        context, endings = texts(row, style)
        head, tails = encode(context, endings, style, tokenizer)
        if not all(tails):
            raise SystemExit(f"{row.where}: ending {tails.index([])} has no tokens behind its context")
        slots = list(range(N_ENDINGS * i, N_ENDINGS * (i + 1)))
        if len(head) + max(map(len, tails)) <= block_size + 1:
            packed.append(pack(head, tails, slots))
        else:
            n_cut += 1
            heads, tails = zip(*(cut(head, tail, block_size) for tail in tails))
            packed += [pack(head, [tail], [slot]) for head, tail, slot in zip(heads, tails, slots)]
        n_tokens, n_chars = [len(tail) for tail in tails], [len(ending) for ending in endings]
        lengths.append(([1] * N_ENDINGS, n_tokens, n_chars, [len(ending.encode()) for ending in endings]))
    if n_cut:
        say(f"{n_cut:,} rows exceed the model's {block_size} tokens: their contexts lost the beginning")
    if style == "harness" and (n := sum("ctx_b" not in row.fields for row in rows)):
        say(f"{n:,} rows have no ctx_a and ctx_b: ctx stands in, without the capital letter of the harness")
    # by content: the order of the rows must not decide who shares a batch, and with it the last bits
    packed.sort(key=lambda p: (len(p.tokens), p.tokens.tolist()), reverse=True)
    length = dict(zip(("sum", "per token", "per character", "per byte"), np.array(lengths).swapaxes(0, 1)))
    index, label = np.array([(row.index, row.label) for row in rows]).T
    return Questions(packed, index, label, length)


# -----------------------------------------------------------------------------
# Scoring


class Result(NamedTuple):
    """What an evaluation found; the dictionaries by "sum", "per token", "per character", "per byte"."""

    sums: np.ndarray  # (n, 4) log-probabilities of the endings, nats
    picks: dict[str, np.ndarray]  # (n,) the likeliest ending
    accuracy: dict[str, float]  # share of picks that are right
    error: dict[str, float]  # its standard error


def split_batches(packed: list[Packed], n_tokens: int) -> list[tuple[int, list[Packed]]]:
    """Cut sequences, longest first, into (padded length, batch) of up to n_tokens, one sequence at least."""
    batches, start = [], 0
    while start < len(packed):
        T = -(-len(packed[start].tokens) // 8) * 8  # kernels want multiples of 8; about 30 lengths in all
        stop = start + max(1, n_tokens // T)
        batches.append((T, packed[start:stop]))
        start = stop
    return batches


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def log_probs(raw: GPT, batch: list[Packed], T: int, head_rows: int, device: torch.device) -> Tensor:
    """The log-probability of every predicted token of the batch, (P,) fp32, sequence after sequence."""
    fed = np.zeros((3, len(batch), T), dtype=np.int64)  # padded on the right, where nothing looks
    for b, p in enumerate(batch):
        fed[:, b, : len(p.tokens)] = p.tokens, p.pos, p.part
    source = np.concatenate([b * T + p.source for b, p in enumerate(batch)])
    target = np.concatenate([p.target for p in batch])
    idx, pos, part = to_device(fed, device)  # each (B, T)
    source, target = to_device(np.stack([source, target]), device)  # each (P,)

    query, key = part[:, :, None], part[:, None, :]
    mask = ((key == 0) | (key == query)).tril()[:, None]  # (B, 1, T, T): the context and the own ending
    x = raw.hidden(idx, pos=pos, mask=mask).flatten(0, 1)[source]  # (P, C)
    found = []
    for x_rows, targets in zip(x.split(head_rows), target.split(head_rows)):
        # the padded ids do not compete: they are no words, and the exported model does not have them
        logits = raw.lm_head(x_rows)[:, : raw.config.n_tokens]  # (head_rows, n_tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(-F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def evaluate(
    raw: GPT,
    questions: Questions,
    amp: torch.autocast,
    dist: Dist,
    n_tokens: int | None = None,
    progress: bool = False,
) -> Result:
    """Score the questions over all ranks; each returns the same result, to the bit, on any number of them.

    n_tokens: tokens of a batch, with padding; None: what suits the device. progress: show a bar.
    """
    on_cuda = dist.device.type == "cuda"
    n_tokens = n_tokens or (2**15 if on_cuda else 2**11)
    head_rows = 2**11 if on_cuda else 2**7  # bounds the logits, to 25 MB on a CPU: its allocator keeps those
    mine = split_batches(questions.packed, n_tokens)[dist.rank :: dist.world_size]
    found = [torch.zeros(0, device=dist.device)]  # on the device: nothing waits until all are in
    quiet = not progress or dist.rank > 0
    with amp, tqdm(total=sum(len(batch) for _, batch in mine), disable=quiet, desc="HellaSwag") as bar:
        for T, batch in mine:
            found.append(log_probs(raw, batch, T, head_rows, dist.device))
            bar.update(len(batch))
    slots = [np.zeros(0, dtype=np.int64), *(p.slot for _, batch in mine for p in batch)]
    n_sums = N_ENDINGS * len(questions.label)
    sums = np.bincount(np.concatenate(slots), torch.cat(found).cpu().double().numpy(), n_sums)
    # every sum is one rank's and zero on the others, so adding them up is exact
    sums = total(torch.from_numpy(sums), dist).cpu().numpy()
    return grade(questions, sums.reshape(-1, N_ENDINGS))


def grade(questions: Questions, sums: np.ndarray) -> Result:
    """Pick the likeliest endings, the first of equals, by sums (n, 4), and count the right ones."""
    picks = {way: (sums / length).argmax(axis=1) for way, length in questions.length.items()}
    accuracy = {way: float((pick == questions.label).mean()) for way, pick in picks.items()}
    error = {way: math.sqrt(p * (1 - p) / len(sums)) for way, p in accuracy.items()}
    return Result(sums, picks, accuracy, error)


# -----------------------------------------------------------------------------
# Command line


def table(name: str, result: Result, style: Style, published: bool) -> str:
    """A model's accuracies ± one standard error, beside the published ones of the same style if asked."""
    names = {"sum": "sum (acc)", ACC_NORM[style]: f"{ACC_NORM[style]} (acc_norm)"}
    lines = [("", *(names.get(way, way) for way in result.accuracy))]
    lines.append((name, *(f"{p:.4f} ± {result.error[way]:.4f}" for way, p in result.accuracy.items())))
    for other, figures in PUBLISHED[style].items() if published else ():
        cells = (f"{figures[way]:.4f}" if way in figures else "-" for way in result.accuracy)
        lines.append((other, *(cell + " " * len(" ± 0.0046") for cell in cells)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def write_rows(path: Path, questions: Questions, result: Result) -> None:
    """Write a JSON object a row: its place in the file, label, four sums, four lengths, predictions."""
    counts = {"n_tokens": "per token", "n_chars": "per character", "n_bytes": "per byte"}
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, sums in enumerate(result.sums.tolist()):
            row = dict(index=int(questions.index[i]), label=int(questions.label[i]), sums=sums)
            row |= {name: questions.length[way][i].tolist() for name, way in counts.items()}
            row["predictions"] = {way: int(pick[i]) for way, pick in result.picks.items()}
            file.write(json.dumps(row) + "\n")


def main(cfg: Config) -> None:
    """Score a model and print its accuracies."""
    if cfg.limit < 0:
        raise SystemExit(f"limit={cfg.limit} must be 0 (all rows) or above")
    if cfg.out and not Path(cfg.out).absolute().parent.is_dir():
        raise SystemExit(f"cannot write {cfg.out}: there is no folder {Path(cfg.out).parent}")
    dist = setup(cfg.device, deterministic=False)

    def say(text: str) -> None:
        if dist.rank == 0:
            print(text, flush=True)

    path = find_rows(cfg.data, dist)
    rows = read_rows(path, cfg.limit, say)
    raw, tokenizer = load_model(cfg.checkpoint, cfg.hf, say)
    raw.to(dist.device)
    questions = prepare(rows, tokenizer, cfg.style, raw.config.block_size, say)
    amp = autocast(pick_precision(cfg.precision, dist.device), dist.device)
    result = evaluate(raw, questions, amp, dist, progress=True)
    if not np.isfinite(result.sums).all():
        raise SystemExit("the model's log-probabilities are not finite: its weights are no use")
    say(f"{len(rows):,} rows of {path}, {cfg.style} style; guessing gives 0.25")
    # the others' figures are of HellaSwag itself: they say nothing beside the demo world's rows
    say(table(cfg.hf or cfg.checkpoint, result, cfg.style, published=tokenizer.name == "gpt2"))
    if cfg.out and dist.rank == 0:
        write_rows(Path(cfg.out), questions, result)
    cleanup(dist)


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
