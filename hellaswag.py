"""HellaSwag (arXiv:1905.07830): how often does a model give the correct one of four endings the highest probability?

    python hellaswag.py demo                         # after `python train_gpt2.py demo`: the demo's questions
    python hellaswag.py                              # out/gpt2's newest checkpoint; downloads the rows once
    python hellaswag.py --checkpoint=gpt2 --style=harness    # OpenAI's GPT-2, scored as lm-evaluation-harness does
    python hellaswag.py --checkpoint=out/gpt2/ckpt_019073.pt --out=rows.jsonl
    torchrun --nproc_per_node=8 hellaswag.py         # eight GPUs: same bits as on one

Two scoring conventions are in use. `completion` (build-nanogpt, llm.c) continues `ctx` with " " + ending. `harness`
(lm-evaluation-harness, task hellaswag) prepends the activity, capitalizes ctx_b and removes WikiHow's markup. In both,
acc selects the ending with the largest summed log-probability; acc_norm divides the sum by the number of tokens
(completion) or characters (harness). Published acc_norm in completion style: GPT-2 355M, 774M, 1558M: 0.3752, 0.4320,
0.4889; GPT-3 350M, 760M, 1.3B: 0.436, 0.510, 0.547. One standard error is 0.0046 for the 10,042 validation rows.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from neogpt import chat, checkpoint, config, files, model, runtime

HUB = "Rowan/hellaswag"  # the dataset on the Hugging Face hub
N_ENDINGS = 4

Ids = list[int]  # token ids
Style = Literal["completion", "harness"]
ACC_NORM: dict[Style, str] = {"completion": "per token", "harness": "per character"}
PUBLISHED: dict[Style, dict[str, dict[str, float]]] = {
    "completion": {"GPT-2 124M": {"sum": 0.2859, "per token": 0.2955}, "GPT-3 124M": {"per token": 0.337}},
    "harness": {"GPT-2 124M": {"sum": 0.2892, "per character": 0.3114}},
}


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # an out_dir, a checkpoint file, a Hugging Face folder, or a name on the hub
    data: str = ""  # rows, a .jsonl or .parquet file; "": the validation set, downloaded once
    limit: config.PositiveInt | None = None  # score only this many rows; None: all
    style: Style = "completion"  # completion: as build-nanogpt, llm.c; harness: as lm-evaluation-harness
    out: str = ""  # write every row's log-probabilities and predictions into this .jsonl file
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it


CONFIGS = {"gpt2": Config(), "demo": Config(checkpoint="out/demo", data=str(config.ROOT / "demo" / "hellaswag.jsonl"))}


class Row(NamedTuple):
    where: str  # "file, row 3", for messages
    index: int  # its place in the file, from 0
    label: int  # the correct ending, 0 … 3
    fields: dict[str, Any]  # as in the file


def read_rows(source: str, limit: int | None) -> list[Row]:
    """The first `limit` rows with a label. source: a file, or "" for the hub's validation set. Raises ValueError."""
    rows, source = [], source or HUB
    for index, fields in enumerate(chat.load_rows(source, "validation")):
        where, endings = f"{source}, row {index + 1}", fields.get("endings")
        label = str(fields.get("label", "")).strip()  # text in the hub's edition, empty in the test split
        valid = isinstance(endings, list) and len(endings) == N_ENDINGS and all(isinstance(e, str) for e in endings)
        if not valid or label not in ("", "None", "0", "1", "2", "3"):
            raise ValueError(f"{where}: expected {N_ENDINGS} endings and a label from 0 to 3, found {fields!r:.200}")
        if label.isdecimal():
            rows.append(Row(where, index, int(label), fields))
    if not rows:
        raise ValueError(f"no row of {source} has a label: use the validation split")
    return rows[:limit]


def texts(row: Row, style: Style) -> tuple[str, list[str]]:
    """The context and the endings of a row. Raises ValueError if a field that the style needs is missing."""
    fields = row.fields
    for name in ("ctx",) if style == "completion" else ("activity_label", "ctx_a", "ctx_b"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{row.where}: --style={style} needs text in the field {name!r}")
    if style == "completion":
        return fields["ctx"], fields["endings"]
    context = f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}"
    # remove WikiHow's markup as lm-evaluation-harness does: in this order, and each step once
    cleaned = [text.strip().replace(" [title]", ". ") for text in (context, *fields["endings"])]
    cleaned = [re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in cleaned]
    return cleaned[0], cleaned[1:]


