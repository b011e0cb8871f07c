"""Preference data for dpo.py: pairs of responses to a prompt, one chosen and one rejected."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch

from neogpt import chat, runtime


class Pair(NamedTuple):
    """A prompt with its chosen and with its rejected response: pair[:2] are both examples."""

    chosen: chat.Example
    rejected: chat.Example
    reference: tuple[float, float] = (0.0, 0.0)  # log-probabilities of the responses by the reference model, nats


def longest(pair: Pair) -> int:
    """Tokens of the longer sequence."""
    return max(len(pair.chosen.ids), len(pair.rejected.ids))


def read(source: str, rt: runtime.Runtime) -> list[tuple[str, str, str]]:
    """The (prompt, chosen, rejected) texts of a file or a dataset. Unusable pairs are dropped and counted."""
    rows = chat.load_rows(source, rt)
    kinds = [("prompt", "response_a", "response_b", "preferred"), ("prompt", "chosen", "rejected")]
    pairs, dropped = [], Counter()
    for texts in chat.read_texts(rows, kinds, source):
        prompt, a, b, preferred = [*texts, "A"][:4]  # rows without `preferred`: a is the chosen response
        if not a.strip() or not b.strip():
            dropped["a blank response"] += 1
        elif a == b:
            dropped["equal responses"] += 1
        elif preferred not in ("A", "B"):
            dropped["a preference other than A or B"] += 1
        else:
            chosen, rejected = (a, b) if preferred == "A" else (b, a)
            pairs.append((prompt.strip(), chosen, rejected))
    if dropped:
        reasons = ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items())
        runtime.print0(f"{source}: {dropped.total():,} of {len(rows):,} pairs dropped: {reasons}")
    if len({prompt for prompt, _, _ in pairs}) < 2:
        raise ValueError(f"{source} has {len(pairs)} usable pairs: at least two different prompts are needed")
    return pairs


def tokenize(pairs: Sequence[tuple[str, str, str]], T: int, tokenizer: tiktoken.Encoding, source: str) -> list[Pair]:
    """Pairs of texts -> examples of at most T input tokens. Truncated and dropped pairs are counted and reported."""
    out = []
    for prompt, *responses in pairs:
        ids = chat.encode_prompt(prompt, "", T, tokenizer)
        chosen, rejected = (chat.make_example(ids, text, T, tokenizer) for text in responses)
        # a pair whose responses are equal after truncation has no gradient
        if chosen and rejected and not np.array_equal(chosen.ids, rejected.ids):
            out.append(Pair(chosen, rejected))
    if len(out) < len(pairs):
        runtime.print0(f"{source}: {len(pairs) - len(out):,} pairs dropped: the responses do not fit into T={T}")
    if n_truncated := sum(any(e.ids[-1] != tokenizer.eot_token for e in pair[:2]) for pair in out):
        runtime.print0(f"{source}: {n_truncated:,} pairs with a response truncated to T={T} tokens")
    if not out:
        raise ValueError(f"no pair of {source} is usable with T={T}")
    return out


def collate(pairs: Sequence[Pair], B: int, rt: runtime.Runtime) -> list[dict[str, Any]]:
    """This rank's micro-batches of B pairs, longest first: `chat.collate` of B chosen, then B rejected examples.

    Each has also reference (B, 2), pair_mask (B,), which is 0 for an empty pair (see shard_across_ranks), and n, the
    number of pairs.
    """
    batches = []
    for part in chat.shard_across_ranks([[pair] for pair in sorted(pairs, key=longest, reverse=True)], B, rt):
        chosen = [[pair.chosen for pair in row] for row in part]
        rejected = [[pair.rejected for pair in row] for row in part]
        batch = chat.collate([*chosen, *rejected], rt.device)  # (2B, W), for a single forward pass
        reference = [row[0].reference if row else (0.0, 0.0) for row in part]
        pair_mask = [float(len(row)) for row in part]
        batch["reference"] = torch.tensor(reference, device=rt.device)
        batch["pair_mask"] = torch.tensor(pair_mask, device=rt.device)
        batches.append(batch | dict(n=int(sum(pair_mask))))
    return batches
