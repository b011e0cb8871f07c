"""Fixtures that all tests share."""

from collections.abc import Iterator

import harness
import pytest
import torch


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


@pytest.fixture
def printed(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """printed.messages and printed.text are what `print0` prints during a test."""
    caplog.set_level("INFO", "neogpt")
    return caplog
