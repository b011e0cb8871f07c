"""tools/plot.py: what it reads from a log, and where it draws the points."""

import sys
from pathlib import Path

import harness
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools import plot

LOG = "# code=1 torch=2 tokenizer=bytes\n# data='x.txt' max_steps=10\n# a message with a step: 3 val 9\n0 val 5.5\n"
LOG += "0 tokens 0\n0 seconds 2\n0 train 5.5\n5 val 3\n5 tokens 600\n5 seconds 12\n5 train 3.2\n6 train 3.1\n"
LOG += "10 val 2.5\n10 tokens 1200\n10 seconds 32\n10 train 2.4\n11 train 2.4\n5 val/rewards 1\n5 pass@1 0.5\n"
VAL, GPT2 = (np.array([0, 5]), np.array([3.5, 0.3])), dict(tokenizer="gpt2", hellaswag_data="")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """The axes of the figures that are written, by title."""
    found, savefig = {}, Figure.savefig

    def save(figure: Figure, *args: object, **options: object) -> None:
        found[figure.axes[0].get_title()] = figure.axes[0]
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


def write_log(folder: Path, text: str) -> plot.Run:
    (folder / "log.txt").write_text(text)
    return plot.read_log(folder)


AXES = [("steps", [0, 5, 10], [0, 5, 6, 10, 11]), ("seconds", [2, 12, 32], [2, 12, 16, 32, np.nan])]
AXES += [("tokens", [0, 600, 1200], [0, 600, 720, 1200, np.nan])]  # known up to the last evaluation


@pytest.mark.parametrize("x, val, train", AXES)
def test_horizontal_axis(x: str, val: list, train: list, figures: dict[str, Axes], tmp_path: Path) -> None:
    [path] = plot.draw([write_log(tmp_path, LOG)], tmp_path, x)
    assert path.name == "Loss.png" and b"PNG" in path.read_bytes()[:8]
    found = {line.get_label().split(", ")[1]: line.get_xdata() for line in figures["Loss"].lines}
    np.testing.assert_allclose(found["validation"], val)
    np.testing.assert_allclose(found["training"], train)
    assert {"val/rewards", "pass@1"} < plot.read_log(tmp_path).curves.keys()


def test_training_loss_is_averaged_over_neighboring_steps() -> None:
    steps, losses = np.arange(100), np.arange(100) ** 2
    curves = plot.transform(plot.Run("a", dict(train=(steps, losses)), {}), "steps").curves  # over 1 + 100 // 50
    np.testing.assert_allclose(curves["train"], [(a[:-2] + a[1:-1] + a[2:]) / 3 for a in (steps, losses)])


def test_restarted_run(tmp_path: Path) -> None:
    """Points after the restart are dropped, and later lines and headers replace earlier ones."""
    again = "# code=2 tokenizer=gpt2\n5 val 2.7\n5 val 2.9\n5 train 3.0\n6 train 2.9\n7 val 2.8\n7 lr 6e-\n"
    label, curves, constants = write_log(tmp_path, LOG + again)
    assert label == tmp_path.name and constants["tokenizer"] == "gpt2" and constants["max_steps"] == "10"
    assert list(curves["val"][0]) == [0, 5, 7] and list(curves["val"][1]) == [5.5, 2.9, 2.8]
    assert list(curves["train"][0]) == [0, 5, 6] and list(curves["train"][1]) == [5.5, 3.0, 2.9]
    assert "lr" not in curves  # its only value was cut off


OTHERS = [([GPT2], True, True), ([GPT2 | dict(hellaswag_data="mine.jsonl")], True, False)]
OTHERS += [([GPT2 | dict(hellaswag_rows="100")], True, False), ([GPT2 | dict(checkpoint="out/x")], False, False)]
OTHERS += [([dict(tokenizer="bytes")], False, False)]


@pytest.mark.parametrize("others, val, hella", OTHERS)
def test_gpt2_is_drawn_only_beside_comparable_runs(
    others: list, val: bool, hella: bool, figures: dict[str, Axes], tmp_path: Path
) -> None:
    plot.draw([plot.Run("a", dict(val=VAL, hella=VAL), constants) for constants in (GPT2, *others)], tmp_path)
    assert [line.get_ydata()[0] for line in figures["Loss"].lines[2:]] == [3.2924] * val
    assert [line.get_ydata()[0] for line in figures["HellaSwag"].lines[2:]] == [0.2955, 0.337] * hella + [0.25]


@pytest.mark.parametrize("shift", [0, -3.3])  # the loss of DPO with rpo_alpha can be negative
def test_loss_axis_fits_trained_models(shift: float, figures: dict[str, Axes], tmp_path: Path) -> None:
    losses = dict(val=[10.9, 3.2, np.nan, 2.6, np.inf], train=[10.9, 3.1, np.nan, 2.4])
    curves = {name: (np.arange(len(y)), np.array(y) + shift) for name, y in losses.items()}
    plot.draw([plot.Run("a", curves, {})], tmp_path)
    bottom, top = figures["Loss"].get_ylim()
    assert 2 < bottom - shift < 2.4 and 3.2 < top - shift < 3.8
    plot.draw([plot.Run("a", dict(val=(np.arange(2), np.array([np.inf, np.nan]))), {})], tmp_path)  # all diverged


def test_invalid_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, LOG.replace("tokens", "other"))
    cfg = plot.Config(runs=(str(tmp_path),), out_dir=str(tmp_path))
    harness.refused(plot.main, cfg, "tokens", "--x=steps", x="tokens")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if tensorboard were not installed
    harness.refused(plot.main, cfg, "pip install tensorboard", tensorboard=True)
    harness.refused(plot.main, cfg, "nothing", runs=(str(tmp_path / "nothing"),))
    (tmp_path / "log.txt").write_text("no numbers\n")
    harness.refused(plot.main, cfg, "log.txt")
