"""Rows of prompts and responses for sft.py and dpo.py: files, prompt template, masks, and packing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

from neogpt import data, files, runtime


def load_rows(source: str, rt: runtime.Runtime, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a .json (a list), .jsonl or .parquet file, or of a dataset on the Hugging Face hub. Raises ValueError
    for a file and OSError for a dataset that cannot be read, on all ranks.
    """
    path = Path(source)
    is_local = path.exists() or path.suffix in (".json", ".jsonl", ".parquet")
    if rt.rank > 0:
        runtime.barrier(rt)  # read what rank 0 has downloaded
    try:
        if not is_local:
            from datasets import load_dataset

            rows = load_dataset(source, split=split).to_list()
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8")
            # not splitlines, which also splits at U+2028 and other characters that JSON strings may contain
            lines = [line for line in text.split("\n") if line.strip()]
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except Exception as error:  # json, pyarrow, the file system and the hub raise many kinds
        reason = files.one_line(error)
        if is_local:
            raise ValueError(f"cannot read the rows of {source}: {reason}") from error
        raise OSError(f"cannot download {source} ({reason}): check the name and the network, or give a file") from error
    finally:
        if rt.rank == 0:
            runtime.barrier(rt)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"cannot read the rows of {source}: they must be objects with named fields")
    return rows


def read_texts(rows: list[dict[str, Any]], kinds: Sequence[tuple[str, ...]], source: str) -> list[list[str]]:
    """The text fields of each row; null becomes "". kinds: alternative lists of fields; the first whose names all occur
    in the rows is used. Raises ValueError if there is none, or for a field that is missing in a row or is not text.
    """
    known = sorted({name for row in rows for name in row})
    names = next((names for names in kinds if set(names) <= set(known)), None)
    if not names:
        expected = " or ".join(map(", ".join, kinds))
        raise ValueError(f"{source} has the fields {', '.join(known) or '(none)'}: expected {expected}")
    for number, row in enumerate(rows, 1):
        for name in names:
            if not isinstance(row.get(name, 0), str | None):  # 0: missing
                raise ValueError(f"{source}, row {number}: {name}={row.get(name)!r:.60} is not text")
    return [[row[name] or "" for name in names] for row in rows]


class Row(NamedTuple):
    """An instruction, its context ("" for none), and the response."""

    instruction: str
    context: str
    response: str


def read_rows(source: str, rt: runtime.Runtime) -> list[Row]:
    """The rows of a file or a dataset. Rows with a blank response are dropped and counted."""
    rows = load_rows(source, rt)
    if any("response" in row for row in rows):
        rows = [dict(context="") | row for row in rows]  # the context is optional
    kinds = [("instruction", "context", "response"), ("prompt", "context", "response")]
    texts = read_texts(rows, kinds, source)
    out = [Row(prompt.strip(), context.strip(), response) for prompt, context, response in texts if response.strip()]
    if len(out) < len(texts):
        runtime.print0(f"{source}: {len(texts) - len(out):,} of {len(texts):,} rows dropped: blank responses")
    return out


def split_rows(rows: Sequence, prompts: Sequence[str], fraction: float, seed: int) -> tuple[list, list]:
    """The training rows and the held-out rows, which are all rows of `fraction` of the distinct prompts."""
    distinct = list(dict.fromkeys(prompts))
    order = data.permute(np.arange(len(distinct)), len(distinct), seed, 0)
    n_held_out = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    held_out = {distinct[i] for i in order[:n_held_out]}
    train = [row for row, prompt in zip(rows, prompts) if prompt not in held_out]
    return train, [row for row, prompt in zip(rows, prompts) if prompt in held_out]


def prompt_text(instruction: str, context: str = "") -> str:
    """The prompt template: the text before the response."""
    return f"{instruction}\nContext:\n{context}\nResponse:\n" if context else f"{instruction}\nResponse:\n"


class Example(NamedTuple):
    """A prompt and a response as one sequence."""

    ids: np.ndarray  # (n,) int64: prompt, response, end-of-text (unless the response was truncated)
    n_prompt: int  # tokens of the prompt; the loss is on the tokens after them

    @property
    def n_inputs(self) -> int:
        """Positions that the model processes: all ids but the last."""
        return len(self.ids) - 1


