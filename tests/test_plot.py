"""plot.py: what it reads from a log, and where it puts the points."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import plot

LOG = """# code=1 torch=2
# data='x.txt' tokenizer='bytes' total_batch_size=100 max_steps=10
0 val 5.5
0 seconds 2
0 train 5.5
5 val 3
5 seconds 12
5 train 3.2
6 train 3.1
10 val 2.5
10 seconds 32
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log.txt").write_text(LOG)
    return tmp_path


def points(folder: Path, x: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Where the curves of Loss.png are drawn, by label."""
    matplotlib.use("Agg")
    seen = {}
    close = plt.close

    def look(figure: plt.Figure) -> None:
        seen.update({line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines})
        close(figure)

    monkeypatch.setattr(plt, "close", look)
    [path] = plot.draw([("run", *plot.read_log(folder))], folder, x, smooth=1)
    assert path.name == "Loss.png" and path.stat().st_size > 1000
    return seen


@pytest.mark.parametrize(
    "x, val, train",
    [
        ("steps", [0, 5, 10], [0, 5, 6]),
        ("tokens", [0, 500, 1000], [0, 500, 600]),
        ("seconds", [2, 12, 32], [2, 12, 16]),
    ],
)
def test_the_axis(
    folder: Path, x: str, val: list[float], train: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = points(folder, x, monkeypatch)
    assert found == {"run, validation": val, "run, training": train}


def test_a_log_without_seconds(folder: Path) -> None:
    text = "\n".join(line for line in LOG.splitlines() if "seconds" not in line)
    (folder / "log.txt").write_text(text)
    with pytest.raises(SystemExit, match="--x=steps"):
        plot.draw([("run", *plot.read_log(folder))], folder, "seconds")


def test_logs_of_fine_tuning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is named by the tokenizer of the model it began from, and no token count is made up."""
    labels = []
    set_ylabel = plt.Axes.set_ylabel
    monkeypatch.setattr(
        plt.Axes, "set_ylabel", lambda self, text: labels.append(text) or set_ylabel(self, text)
    )
    texts = [LOG] + [
        LOG.replace("torch=2", f"torch=2 tokenizer={name}")
        .replace("# data='x.txt' tokenizer='bytes'", header)
        .replace(" total_batch_size=100", "")
        for name in ("gpt2", "bytes")
        for header in ("# checkpoint='out/x'", "# checkpoint='out/x' beta=0.1")
    ]
    for text in texts:
        (folder / "log.txt").write_text(text)
        plot.draw([("run", *plot.read_log(folder))], folder)
    assert labels == ["loss, nats per byte", "loss, nats per token", "loss", "loss, nats per byte", "loss"]
    with pytest.raises(SystemExit, match="--x=steps"):
        plot.draw([("run", *plot.read_log(folder))], folder, "tokens")


def test_a_step_written_twice_counts_once(folder: Path) -> None:
    with open(folder / "log.txt", "a") as file:
        file.write("5 val 2.9\n5 val 2.8")
    curves, constants = plot.read_log(folder)
    assert np.array_equal(curves["val"][0], [0, 5, 10]) and list(curves["val"][1]) == [5.5, 2.8, 2.5]
    assert constants["tokenizer"] == "bytes"
