"""Fresh text of the demo world, as much as is needed, and its entropy."""

import math
import statistics
from pathlib import Path
from random import Random

import numpy as np

from neogpt import data, files
from tools import make_demo, world


def fresh_document(rng: Random) -> str:
    """A description of a random character, or its comparison with another."""
    kind, c = rng.choice([make_demo.description, make_demo.comparison]), rng.choice(world.CHARACTERS)
    return kind(c, rng)


def document_entropy() -> float:
    """The entropy of `fresh_document` in nats; exact, because no two sequences of its choices give the same text."""
    log, mean, n = math.log, statistics.mean, len(world.ATTRIBUTES)
    # a fact about a character is named with probability 0.4, else in one of the other forms, equally likely
    others = mean(log(len(forms) - 1) for forms in world.FACTS.values())
    form = -0.4 * log(0.4) - 0.6 * log(0.6) + 0.6 * others
    # four to seven attributes in any order; the form of the first is given
    description = log(4) + mean(log(math.perm(n, k)) + (k - 1) * form for k in (4, 5, 6, 7))
    # another character, and three of the attributes that differ, in any order
    pairs = [(c, o) for c in world.CHARACTERS for o in world.CHARACTERS if o is not c]
    n_differing = [sum(getattr(c, a) != getattr(o, a) for a in world.ATTRIBUTES) for c, o in pairs]
    comparison = log(len(world.CHARACTERS) - 1) + mean(log(math.perm(k, 3)) for k in n_differing)
    return log(2) + log(len(world.CHARACTERS)) + (description + comparison) / 2


def write_fresh_text(folder: Path, n_train: int, n_val: int, T: int) -> float:
    """Write `fresh_document`s as shards of about n_train and n_val byte tokens; return a lower bound of the loss, nats
    per token: the entropy of a document over its mean length with its gap. No document crosses a multiple of T tokens,
    so a window of T tokens shows whole documents; gaps are filled with end-of-text.
    """
    rng, tokenizer, n = Random(f"{make_demo.SEED} fresh text"), data.get_tokenizer("bytes"), 0
    n_train, n_val, parts, n_documents = n_train // T * T, n_val // T * T, [], 0
    while n <= n_train + n_val:
        ids = data.encode_document(tokenizer, fresh_document(rng))
        gap = -n % T if -n % T < len(ids) else 0
        parts += [np.full(gap, tokenizer.eot_token, np.uint16), ids]
        n, n_documents = n + gap + len(ids), n_documents + 1
    tokens = np.concatenate(parts)
    files.make_folder(folder)
    for name, part in (("val", tokens[: n_val + 1]), ("train", tokens[n_val : n_val + n_train + 1])):
        with files.atomic_write(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, part)
    return document_entropy() * n_documents / n