def encode_prompt(instruction: str, context: str, budget: int, tokenizer: tiktoken.Encoding) -> list[int]:
    """The ids of the prompt, with the end of its context truncated to reach `budget` tokens, if that is possible."""
    ids = tokenizer.encode_ordinary(prompt_text(instruction, context))
    context_ids = tokenizer.encode_ordinary(context)
    while len(ids) > budget and context_ids:
        context_ids = context_ids[: max(0, len(context_ids) - (len(ids) - budget))]
        context = tokenizer.decode(context_ids).rstrip("\ufffd")  # of an incomplete character
        ids = tokenizer.encode_ordinary(prompt_text(instruction, context))
    return ids


def make_example(prompt: list[int], response: str, T: int, tokenizer: tiktoken.Encoding) -> Example | None:
    """The example, truncated to T input tokens; None if no target is left."""
    # prompt and response are tokenized separately, so no token contains parts of both
    ids = [*prompt, *tokenizer.encode_ordinary(response), tokenizer.eot_token][: T + 1]
    return Example(np.array(ids, dtype=np.int64), len(prompt)) if len(ids) > len(prompt) else None


def pack(examples: Sequence[Example], T: int) -> list[list[Example]]:
    """Examples -> bins of at most T input tokens, longest first, each into the first bin with enough room (first-fit
    decreasing). An example of more than T tokens has its own bin, so T=0 does not pack at all.
    """
    bins = [[] for _ in examples]
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        next(b for b in bins if not b or sum(e.n_inputs for e in [*b, example]) <= T).append(example)
    return [b for b in bins if b]


def collate(bins: Sequence[Sequence[Example]], device: torch.device, width: int = 1) -> dict[str, Any]:
    """Bins of examples -> a micro-batch, in which each bin is one sequence, padded on the right. Returns x, y (B, W)
    int64, with y = -100 where there is no loss, and n, the number of targets. If a bin holds several examples, also pos
    (B, W), which restarts at 0 in each example, and mask (B, 1, W, W), causal within each example. W is the length of
    the longest bin, at least `width`.
    """
    W = max(width, *(sum(e.n_inputs for e in row) for row in bins))
    x, pos, doc = np.zeros((3, len(bins), W), dtype=np.int64)  # doc: number of the example
    y = np.full((len(bins), W), -100)
    for b, row in enumerate(bins):
        start = 0
        for k, example in enumerate(row, 1):
            end = start + example.n_inputs
            x[b, start:end], pos[b, start:end], doc[b, start:end] = example.ids[:-1], np.arange(end - start), k
            y[b, start + example.n_prompt - 1 : end] = example.ids[example.n_prompt :]
            start = end
    batch = dict(x=torch.from_numpy(x), y=torch.from_numpy(y))
    if width > 1 or any(len(row) > 1 for row in bins):  # a compiled model needs the same tensors every time
        same = torch.from_numpy(doc)[:, :, None] == torch.from_numpy(doc)[:, None, :]  # (B, W, W)
        batch |= dict(pos=torch.from_numpy(pos), mask=same.tril()[:, None])
    return {name: runtime.to_device(tensor, device) for name, tensor in batch.items()} | dict(n=int((y >= 0).sum()))


def loss(net: nn.Module, batch: dict[str, Any], reduction: str) -> Tensor:
    """The model's loss for a micro-batch of `collate`."""
    return net(batch["x"], batch["y"], reduction=reduction, pos=batch.get("pos"), mask=batch.get("mask"))


def shard_across_ranks(rows: list[list], B: int, rt: runtime.Runtime) -> list[list[list]]:
    """This rank's rows of a step, in micro-batches of B. Empty rows are added so that all ranks have equally many."""
    missing = -len(rows) % rt.world_size
    mine = (rows + [[] for _ in range(missing)])[rt.rank :: rt.world_size]
    return [mine[i : i + B] for i in range(0, len(mine), B)]
