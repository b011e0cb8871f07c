"""Draw the curves of one run, or of several to compare, from their log.txt.

    python plot.py                              # out/gpt2 -> Images/Loss.png, Images/Hellaswag.png
    python plot.py demo                         # out/demo
    python plot.py --runs out/adamw out/muon --labels AdamW Muon --x=tokens

GPT-2 and GPT-3 124M are drawn beside runs with the GPT-2 tokenizer: a loss per byte, or the demo's own
HellaSwag, cannot be compared with theirs. Chance is 25 %.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from files import make_folder, written_whole
from training import check_least, parse

# FineWeb-Edu's first shard; HellaSwag in completion style. GPT-3: the paper, appendix H.
GPT2_LOSS = 3.2924
HELLASWAG = {"GPT-3 124M": 0.337, "GPT-2 124M": 0.2955}


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ("out/gpt2",)  # out_dirs of runs, or log files; each becomes a curve
    labels: tuple[str, ...] = ()  # their names in the legend; none: those of the folders
    x: Literal["steps", "tokens", "seconds"] = "steps"  # the horizontal axis; tokens for different batches
    smooth: int = 50  # steps over which the training loss is averaged; 1: none
    out_dir: str = "Images"  # where Loss.png and Hellaswag.png go


CONFIGS = {"gpt2": Config(), "demo": Config(runs=("out/demo",), smooth=20)}

Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def read_log(path: str | Path) -> tuple[Curves, dict[str, str]]:
    """A log.txt -> its curves, name: (steps, values), sorted by step, and the constants of its last start.

    A run that was continued has written some steps twice; the later line counts. Torn lines are passed over.
    """
    path = Path(path) / "log.txt" if Path(path).is_dir() else Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SystemExit(
            f"cannot read {path} ({error.strerror}): give the out_dir of a run, or its log.txt"
        ) from error
    points: dict[str, dict[int, float]] = {}
    constants: dict[str, str] = {}
    reached = -1
    for line in lines:
        if re.match("# (code|torch|data|checkpoint)=", line):
            constants |= dict(re.findall(r"(\w+)='?([^\s']*)", line))
        elif match := re.fullmatch(r"(\d+) (\w+) (\S+)", line):
            step, name = int(match[1]), match[2]
            if name == "train" and step <= reached:  # begun again, there: what came after was another run
                points = {n: {s: v for s, v in c.items() if s <= step} for n, c in points.items()}
            reached = step if name == "train" else reached
            with contextlib.suppress(ValueError):  # torn in the middle of its number
                points.setdefault(name, {})[step] = float(match[3])
    if not points:
        raise SystemExit(f"{path} holds no lines of the form `step name value`")
    curves = {name: tuple(map(np.array, zip(*sorted(values.items())))) for name, values in points.items()}
    return curves, constants


def smoothed(steps: np.ndarray, values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each n neighbouring values, at the middle of their steps."""
    n = min(n, len(values))
    window = np.ones(n) / n
    return np.convolve(steps, window, "valid"), np.convolve(values, window, "valid")


