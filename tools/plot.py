"""Draw the loss and HellaSwag curves of one run, or compare several runs, from their log.txt.

    python -m tools.plot                     # out/gpt2 -> Images/Loss.png, Images/Hellaswag.png
    python -m tools.plot demo                # out/demo
    python -m tools.plot --runs out/adamw out/muon --x=tokens

Published results are shown if all runs pretrain with the GPT-2 tokenizer and, for HellaSwag, scored all its rows.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from neogpt import config, files, track

# Validation loss on the first shard; HellaSwag "per token" in completion style (GPT-3: its appendix H).
REFERENCES = {"val": {"GPT-2 124M on FineWeb-Edu": 3.2924}, "hella": {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}}
STYLE = {"font.size": 12, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2, "lines.markersize": 4}


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ("out/gpt2",)  # out_dirs or log files, one curve each
    x: Literal["steps", "tokens", "seconds"] = "steps"  # horizontal axis
    out_dir: str = "Images"  # folder of Loss.png and Hellaswag.png
    tensorboard: bool = False  # instead of drawing, write all values beside each log for TensorBoard


CONFIGS = {"gpt2": Config(), "demo": Config(runs=("out/demo",))}


class Run(NamedTuple):
    """The content of a log.txt."""

    label: str  # the name of its folder
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # name: (steps, values), sorted by step
    constants: dict[str, str]  # of the last start


def read_log(path: str | Path) -> Run:
    """Read a log.txt, given as the file or its folder. If a step was logged twice, the later line counts."""
    path = Path(path, "log.txt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no log in {path}: give the out_dir of a run or its log.txt")
    points: dict[str, dict[int, float]] = {"train": {}}
    constants = {}
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # _: "", or a line that was cut off
    for line in lines:
        if re.match("# (code|data|checkpoint)=", line):
            constants |= dict(re.findall(r"(\w+)='?([^\s']*)", line))
        elif match := re.fullmatch(r"(\d+) (\S+) (\S+)", line):
            step, name = int(match[1]), match[2]
            if name == "train" and step in points["train"]:  # the run restarted from this step: drop later points
                points = {n: {s: v for s, v in p.items() if s <= step} for n, p in points.items()}
            with suppress(ValueError):  # a line that was cut off before a restart
                points.setdefault(name, {})[step] = float(match[3])
    curves = {name: tuple(map(np.array, zip(*sorted(p.items())))) for name, p in points.items() if p}
    if not curves:
        raise ValueError(f"{path} has no lines of the form `step name value`: it is not the log of a run")
    return Run(path.resolve().parent.name, curves, constants)


def transform(run: Run, x: str) -> Run:
    """The run with curves over x instead of steps, and the training loss averaged over 2 % of the steps."""
    curves = dict(run.curves)
    if "train" in curves:
        n = 1 + len(curves["train"][0]) // 50
        curves["train"] = tuple(np.convolve(array, np.ones(n) / n, "valid") for array in curves["train"])
    if x != "steps":
        if x not in curves:
            raise ValueError(f"the log of {run.label} has no {x}: use --x=steps")
        # only evaluations log tokens and seconds: interpolate, and end each curve at the last evaluation
        curves = {n: (np.interp(steps, *curves[x], right=np.nan), v) for n, (steps, v) in curves.items()}
    return run._replace(curves=curves)


def draw(runs: list[Run], folder: str | Path, x: str = "steps") -> list[Path]:
    """Write Loss.png and, if a run was scored on HellaSwag, Hellaswag.png into `folder`; return their paths."""
    import matplotlib
    from matplotlib.figure import Figure

    runs, paths = [transform(run, x) for run in runs], []
    like_gpt2 = all(c.get("tokenizer") == "gpt2" and "checkpoint" not in c for _, _, c in runs)
    other_questions = any(c.get("hellaswag_data") or c.get("hellaswag_rows", "None") != "None" for _, _, c in runs)
    loss = "loss" if any("beta" in c for _, _, c in runs) else "loss (nats per token)"  # of DPO: per pair
    loss = "loss; validation: minus the reward" if any("reward" in c for _, _, c in runs) else loss  # of GRPO
    for name, title, ylabel in (("val", "Loss", loss), ("hella", "HellaSwag", "accuracy (acc_norm)")):
        if not any(name in run.curves for run in runs):
            continue
        with matplotlib.rc_context(STYLE):
            axes = Figure(figsize=(8, 5)).subplots()
            axes.margins(y=0.02)
            for i, (label, curves, _) in enumerate(runs):
                if name in curves:
                    axes.plot(*curves[name], f"C{i}o-", label=f"{label}, validation" if name == "val" else label)
                if name == "val" and "train" in curves:
                    axes.plot(*curves["train"], f"C{i}", alpha=0.45, lw=1.2, zorder=1, label=f"{label}, training")
            if name == "val":  # without the first evaluation: an untrained model's loss would flatten the curves
                losses = np.concatenate([run.curves["val"][1][1:] for run in runs if "val" in run.curves])
                axes.set_ylim(top=max((y + 0.15 * abs(y) for y in losses if np.isfinite(y)), default=None))
            if like_gpt2 and not (name == "hella" and other_questions):
                for style, (model, value) in zip(("--", "-."), REFERENCES[name].items()):
                    axes.axhline(value, color="0.3", linestyle=style, linewidth=1.2, label=f"{model}, {value}")
            if name == "hella":
                axes.axhline(0.25, color="0.6", linestyle=":", linewidth=1.2, label="chance, 0.25")
            axes.set(title=title, xlabel=x, ylabel=ylabel)
            axes.legend()
            paths.append(files.make_folder(folder) / f"{title.capitalize()}.png")
            with files.atomic_write(paths[-1]) as temporary:
                axes.figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    return paths


def main(cfg: Config) -> None:
    """Read the logs and draw the figures, or convert the logs."""
    if not cfg.tensorboard:
        return print(*draw([read_log(path) for path in cfg.runs], cfg.out_dir, cfg.x), sep="\n")
    for path, run in [(Path(path), read_log(path)) for path in cfg.runs]:
        try:
            send, close = track.connect("tensorboard", path if path.is_dir() else path.parent, 0, "", {})
        except ImportError as error:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        for name, curve in run.curves.items():
            for step, value in zip(*curve):
                send(int(step), {name: value})
        close()


if __name__ == "__main__":
    config.run(main, CONFIGS)
