"""A scaling-law study: train models of several sizes for several lengths, fit L(N, D) = E + A / N^alpha + B / D^beta,
and predict compute-optimal models and the loss of a held-out run.

    python -m tools.scaling demo     # new text of the demo world, whose entropy is known; CPU
    python -m tools.scaling --launch="torchrun --nproc_per_node=8"     # depths 4 to 12 on the shards of fineweb.py

Each size is trained with several learning rates for the shortest length. The run with the best one is continued to the
next length from its last checkpoint before the decay (`train_gpt2.py --branch_from`), and so on: all lengths together
cost 1.2 times the longest. Results are read from the log.txt of the runs. The same command continues an interrupted
study, also with more sizes, learning rates or lengths. Writes scaling.json and Scaling.png.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt2
from neogpt import config, data, files, model
from tools import fit, fresh, plot


@dataclass(frozen=True)
class Config:
    train: str = "gpt2 --optimizer=muon"  # arguments of train_gpt2.py that all runs share
    sizes: tuple[str, ...] = ("d4", "d6", "d8", "d10", "d12")  # names in SIZES of neogpt/model.py, smallest first
    lengths: tuple[int, ...] = (1000, 2000, 4000, 8000)  # optimizer steps, multiples of 10, shortest first
    max_lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # peak learning rates to try at the shortest length, for each size
    held_out: config.PositiveInt = 2  # test: train the largest size for this many times the longest length; 1: no test
    fresh_tokens: config.NonNegativeInt = 0  # size of a new text of the demo world to train on; 0: --data of `train`
    out_dir: str = "out/scaling"  # folder of the runs, scaling.json and Scaling.png
    launch: str = ""  # command in front of train_gpt2.py, such as torchrun; "": this Python
    jobs: config.PositiveInt = 1  # runs at the same time, each of another size


DEMO = Config(
    train="demo --T=192 --total_batch_size=576 --B=3 --val_tokens=131072 --device=cpu --precision=fp32",
    sizes=("demo-w24", "demo-w32", "demo-w48", "demo-w64", "demo-w96"),
    max_lrs=(3.5e-3, 7e-3, 1.4e-2),
    fresh_tokens=16_000 * 576,
    out_dir="out/scaling-demo",
    jobs=2,  # on two cores: models this small are fastest on one thread each
)
CONFIGS = {"gpt2": Config(), "demo": DEMO}


class Point(NamedTuple):
    """One finished run."""

    folder: str
    max_lr: float
    steps: int
    N: float  # parameters, counted as FLOPs per token / 6: matrices, head and attention
    D: float  # tokens
    loss: float  # final validation loss, nats per token


def check(cfg: Config, base: train_gpt2.Config) -> None:
    """Raise ValueError for the first constant that is out of range."""
    if unknown := {*cfg.sizes} - {*model.SIZES}:
        raise ValueError(f"--sizes {min(unknown)}: expected names of {', '.join(model.SIZES)}")
    if (n := len(cfg.sizes) * len(cfg.lengths)) < 6 or not cfg.max_lrs:
        raise ValueError(f"{n} runs with --max_lrs {cfg.max_lrs}: expected six --sizes x --lengths or more, and a rate")
    increasing = [*cfg.lengths] == sorted({*cfg.lengths})
    if not increasing or any(steps % 10 for steps in cfg.lengths) or 0.8 * cfg.lengths[0] < base.warmup_steps:
        expected = f"increasing multiples of 10 from {1.25 * base.warmup_steps:g} on, because of --warmup_steps"
        raise ValueError(f"--lengths {cfg.lengths}: expected {expected}")
    if 0 < cfg.fresh_tokens < (longest := cfg.held_out * cfg.lengths[-1] * base.total_batch_size):
        raise ValueError(f"--fresh_tokens={cfg.fresh_tokens}: the longest run needs {longest:,}")


def final_loss(folder: str, steps: int, base: train_gpt2.Config) -> float | None:
    """The final loss of a run; None if it is not finished. Raises ValueError if its training had other constants."""
    path = Path(folder, "log.txt")
    log = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    log = log[max(0, log.rfind("# data=")) :]  # since the last start
    names = ("data", "tokenizer", "T", "total_batch_size", "optimizer", "min_lr_frac", "warmup_steps", "weight_decay")
    for name in (*names, "beta1", "beta2", "eps", "momentum", "grad_clip", "seed", "val_tokens"):
        if "# data=" in log and f" {name}={vars(base)[name]!r} " not in log:
            raise ValueError(f"{folder} was not trained with {name}={vars(base)[name]!r}: use another --out_dir")
    losses = re.findall(rf"^{steps} val (\S+)\n", log, re.M)
    return float(losses[-1]) if losses else None


def train(cfg: Config, base: train_gpt2.Config, size: str, steps: int, max_lr: float, start: Point | None) -> Point:
    """Do one run, unless it is finished. start: the shorter run that it continues. Raises ValueError if it fails."""
    folder = f"{cfg.out_dir}/{size}-{max_lr:g}-{steps}"
    command = [*(shlex.split(cfg.launch) or [sys.executable]), train_gpt2.__file__, *shlex.split(cfg.train)]
    command += [f"--data={base.data}", f"--out_dir={folder}", f"--model={size}", f"--max_lr={max_lr!r}"]
    command += [f"--max_steps={steps}", f"--eval_every={steps}", f"--save_every={steps // 10}", "--keep_last=3"]
    command += ["--schedule=wsd", "--decay_frac=0.2", "--n_samples=0", "--hellaswag_every=0"]
    command += [f"--branch_from={start.folder}/ckpt_{start.steps * 8 // 10:06d}.pt"] if start else []
    if final_loss(folder, steps, base) is None:
        threads = dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // cfg.jobs))) if cfg.jobs > 1 else {}
        subprocess.run(command, env=os.environ | threads, stdout=subprocess.DEVNULL)  # more threads would only wait
    if (loss := final_loss(folder, steps, base)) is None:
        raise ValueError(f"{shlex.join(command)} did not finish: read its message above, then start the study again")
    shape = train_gpt2.expected_config(replace(base, model=size), data.get_tokenizer(base.tokenizer).n_vocab)
    with torch.device("meta"):
        N = model.GPT(shape).flops_per_token(base.T) / 6
    print(f"{folder}: loss {loss:.4f}", flush=True)
    return Point(folder, max_lr, steps, N, float(steps * base.total_batch_size), loss)


def train_size(cfg: Config, base: train_gpt2.Config, size: str) -> list[Point]:
    """All lengths of a size, with the best of the learning rates at the shortest length."""
    shortest = [train(cfg, base, size, cfg.lengths[0], max_lr, None) for max_lr in cfg.max_lrs]
    points = [min(shortest, key=lambda point: point.loss)]
    if points[0].max_lr in (min(cfg.max_lrs), max(cfg.max_lrs)):
        print(f"{size}: the best of --max_lrs is the smallest or largest, {points[0].max_lr:g}: try more of them")
    held_out = [cfg.held_out * cfg.lengths[-1]] if cfg.held_out > 1 and size == cfg.sizes[-1] else []
    for steps in [*cfg.lengths[1:], *held_out]:
        points.append(train(cfg, base, size, steps, points[0].max_lr, points[-1]))
    return points


def with_interval(laws: list[fit.Law], result: Callable[[fit.Law], Sequence[float]]) -> np.ndarray:
    """The results of the first law, and the 5th and 95th percentiles of those of the others, (3, n)."""
    first, *others = (result(law) for law in laws)
    return np.vstack([first, *np.percentile(others, [5, 95], axis=0)])


def as_text(values: np.ndarray) -> list[str]:
    """Each result of `with_interval` as text."""
    return [f"{x:.4g} [{low:.4g} … {high:.4g}]" for x, low, high in values.T]


def print_report(laws: list[fit.Law], runs: np.ndarray, held_out: list[Point], C: float) -> None:
    """Print results. laws: of all runs, then of resamples; runs: (N, D, loss), (3, n); C: FLOPs of the largest run."""

    def constants(law: fit.Law) -> list[float]:
        N, D = law.optimum(C)
        return [*law, law.beta / (law.alpha + law.beta), D / N]

    rows = [["", *fit.Law._fields, "a in N ~ C^a", "tokens per parameter"]]
    rows.append(["this study", *as_text(with_interval(laws, constants))])
    rows += [[name, *(f"{x:.4g}" for x in constants(law))] for name, law in fit.PUBLISHED.items()]
    if len(minima := fit.parabolas(*runs)) > 1:
        slope = np.polyfit(np.log([C for C, *_ in minima]), np.log([lowest for *_, lowest in minima]), 1)[0]
        rows.append(["parabolas", *[""] * 5, f"{slope:.4g}", ""])
    print(config.format_table(rows))
    rows = [["FLOPs", "N_opt", "D_opt", "loss"]]
    for budget in C * np.array([0.1, 1, 10]):  # extrapolated to at most ten times C
        results = with_interval(laws, lambda law, C=budget: [*law.optimum(C), law.loss(*law.optimum(C))])
        rows.append([f"{budget:.2e}", *as_text(results)])
    print(config.format_table(rows))
    for p in held_out:
        predicted = with_interval(laws, lambda law, p=p: [law.loss(p.N, p.D)])
        error = predicted[0, 0] / p.loss - 1
        print(f"held out: {p.folder}: predicted {as_text(predicted)[0]}, measured {p.loss:.4f} ({error:+.2%})")


def draw(
    path: Path, laws: list[fit.Law], runs: np.ndarray, held_out: list[Point], C: float, entropy: float | None
) -> None:
    """Write the figure. entropy: a lower bound of the loss, nats per token. The others: as in `print_report`."""
    import matplotlib
    from matplotlib.figure import Figure

    (N, D, L), law = runs, laws[0]
    budgets = np.geomspace(min(6 * N * D), 10 * C, 50)
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(13, 10), layout="constrained")
        [[curves, equal], [optimum, errors]] = figure.subplots(2, 2)
        curves.set(title="Loss against compute", xlabel="FLOPs", ylabel="validation loss")
        equal.set(title="Sizes at equal compute", xlabel="N, parameters", ylabel="validation loss")
        optimum.set(title="Compute-optimal size and tokens", xlabel="FLOPs")
        errors.set(title="Predicted against measured", xlabel="measured loss", ylabel="error of the prediction, %")
        for color, size in enumerate(np.unique(N)):
            d, losses = D[N == size], L[N == size]
            smooth = np.geomspace(d[0], d[-1], 50)
            curves.plot(6 * size * d, losses, f"C{color}o", label=f"N = {size:.2g}")
            curves.plot(6 * size * smooth, law.loss(size, smooth), f"C{color}", linewidth=1)
            errors.plot(losses, 100 * (law.loss(size, d) / losses - 1), f"C{color}o", label=f"N = {size:.2g}")
        for color, (budget, sizes, losses, coefficients, lowest) in enumerate(fit.parabolas(*runs)):
            equal.plot(sizes, losses, f"C{color}o", label=f"{budget:.1e} FLOPs")
            smooth = np.geomspace(sizes[0], sizes[-1], 50)
            equal.plot(smooth, np.polyval(coefficients, np.log(smooth)), f"C{color}", linewidth=1)
            optimum.plot(budget, lowest, "k*", markersize=12, label="" if color else "N of the parabolas")
        lines = [(curves, "k", "compute-optimal", lambda law: law.loss(*law.optimum(budgets)))]
        lines += [(optimum, "C0", "N, parameters", lambda law: law.optimum(budgets)[0])]
        lines += [(optimum, "C1", "D, tokens", lambda law: law.optimum(budgets)[1])]
        for axes, color, label, result in lines if min(law.alpha, law.beta) > 0 else ():  # else there is no optimum
            middle, *interval = with_interval(laws, result)
            axes.plot(budgets, middle, color, label=label)
            axes.fill_between(budgets, *interval, color=color, alpha=0.15)
        for p in held_out:
            curves.plot(6 * p.N * p.D, p.loss, "k*", markersize=12, label="held out")
            [error], *interval = with_interval(laws, lambda law, p=p: [100 * (law.loss(p.N, p.D) / p.loss - 1)])
            errors.plot([p.loss] * 2, interval, "k", linewidth=1)
            errors.plot(p.loss, error, "k*", markersize=12, label="held out, with 90 % of resamples")
        if entropy:
            curves.axhline(entropy, color="C3", label="entropy of the text")
        for axes in figure.axes:
            axes.set(xscale="log", yscale="linear" if axes is errors else "log")
            if axes.lines:  # there can be no parabolas
                axes.legend(fontsize=9)
        with files.atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def main(cfg: Config) -> None:
    """Train what is missing, fit, print and draw."""
    base, entropy = config.parse(train_gpt2.CONFIGS, train_gpt2.__doc__, shlex.split(cfg.train)), None
    check(cfg, base)
    out_dir = files.make_folder(cfg.out_dir)
    if cfg.fresh_tokens:
        base = replace(base, data=str(out_dir / "data"))
        entropy = fresh.write_fresh_text(out_dir / "data", cfg.fresh_tokens, base.val_tokens, base.T)
    with ThreadPoolExecutor(cfg.jobs) as pool:  # the largest size first, because it takes longest
        found = [*pool.map(lambda size: train_size(cfg, base, size), cfg.sizes[::-1])]
    points = [p for runs in found[::-1] for p in runs]
    n_fitted = len(cfg.sizes) * len(cfg.lengths)
    runs, held_out = np.array([(p.N, p.D, p.loss) for p in points[:n_fitted]]).T, points[n_fitted:]
    law = fit.fit(*runs)
    laws, C = [law, *fit.bootstrap(*runs, law)], max(6 * p.N * p.D for p in points)
    print_report(laws, runs, held_out, C)
    if entropy:
        print(f"entropy of the text, to compare with E: {entropy:.4f} nats per token or slightly more")
    draw(out_dir / "Scaling.png", laws, runs, held_out, C, entropy)
    results = dict(entropy=entropy, points=[p._asdict() for p in points], laws=[x._asdict() for x in laws])
    files.write_json(out_dir / "scaling.json", results)
    print(f"wrote {out_dir / 'scaling.json'} and {out_dir / 'Scaling.png'}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
