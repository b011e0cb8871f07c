"""Fixtures that all tests share."""

import random
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import torch

from neogpt import data


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, and much slower where cores are shared."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def server() -> Iterator[harness.ForkServer]:
    """Starts runs of the training scripts in other processes."""
    with harness.fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 40 documents of random words, about 12 kB."""
    rng, words = random.Random(0), "the fox sees a red house and sleeps über night runs .".split()
    documents = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text(f"\n{data.EOT}\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def printed(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """printed.messages and printed.text are what `print0` prints during a test."""
    caplog.set_level("INFO", "neogpt")
    return caplog
