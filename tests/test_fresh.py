"""tools/fresh.py: the entropy of the text, against the generator's own draws, and how documents are placed."""

import math
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import numpy as np

from tools import fresh


class Uniform(float):
    """A uniform number that counts the information of being compared."""

    def __lt__(self, p: float) -> bool:
        result = float(self) < p
        CountingRandom.path.append((result, p if result else 1 - p))
        return result


class CountingRandom(Random):
    """Counts the information of every draw of a document, and keeps the draws."""

    path: list[tuple] = []

    def choice(self, values: list) -> object:
        self.path.append((i := self.randrange(len(values)), 1 / len(values)))
        return values[i]

    def sample(self, values: list, k: int) -> list:
        rest = [*values]
        return [rest.pop(rest.index(self.choice(rest))) for _ in range(k)]

    def randint(self, a: int, b: int) -> int:
        return self.choice(range(a, b + 1))

    def random(self) -> Uniform:
        return Uniform(super().random())


def test_the_entropy_is_that_of_the_draws_and_texts_show_all_draws() -> None:
    rng, nats, paths = CountingRandom(0), [], {}
    for _ in range(20_000):
        path = CountingRandom.path = []
        text = fresh.fresh_document(rng)
        nats.append(-sum(math.log(p) for _, p in path))
        assert paths.setdefault(text, path) == path, text
    assert len(paths) < 19_000  # so texts were repeated
    assert abs(fmean(nats) - fresh.document_entropy()) < 3 * stdev(nats) / math.sqrt(len(nats))


def test_windows_show_whole_documents(tmp_path: Path) -> None:
    T = 192
    low = fresh.write_fresh_text(tmp_path, 50_000, 10_000, T)
    train, val = (np.load(tmp_path / f"{split}.npy") for split in ("train", "val"))
    assert (len(train), len(val)) == (50_000 // T * T + 1, 10_000 // T * T + 1)
    n_documents = 0
    for tokens in (train, val):
        assert tokens[-1] == 256 and tokens.dtype == np.uint16
        for window in tokens[:-1].reshape(-1, T):
            assert window[0] == 256 and window[1] != 256
            documents = "".join(chr(token) for token in window).split(chr(256))[1:]
            documents = [text for text in documents if text]  # without the gap
            assert all(text.endswith(".") and text[0].isupper() for text in documents)
            n_documents += len(documents)
    rate = fresh.document_entropy() * n_documents / (len(train) + len(val))
    assert abs(low / rate - 1) < 0.01  # the last documents are in none of the shards
