"""Rows of prompts and responses, for all stages after pretraining: files, prompt template, masks, and packing."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

from neogpt import files, runtime

SUFFIXES = (".json", ".jsonl", ".parquet")

# names of the fields of a row in common datasets; the first that occurs in the rows is used
ALIASES = dict(turns=("messages", "conversations"), prompt=("instruction", "prompt", "question"))
ALIASES |= dict(context=("context", "input"), response=("response", "output", "completion", "answer"))
ALIASES |= {name: (name,) for name in ("chosen", "rejected", "response_a", "response_b", "preferred")}
ROLES = dict(user="user", human="user", system="system", assistant="assistant", gpt="assistant")


class Row(NamedTuple):
    """An instruction, its context ("" for none), the response, and the earlier turns of the conversation."""

    instruction: str
    context: str
    response: str
    history: tuple[tuple[str, str], ...] = ()  # prompt and response of each earlier turn


def load_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """The rows of .json (a list), .jsonl or .parquet files (a file, folder or pattern; also .gz and .zst), or of a
    dataset on the hub (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT). Raises ValueError or OSError.
    """
    paths, skipped = files.find_files(source, SUFFIXES, split)
    is_local = paths or files.has_suffix(source, SUFFIXES) or Path(source).exists()
    try:
        if not is_local:
            from datasets import load_dataset  # with a lock, so that one rank downloads

            name, *rest = source.split(":")
            rows = load_dataset(name, *rest[:1], split=rest[1] if len(rest) > 1 else split).to_list()
        elif not paths:
            raise ValueError(f"expected {', '.join(SUFFIXES)} files" if Path(source).exists() else "it does not exist")
        else:
            rows = [row for path in paths for row in read_file(path)]
    except Exception as error:  # json, pyarrow, the file system and the hub raise many kinds
        reason = files.one_line(error)
        if is_local:
            raise ValueError(f"cannot read the rows of {source}: {reason}") from error
        raise OSError(f"cannot download {source} ({reason}): check the name and the network, or give a file") from error
    if skipped:
        runtime.print0(f"{source}: files that are not read: {', '.join(path.name for path in skipped)}")
    return rows


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of one file. Raises ValueError if they are not objects with named fields."""
    if files.has_suffix(path, (".parquet",)):
        import pyarrow.parquet

        rows, n_bytes = [], 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            n_bytes += batch.nbytes
            if n_bytes > files.max_unpacked(path):
                raise ValueError(f"{path} unpacks to more than {files.max_unpacked(path):,} bytes")
            rows += batch.to_pylist()
        return rows
    with files.open_binary(path) as file:
        text = file.read().decode("utf-8-sig")  # some programs write a byte order mark
    # not splitlines, which also splits at U+2028 and other characters that JSON strings may contain
    lines = [line for line in text.split("\n") if line.strip()]
    rows = json.loads(text) if files.has_suffix(path, (".json",)) else [json.loads(line) for line in lines]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("the rows must be objects with named fields")
    return rows


def parse_rows(source: str, kinds: Sequence[tuple[str, ...]], parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Call `parse` on each row, with its fields renamed to the keys of ALIASES; rows for which it raises ValueError are
    dropped and counted. kinds: alternative sets of keys. The first set whose fields all occur in the rows is used, with
    the context if the set has a prompt. Raises ValueError if there is no such set or no usable row.
    """
    rows, parsed, dropped = load_rows(source), [], Counter()
    known = {name for row in rows for name, value in row.items() if value is not None}
    names = {key: next((name for name in options if name in known), "") for key, options in ALIASES.items()}
    kind = next((kind for kind in kinds if all(names[key] for key in kind)), None)
    if not kind:
        expected = " or ".join(", ".join("/".join(ALIASES[key]) for key in kind) for kind in kinds)
        raise ValueError(f"{source} has the fields {', '.join(sorted(known)) or '(none)'}: expected {expected}")
    keys = [*kind, "context"] if "prompt" in kind and names["context"] else kind
    for row in rows:
        try:
            parsed.append(parse({key: row.get(names[key]) for key in keys}))
        except ValueError as error:
            dropped[str(error)] += 1
    reasons = ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items())
    if not parsed:
        raise ValueError(f"{source} has no usable row: {reasons}")
    if dropped:
        runtime.print0(f"{source}: {dropped.total():,} of {len(rows):,} rows dropped: {reasons}")
    used = {names[key] for key in keys}
    if unused := Counter(name for row in rows for name, value in row.items() if name not in used and value):
        runtime.print0(f"{source}: unused fields: {', '.join(f'{name} ({n:,} rows)' for name, n in unused.items())}")
    return parsed


def to_text(value: object) -> str:
    """Text; a number as text; "" for null and NaN. Raises ValueError for other values."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"a {type(value).__name__} instead of text")
    return str(value)


def parse_turns(turns: object) -> Row:
    """The last response of a conversation and the turns before it. turns: a list of objects with role and content, or
    from and value; or a transcript, in which a blank line and "Human:" or "Assistant:" begin a turn. Consecutive turns
    without a response are joined. Raises ValueError.
    """
    if isinstance(turns, str):
        _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + turns.strip())
        turns = [dict(role=role, content=text.strip()) for role, text in zip(parts[::2], parts[1::2])]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a conversation that is not a list of turns")
    done, pending = [], []  # (prompt, response) of each turn; prompt texts without a response so far
    for turn in turns:
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        text = to_text(turn.get("content", turn.get("value")))
        if not role:
            raise ValueError("a turn of an unknown role")
        if role != "assistant":
            pending.append(text.strip())
        elif not pending:
            raise ValueError("a response without a prompt")
        else:
            done.append(("\n\n".join(filter(None, pending)), text))
            pending = []
    if not done:
        raise ValueError("a conversation without a response")
    (prompt, response), history = done[-1], done[:-1]
    return Row(prompt, "", response, tuple(history))