def encode(context: str, endings: list[str], style: Style, tokenizer: tiktoken.Encoding) -> tuple[Ids, list[Ids]]:
    """Token ids of the context (end-of-text if it is empty) and of each ending. Harness style tokenizes both together
    and removes as many tokens as the context has alone; spaces at the end of the context belong to the ending.
    """
    ids = tokenizer.encode_ordinary(context.rstrip() if style == "harness" else context)
    if style == "completion" or not ids:
        return ids or [tokenizer.eot_token], [tokenizer.encode_ordinary(" " + ending) for ending in endings]
    return ids, [tokenizer.encode_ordinary(f"{context} {ending}")[len(ids) :] for ending in endings]


class Packed(NamedTuple):
    """A context and its endings as one sequence: the context is computed once. t inputs, p predictions, int64."""

    inputs: np.ndarray  # (3, t): ids, positions (endings continue from the context), part (0: context, 1 … 4: endings)
    outputs: np.ndarray  # (3, p): index of the input that predicts, id to predict, sum to add to (4 · row + ending)


class Questions(NamedTuple):
    """n tokenized rows."""

    packed: list[Packed]  # longest first
    index: np.ndarray  # (n,) place in the file
    label: np.ndarray  # (n,)
    length: dict[str, np.ndarray]  # (n, 4) divisors of the sums: 1 for "sum", tokens for "per token", …


def pack(context: Ids, endings: list[Ids], row: int) -> Packed:
    """One sequence of a context and its endings, none of them empty. The last token of an ending is only predicted."""
    n = len(context)
    inputs, outputs = [(token, i, 0) for i, token in enumerate(context)], []
    for number, ending in enumerate(endings):
        sources = [n - 1, *range(len(inputs), len(inputs) + len(ending) - 1)]
        outputs += [(source, token, N_ENDINGS * row + number) for source, token in zip(sources, ending)]
        inputs += [(token, n + i, number + 1) for i, token in enumerate(ending[:-1])]
    return Packed(np.array(inputs).T, np.array(outputs).T)


def prepare(rows: list[Row], tokenizer: tiktoken.Encoding, style: Style, block_size: int) -> Questions:
    """Tokenize rows. A context is truncated at its beginning to make room for the longest ending."""
    packed, lengths, n_truncated = [], [], 0
    for i, row in enumerate(rows):
        context, endings = texts(row, style)
        ids, ending_ids = encode(context, endings, style, tokenizer)
        if not all(ending_ids) or not all(map(str.strip, endings)):
            raise ValueError(f"{row.where}: an ending has no text or no tokens: {row.fields['endings']!r:.200}")
        longest = max(map(len, ending_ids))
        n_truncated += len(ids) + longest > block_size + 1  # + 1: the last token is no input
        ids, ending_ids = ids[-max(1, block_size + 1 - longest) :], [e[-block_size:] for e in ending_ids]
        packed.append(pack(ids, ending_ids, i))
        n_bytes = [len(ending.encode("utf-8", "surrogatepass")) for ending in endings]
        lengths.append([[1] * N_ENDINGS, [*map(len, ending_ids)], [*map(len, endings)], n_bytes])
    if n_truncated:
        runtime.print0(f"{n_truncated:,} rows exceed the model's {block_size} tokens: contexts truncated")
    # sorted by content, so that the order of the rows does not change the batches and thereby the last bits
    packed.sort(key=lambda p: (p.inputs.shape[1], p.inputs[0].tolist()), reverse=True)
    length = dict(zip(("sum", "per token", "per character", "per byte"), np.array(lengths).swapaxes(0, 1)))
    return Questions(packed, np.array([r.index for r in rows]), np.array([r.label for r in rows]), length)


def try_load_questions(
    source: str, limit: int | None, tokenizer: tiktoken.Encoding, block_size: int, rt: runtime.Runtime
) -> Questions | None:
    """The questions in completion style for a training run; None, on all ranks, if they cannot be downloaded."""
    questions = None
    try:
        questions = prepare(read_rows(source, limit), tokenizer, "completion", block_size)
    except OSError as error:  # no network
        runtime.print0(f"training without HellaSwag: {error}")
    return questions if all(runtime.all_gather(questions is not None, rt)) else None


class Result(NamedTuple):
    """Scores; the dictionaries have the keys "sum", "per token", "per character" and "per byte"."""

    sums: np.ndarray  # (n, 4) log-probabilities of the endings, nats
    predictions: dict[str, np.ndarray]  # (n,) the most likely ending
    accuracy: dict[str, float]