def draw(
    runs: list[tuple[str, Curves, dict[str, str]]], folder: Path, x: str = "steps", smooth: int = 50
) -> list[Path]:
    """Write Loss.png and, where a run has been scored, Hellaswag.png into `folder`; return their paths.

    runs: (label, curves, constants) of each, the last two as `read_log` returns them. x: "steps", "tokens" or
    "seconds" of training, evaluations included.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    plt.rcParams.update({"grid.alpha": 0.25, "legend.frameon": False, "lines.linewidth": 2})
    logged = [constants for _, _, constants in runs]
    theirs = not any(c.get("hella_data") for c in logged)  # HellaSwag's own rows
    comparable = all(c.get("tokenizer") == "gpt2" and "checkpoint" not in c for c in logged)  # pretraining
    unit = ""
    for tokenizer, name in (("gpt2", "token"), ("bytes", "byte")):
        if all(c.get("tokenizer") == tokenizer and "beta" not in c for c in logged):  # dpo.py's is of pairs
            unit = f", nats per {name}"

    def place(steps: np.ndarray, curves: Curves, constants: dict[str, str]) -> np.ndarray:
        if x == "seconds" and "seconds" not in curves:
            raise SystemExit("a log that tells no seconds, of an older run: take --x=steps or --x=tokens")
        if x != "steps" and x in curves:
            return np.interp(steps, *curves[x])
        if x == "tokens" and "total_batch_size" not in constants:
            raise SystemExit("a log that tells no tokens a step, of fine-tuning: take --x=steps")
        return steps * int(constants["total_batch_size"]) if x == "tokens" else steps

    paths = []
    for title, name, file in (("Loss", "val", "Loss.png"), ("HellaSwag", "hella", "Hellaswag.png")):
        drawn = [(number, *run) for number, run in enumerate(runs) if name in run[1]]
        if not drawn:
            continue
        figure, axes = plt.subplots(figsize=(8, 5))
        for number, label, curves, constants in drawn:
            steps, values = curves[name]
            what = f"{label}, validation" if name == "val" else label
            style = dict(color=f"C{number}", marker="o", markersize=4)
            axes.plot(place(steps, curves, constants), values, **style, label=what)
            if name == "val" and "train" in curves:
                steps, values = smoothed(*curves["train"], smooth)
                if x in curves:  # known up to the last validation
                    known = steps <= curves[x][0][-1]
                    steps, values = steps[known], values[known]
                style = dict(color=f"C{number}", alpha=0.45, linewidth=1.2, zorder=1)
                axes.plot(place(steps, curves, constants), values, **style, label=f"{label}, training")
        if name == "val":
            axes.set_ylabel(f"loss{unit}")
            if comparable:
                axes.axhline(
                    GPT2_LOSS, color="0.3", linestyle="--", linewidth=1.2, label=f"GPT-2 124M, {GPT2_LOSS}"
                )
            # the untrained loss, near ln(vocabulary), would press the rest of the curve flat
            losses = [curves["val"][1] for _, _, curves, _ in drawn]
            shown = np.concatenate([values[1:] if len(values) > 1 else values for values in losses])
            trained = [smoothed(*curves["train"], smooth)[1] for *_, curves, _ in drawn if "train" in curves]
            shown, lowest = (x[np.isfinite(x)] for x in (shown, np.concatenate([shown, *trained])))
            if len(shown):
                low, high = lowest.min(), shown.max()
                axes.set_ylim(bottom=low - 0.1 * abs(low), top=high + 0.15 * abs(high))
        else:
            axes.set_ylabel("HellaSwag accuracy, acc_norm")
            for (reference, accuracy), style in zip(
                HELLASWAG.items() if comparable and theirs else [], ("--", "-.")
            ):
                axes.axhline(
                    accuracy, color="0.3", linestyle=style, linewidth=1.2, label=f"{reference}, {accuracy}"
                )
            axes.axhline(0.25, color="0.6", linestyle=":", linewidth=1.2, label="chance, 0.25")
        axes.set_xlabel(x)
        axes.set_title(title)
        axes.legend()
        paths.append(folder / file)
        make_folder(folder)
        with written_whole(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)
    return paths


def main(cfg: Config) -> None:
    """Read the logs, draw the figures."""
    check_least(cfg, 1, "smooth")
    labels = cfg.labels or tuple(
        Path(run).parent.name if run.endswith(".txt") else Path(run).name for run in cfg.runs
    )
    if len(labels) != len(cfg.runs):
        raise SystemExit(f"{len(labels)} labels for {len(cfg.runs)} runs")
    for path in draw(
        [(label, *read_log(run)) for label, run in zip(labels, cfg.runs)],
        Path(cfg.out_dir),
        cfg.x,
        cfg.smooth,
    ):
        print(path)


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