def parse_row(fields: dict[str, Any]) -> Row:
    """A row with a prompt, perhaps a context, and a response; or with turns. Raises ValueError."""
    if "turns" in fields:
        row = parse_turns(fields["turns"])
    else:
        prompt, context = (to_text(fields.get(key)).strip() for key in ("prompt", "context"))
        row = Row(prompt, context, to_text(fields["response"]))
    if not row.response.strip():
        raise ValueError("a blank response")
    return row


def read_rows(source: str) -> list[Row]:
    """The rows of a file or a dataset: see `load_rows` and `parse_rows`."""
    return parse_rows(source, [("turns",), ("prompt", "response")], parse_row)


def split_rows(rows: Sequence, prompts: Sequence[str], fraction: float, seed: int) -> tuple[list, list]:
    """The training rows and the held-out rows, which are all rows of about `fraction` of the distinct prompts. Text and
    seed decide for each prompt, so added rows do not move the others. Raises ValueError if there is only one prompt.
    """
    hashes = {p: hashlib.sha256(f"{seed} {p}".encode("utf-8", "surrogatepass")).digest() for p in prompts}
    if len(hashes) < 2:
        raise ValueError(f"all {len(rows)} rows have the same prompt, so none can be held out: give --val_data")
    lowest, highest = min(hashes.values()), max(hashes.values())  # so that both parts have at least one prompt
    held_out = {p for p, h in hashes.items() if h == lowest or h < highest and int.from_bytes(h) < fraction * 2**256}
    train = [row for row, prompt in zip(rows, prompts) if prompt not in held_out]
    return train, [row for row, prompt in zip(rows, prompts) if prompt in held_out]


def prompt_text(instruction: str, context: str = "") -> str:
    """The prompt template: the text before the response. Change TEMPLATE below with it, for exported models."""
    return f"{instruction}\nContext:\n{context}\nResponse:\n" if context else f"{instruction}\nResponse:\n"


# `parse_turns` and `encode_prompt` in Jinja, for export.py; a user's message can have a context beside its content
TEMPLATE = r"""
{%- set ns = namespace(prompt='') -%} {%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- ns.prompt + '\nResponse:\n' + message['content'] + eos_token -}} {%- set ns.prompt = '' -%}
{%- else -%} {%- set text = message['content'] | trim -%}
{%- set text = text + '\nContext:\n' + message['context'] | trim if message['context'] else text -%}
{%- set ns.prompt = ns.prompt + '\n\n' + text if ns.prompt and text else ns.prompt + text -%}
{%- endif -%} {%- endfor -%}
{{- ns.prompt + '\nResponse:\n' if ns.prompt and add_generation_prompt else ns.prompt -}}
"""


def whole_prompt(row: Row) -> str:
    """The text of the earlier turns and the prompt."""
    turns = [prompt_text(prompt) + response for prompt, response in row.history]
    return "\n".join([*turns, prompt_text(row.instruction, row.context)])


class Example(NamedTuple):
    """A prompt and a response as one sequence."""

    ids: np.ndarray  # (n,) int64: prompt, response, end-of-text (unless the response was truncated)
    n_prompt: int  # tokens of the prompt; the loss is on the tokens after them

    @property
    def n_inputs(self) -> int:
        """Positions that the model processes: all ids but the last."""
        return len(self.ids) - 1


def encode_prompt(row: Row, budget: int, tokenizer: tiktoken.Encoding) -> list[int]:
    """The ids of the earlier turns and the prompt. If they exceed `budget` tokens, the oldest turns are left out, then
    the end of the context is cut off; if that is not enough, the result is longer.
    """
    encode, eot = tokenizer.encode_ordinary, tokenizer.eot_token
    turns = [[*encode(prompt_text(prompt)), *encode(response), eot] for prompt, response in row.history]
    ids = encode(prompt_text(row.instruction, row.context))
    while turns and sum(map(len, turns)) + len(ids) > budget:
        del turns[0]
    context_ids = encode(row.context)
    while len(ids) > budget and context_ids:
        context_ids = context_ids[: max(0, len(context_ids) - (len(ids) - budget))]
        context = tokenizer.decode(context_ids).rstrip("\ufffd")  # an incomplete character
        ids = encode(prompt_text(row.instruction, context))
    return [*sum(turns, []), *ids]


def make_example(prompt: list[int], response: str, T: int, tokenizer: tiktoken.Encoding) -> Example | None:
    """The example, truncated to T input tokens; None if no target is left."""
    # prompt and response are tokenized separately, so no token contains parts of both
    ids = [*prompt, *tokenizer.encode_ordinary(response), tokenizer.eot_token][: T + 1]
    return Example(np.array(ids, dtype=np.int64), len(prompt)) if len(ids) > len(prompt) else None


def pack(examples: Sequence[Example], T: int) -> list[list[Example]]:
    """Examples -> bins of at most T input tokens (first-fit decreasing). Longer ones are alone; with T=0 all are."""
    bins = [[] for _ in examples]
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        next(b for b in bins if not b or sum(e.n_inputs for e in [*b, example]) <= T).append(example)
    return [b for b in bins if b]


def collate(bins: Sequence[Sequence[Example]], device: torch.device, width: int = 1) -> dict[str, Any]:
    """B bins of examples -> a micro-batch of B sequences, padded on the right. Returns x, y (B, W) int64, with y = -100
    where there is no loss, and n, the number of targets. W is the length of the longest bin, at least `width`. If width
    is given or a bin has several examples, also returns pos (B, W), which restarts at 0 in each example, and mask
    (B, 1, W, W), causal within each example.
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