def log_probs(raw: model.GPT, batch: list[Packed], T: int, head_rows: int, device: torch.device) -> Tensor:
    """The log-probability of every predicted token, (P,) fp32, in order, without the padded rows of the vocabulary."""
    inputs = np.zeros((3, len(batch), T), dtype=np.int64)  # padded on the right
    for b, p in enumerate(batch):
        inputs[:, b, : p.inputs.shape[1]] = p.inputs
    outputs = np.concatenate([(b * T + p.outputs[0], p.outputs[1]) for b, p in enumerate(batch)], axis=1)
    idx, pos, part = runtime.to_device(torch.from_numpy(inputs), device)  # each (B, T)
    source, target = runtime.to_device(torch.from_numpy(outputs), device)  # each (P,)
    # attend to the context and to the same ending
    mask = ((part == 0)[:, None, :] | (part[:, None, :] == part[:, :, None])).tril()[:, None]  # (B, 1, T, T)
    x = raw.trunk(idx, pos=pos, mask=mask).flatten(0, 1)[source]  # (P, C)
    found = []
    for x_rows, targets in zip(x.split(head_rows), target.split(head_rows)):
        logits = raw.head(x_rows)[:, : raw.config.n_tokens].to(torch.promote_types(x.dtype, torch.float32))
        found.append(-F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def evaluate(raw: model.GPT, questions: Questions, rt: runtime.Runtime, progress: bool = False) -> Result:
    """Score the questions, in the same batches and with the same bits on any number of ranks."""
    n_tokens, head_rows = (2**15, 2**11) if rt.device.type == "cuda" else (2**11, 2**7)  # 25 MB of logits on a CPU
    batches, rest = [], questions.packed
    while rest:
        T = -(-rest[0].inputs.shape[1] // 8) * 8  # multiples of 8 suit the kernels; about 30 lengths in all
        B = max(1, n_tokens // T)
        batches.append((T, rest[:B]))
        rest = rest[B:]
    mine = batches[rt.rank :: rt.world_size]
    found = [torch.zeros(0, device=rt.device)]  # on the device, so that nothing waits
    with rt.autocast():
        for T, batch in tqdm(mine, desc="HellaSwag", disable=not progress or rt.rank > 0):
            found.append(log_probs(raw, batch, T, head_rows, rt.device))
    slots = np.concatenate([np.zeros(0, dtype=np.int64), *(p.outputs[2] for _, batch in mine for p in batch)])
    sums = np.bincount(slots, torch.cat(found).cpu().double().numpy(), N_ENDINGS * len(questions.label))
    # every sum belongs to one rank and is zero on the others, so adding them is exact
    sums = runtime.all_reduce_sum(torch.from_numpy(sums), rt).cpu().numpy().reshape(-1, N_ENDINGS)
    predictions = {by: (sums / length).argmax(axis=1) for by, length in questions.length.items()}
    return Result(sums, predictions, {by: float((p == questions.label).mean()) for by, p in predictions.items()})


def main(cfg: Config) -> None:
    """Score a model, print its accuracies and, with --out, write one JSON object per row."""
    if cfg.out and (Path(cfg.out).is_dir() or not Path(cfg.out).absolute().parent.is_dir()):
        raise ValueError(f"--out={cfg.out}: expected a file in a folder that exists")
    rt = runtime.setup(cfg.device, cfg.precision)
    raw, tokenizer, _, _ = checkpoint.load_model(cfg.checkpoint)
    questions = prepare(read_rows(cfg.data, cfg.limit), tokenizer, cfg.style, raw.config.block_size)
    result = evaluate(raw.to(rt.device), questions, rt, progress=True)
    if not np.isfinite(result.sums).all():
        raise ValueError(f"{cfg.checkpoint} gives log-probabilities that are not finite")
    n, names = len(result.sums), {"sum": "sum (acc)", ACC_NORM[cfg.style]: f"{ACC_NORM[cfg.style]} (acc_norm)"}
    scores = [f"{p:.4f} ± {math.sqrt(p * (1 - p) / n):.4f}" for p in result.accuracy.values()]  # ± one standard error
    table = [["", *(names.get(by, by) for by in result.accuracy)], [cfg.checkpoint, *scores]]
    # published values are for HellaSwag's own rows and GPT-2's tokens
    for other, known in PUBLISHED[cfg.style].items() if not cfg.data and tokenizer.name == "gpt2" else ():
        table.append([other, *(f"{known[by]:.4f}" if by in known else "-" for by in result.accuracy)])
    runtime.print0(f"{n:,} rows, {cfg.style} style; chance is 0.25\n{config.format_table(table)}")
    if cfg.out and rt.rank == 0:
        lengths = {"n_tokens": "per token", "n_chars": "per character", "n_bytes": "per byte"}
        with files.atomic_write(cfg.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for i, sums in enumerate(result.sums.tolist()):
                row = dict(index=int(questions.index[i]), label=int(questions.label[i]), sums=sums)
                row |= {name: questions.length[by][i].tolist() for name, by in lengths.items()}
                row["predictions"] = {by: int(p[i]) for by, p in result.predictions.items()}
                file.write(json.dumps(row) + "\n")
    runtime.cleanup(rt)


if __name__ == "__main__":
    config.run(main, CONFIGS)
