"""Preference data for dpo.py: pairs of responses to a prompt, one chosen and one rejected."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch

from neogpt import chat, runtime
from neogpt.chat import Example


class Pair(NamedTuple):
    """A pair as sequences, and the reference log-probabilities of the two responses, in nats."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (0.0, 0.0)


def longest(pair: Pair) -> int:
    """Tokens of the longer sequence."""
    return max(len(pair.chosen.ids), len(pair.rejected.ids))


def read(source: str, rt: runtime.Runtime) -> list[tuple[str, str, str]]:
    """The (prompt, chosen, rejected) texts of a file or a dataset. Unusable pairs are dropped and counted.

    Rows have prompt, response_a, response_b and preferred ("A" or "B"), or prompt, chosen and rejected.
    """
    rows = chat.load_rows(source, rt)
    kinds = [("prompt", "response_a", "response_b", "preferred"), ("prompt", "chosen", "rejected")]
    pairs, dropped = [], Counter()
    for texts in chat.read_texts(rows, kinds, source):
        prompt, a, b, preferred = [*texts, "A"][:4]
        if not a.strip() or not b.strip():
            dropped["a blank response"] += 1
        elif a == b:
            dropped["equal responses"] += 1
        elif preferred not in ("A", "B"):
            dropped["a preference other than A or B"] += 1
        else:
            pairs.append((prompt.strip(), *((a, b) if preferred == "A" else (b, a))))
    if dropped:
        reasons = ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items())
        runtime.print0(f"{source}: {dropped.total():,} of {len(rows):,} pairs dropped: {reasons}")
    if len({prompt for prompt, _, _ in pairs}) < 2:
        raise ValueError(f"{source} has {len(pairs)} usable pairs: at least two different prompts are needed")
    return pairs


def tokenize(pairs: Sequence[tuple[str, str, str]], T: int, tokenizer: tiktoken.Encoding, source: str) -> list[Pair]:
    """Pairs -> sequences of at most T input tokens. Truncated and dropped pairs are counted and reported."""
    out, n_truncated = [], 0
    for prompt, *responses in pairs:
        ids = chat.encode_prompt(prompt, "", T, tokenizer)
        chosen, rejected = (chat.make_example(ids, text, T, tokenizer) for text in responses)
        # truncated to the same tokens, a pair has no gradient
        if chosen and rejected and not np.array_equal(chosen.ids, rejected.ids):
            n_truncated += not chosen.ids[-1] == rejected.ids[-1] == tokenizer.eot_token
            out.append(Pair(chosen, rejected))
    if len(out) < len(pairs):
        runtime.print0(f"{source}: {len(pairs) - len(out):,} pairs dropped: the responses do not fit into T={T}")
    if n_truncated:
        runtime.print0(f"{source}: {n_truncated:,} pairs with a response truncated to T={T} tokens")
    if not out:
        raise ValueError(f"no pair of {source} is usable with T={T}")
    return out


def collate(pairs: Sequence[Pair], B: int, rt: runtime.Runtime) -> list[dict[str, Any]]:
    """This rank's micro-batches of B pairs, longest first. One forward pass processes chosen and rejected together."""
    batches = []
    for rows in chat.shard_across_ranks([[pair] for pair in sorted(pairs, key=longest, reverse=True)], B, rt):
        chosen = [[pair.chosen for pair in row] for row in rows]
        rejected = [[pair.rejected for pair in row] for row in rows]
        batch = chat.collate([*chosen, *rejected], rt.device)  # (2B, W)
        reference = [pair.reference for row in rows for pair in row] + [(0.0, 0.0)] * rows.count([])
        pair_mask = [float(len(row)) for row in rows]  # 0 for the empty rows of a rank without enough pairs
        batch |= dict(reference=torch.tensor(reference, device=rt.device))  # (B, 2)
        batch |= dict(pair_mask=torch.tensor(pair_mask, device=rt.device), n=int(sum(pair_mask)))  # (B,)
        batches.append(batch)
    return batches
