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


def axes_of(runs: list, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, plt.Axes]:
    """The axes that are drawn, by title; training losses are not smoothed."""
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: seen.update({figure.axes[0].get_title(): figure.axes[0]}))
        plot.draw(runs, folder, smooth=1)
    for axes in seen.values():
        plt.close(axes.figure)
    return seen


CURVES = {name: (np.array([0, 5]), np.array([3.5, 0.3])) for name in ("val", "hella")}
PRETRAINED = dict(tokenizer="gpt2")
BYTES = dict(tokenizer="bytes")
TUNED = dict(tokenizer="gpt2", checkpoint="out/x")


@pytest.mark.parametrize(
    "runs, comparable",
    [
        ([PRETRAINED], True),
        ([PRETRAINED | dict(hella_data="mine.jsonl")], True),
        ([PRETRAINED, PRETRAINED], True),
        ([BYTES], False),
        ([TUNED], False),
        ([PRETRAINED, BYTES], False),
        ([TUNED, PRETRAINED], False),
    ],
)
def test_gpt2_stands_only_beside_runs_that_can_be_compared_with_it(
    runs: list, comparable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = axes_of([("run", CURVES, constants) for constants in runs], tmp_path, monkeypatch)
    lines = {
        title: {line.get_label().split(",")[0]: line.get_ydata()[0] for line in axes.lines[len(runs) :]}
        for title, axes in found.items()
    }
    same_rows = not any(constants.get("hella_data") for constants in runs)
    others = {"GPT-3 124M": 0.337, "GPT-2 124M": 0.2955} if comparable and same_rows else {}
    assert lines == dict(
        Loss={"GPT-2 124M": 3.2924} if comparable else {}, HellaSwag=others | dict(chance=0.25)
    )


def test_smoothing() -> None:
    steps, values = np.array([0, 5, 6, 9]), np.array([1.0, 3.0, 2.0, 0.0])
    for n, expected in ((1, [steps, values]), (2, [[2.5, 5.5, 7.5], [2, 2.5, 1]]), (50, [[5], [1.5]])):
        for got, mean in zip(plot.smoothed(steps, values, n), expected):
            np.testing.assert_allclose(got, mean)


def test_untrained_and_infinite_losses_do_not_press_the_curve_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = (np.arange(5), np.array([10.9, 3.2, np.nan, 2.6, np.inf]))
    train = (np.arange(4), np.array([10.9, 3.1, np.nan, 2.4]))
    axes = axes_of([("run", dict(val=val, train=train), {})], tmp_path, monkeypatch)["Loss"]
    bottom, top = axes.get_ylim()
    assert 2 < bottom < 2.4 and 3.2 < top < 4
    lost = (np.arange(2), np.array([np.inf, np.nan]))
    assert axes_of([("run", dict(val=lost, train=lost), {})], tmp_path, monkeypatch).keys() == {"Loss"}


def test_losses_below_zero_stay_in_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = (np.arange(4), np.array([0.7, -0.4, -0.6, -0.9]))
    axes = axes_of([("run", dict(val=val, train=val), {})], tmp_path, monkeypatch)["Loss"]
    bottom, top = axes.get_ylim()
    assert bottom < -0.9 and -0.4 < top


def test_a_run_has_one_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one before it has no HellaSwag."""
    unscored = {"val": CURVES["val"]}
    found = axes_of([("a", unscored, {}), ("b", CURVES, {})], tmp_path, monkeypatch)
    colours = {title: {line.get_label(): line.get_color() for line in found[title].lines} for title in found}
    assert colours["HellaSwag"]["b"] == colours["Loss"]["b, validation"] != colours["Loss"]["a, validation"]


@pytest.mark.parametrize("x", ["seconds", "tokens"])
def test_training_is_drawn_as_far_as_the_axis_is_known(
    x: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "log.txt").write_text(LOG.replace("seconds", x) + "10 train 2.4\n11 train 2.4\n")
    found = points(folder, x, monkeypatch)  # tokens as logged, whatever a step has now
    assert found == {"run, validation": [2, 12, 32], "run, training": [2, 12, 16, 32]}


def test_a_run_begun_again_hides_what_came_after(folder: Path) -> None:
    with open(folder / "log.txt", "a") as file:
        file.write("5 val 2.9\n5 train 3.0\n6 train 2.9\n7 val 2.8\n7 lr 6e-\n")  # and a torn line
    curves, _ = plot.read_log(folder)
    assert {name: list(steps) for name, (steps, _) in curves.items()} == dict(
        val=[0, 5, 7], seconds=[0, 5], train=[0, 5, 6]
    )
    assert list(curves["val"][1]) == [5.5, 2.9, 2.8] and list(curves["train"][1]) == [5.5, 3.0, 2.9]


def test_a_step_written_twice_counts_once(folder: Path) -> None:
    with open(folder / "log.txt", "a") as file:
        file.write("5 val 2.9\n5 val 2.8")
    curves, constants = plot.read_log(folder)
    assert np.array_equal(curves["val"][0], [0, 5, 10]) and list(curves["val"][1]) == [5.5, 2.8, 2.5]
    assert constants["tokenizer"] == "bytes"
