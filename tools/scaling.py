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
import shlex
import subprocess
import sys
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
    held_out: config.PositiveInt = 2  # also train the largest size for this many times the longest length, as a test
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
    jobs=2,  # models this small are fastest on one thread each
)
CONFIGS = {"gpt2": Config(), "demo": DEMO}


class Point(NamedTuple):
    """One finished run."""

    folder: str
    size: str
    max_lr: float
    steps: int
    N: float  # parameters, counted as FLOPs per token / 6: matrices, head and attention
    D: float  # tokens
    loss: float  # final validation loss, nats per token


def check(cfg: Config, base: train_gpt2.Config) -> None:
    """Raise ValueError for the first constant that is out of range."""
    config.check(cfg)
    if unknown := {*cfg.sizes} - {*model.SIZES}:
        raise ValueError(f"--sizes {min(unknown)}: expected names of {', '.join(model.SIZES)}")
    if len(cfg.sizes) * len(cfg.lengths) < 6 or [*cfg.lengths] != sorted({*cfg.lengths}) or not cfg.max_lrs:
        raise ValueError(f"--lengths {cfg.lengths}: expected increasing lengths, six or more with all --sizes")
    if bad := [steps for steps in cfg.lengths if steps % 10 or 0.8 * steps < base.warmup_steps]:
        raise ValueError(f"--lengths {bad[0]}: expected multiples of 10, and a warmup of at most 80 %")
    longest = cfg.held_out * cfg.lengths[-1] * base.total_batch_size
    if 0 < cfg.fresh_tokens < longest:
        raise ValueError(f"--fresh_tokens={cfg.fresh_tokens}: the longest run needs {longest:,}")


def final_loss(folder: str, steps: int, base: train_gpt2.Config) -> float | None:
    """The final loss of a run according to its log; None if it is not finished. Raises ValueError if it is a run with
    other data or batches.
    """
    if not Path(folder, "log.txt").exists():
        return None
    _, curves, constants = plot.read_log(folder)
    expected = dict(data=base.data, T=base.T, total_batch_size=base.total_batch_size)
    for name in expected.keys() & constants.keys():
        if constants[name] != str(expected[name]).split(" ")[0]:  # read_log ends values at a space
            raise ValueError(f"{folder} was trained with {name}={constants[name]}: use another --out_dir")
    return float(curves["val"][1][-1]) if "val" in curves and curves["val"][0][-1] == steps else None


def train(cfg: Config, base: train_gpt2.Config, size: str, steps: int, max_lr: float, start: Point | None) -> Point:
    """Do one run, unless it is finished. start: the shorter run that it continues. Raises ValueError if it fails."""
    folder = f"{cfg.out_dir}/{size}-{max_lr:g}-{steps}"
    command = [*(shlex.split(cfg.launch) or [sys.executable]), train_gpt2.__file__, *shlex.split(cfg.train)]
    command += [f"--data={base.data}", f"--out_dir={folder}", f"--model={size}", f"--max_lr={max_lr!r}"]
    command += [f"--max_steps={steps}", f"--save_every={steps // 10}", "--keep_last=3", f"--eval_every={steps}"]
    command += ["--schedule=wsd", "--decay_frac=0.2", "--n_samples=0", "--hellaswag_every=0"]
    command += [f"--branch_from={start.folder}/ckpt_{start.steps * 8 // 10:06d}.pt"] if start else []
    n_threads = str(max(1, (os.cpu_count() or 1) // cfg.jobs))  # with more, runs would wait for each other
    env = os.environ | (dict(OMP_NUM_THREADS=n_threads) if cfg.jobs > 1 else {})
    if (loss := final_loss(folder, steps, base)) is None:
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL)
        if (loss := final_loss(folder, steps, base)) is None:
            raise ValueError(f"the run in {folder} did not finish: run the same command again; {shlex.join(command)}")
    n_tokens = data.get_tokenizer(base.tokenizer).n_vocab
    shape = model.SIZES[size] | dict(block_size=base.T, n_tokens=n_tokens, vocab_size=model.pad_vocab(n_tokens))
    with torch.device("meta"):
        N = model.GPT(model.GPTConfig(**shape)).flops_per_token(base.T) / 6
    print(f"{folder}: loss {loss:.4f}", flush=True)
    return Point(folder, size, max_lr, steps, N, float(steps * base.total_batch_size), loss)


def train_size(cfg: Config, base: train_gpt2.Config, size: str) -> list[Point]:
    """All lengths of a size, with the best of the learning rates at the shortest length."""
    shortest = [train(cfg, base, size, cfg.lengths[0], max_lr, None) for max_lr in cfg.max_lrs]
    points = [min(shortest, key=lambda point: point.loss)]
    if points[0].max_lr in (min(cfg.max_lrs), max(cfg.max_lrs)):
        print(f"{size}: the best of --max_lrs is the first or last, {points[0].max_lr:g}: try more of them")
    held_out = [cfg.held_out * cfg.lengths[-1]] if cfg.held_out > 1 and size == cfg.sizes[-1] else []
    for steps in [*cfg.lengths[1:], *held_out]:
        points.append(train(cfg, base, size, steps, points[0].max_lr, points[-1]))
    return points


def middle(values: object) -> np.ndarray:
    """The 5th and 95th percentiles, (2, …), of results of the resamples, (n, …)."""
    return np.percentile(np.array(values), [5, 95], axis=0)


def with_interval(values: list[float]) -> str:
    """The first value and, if there are more, the middle 90 % of the others, as text."""
    interval = " [{:.4g} … {:.4g}]".format(*middle(values[1:])) if len(values) > 1 else ""
    return f"{values[0]:.4g}{interval}"


def print_report(laws: list[fit.Law], points: list[Point], minima: list[fit.Parabola], n_fitted: int) -> None:
    """Print the constants beside published ones, optima and predictions. laws: of all points, then of the resamples."""
    C = max(6 * p.N * p.D for p in points)
    rows = [["", *fit.Law._fields, "a in N ~ C^a", "tokens per parameter"]]
    for name, group in {"this study": laws, **{name: [law] for name, law in fit.PUBLISHED.items()}}.items():
        values = [[*law, law.beta / (law.alpha + law.beta), np.divide(*law.optimum(C)[::-1])] for law in group]
        rows.append([name, *(with_interval(v) for v in zip(*values))])
    if len(minima) > 1:
        slope = np.polyfit([np.log(m.C) for m in minima], [np.log(m.lowest) for m in minima], 1)[0]
        rows.append(["parabolas", *[""] * 5, f"{slope:.4g}", ""])
    print(config.format_table(rows))
    rows = [["FLOPs", "N_opt", "D_opt", "loss"]]
    for budget in C * np.array([0.1, 1, 10]):  # ten times is as far as laws hold
        values = [[*law.optimum(budget), law.loss(*law.optimum(budget))] for law in laws]
        rows.append([f"{budget:.2e}", *(with_interval(v) for v in zip(*values))])
    print(config.format_table(rows))
    for p in points[n_fitted:]:
        losses = [law.loss(p.N, p.D) for law in laws]
        error = f"{losses[0] / p.loss - 1:+.2%}"
        print(f"held out: {p.folder}: predicted {with_interval(losses)}, measured {p.loss:.4f} ({error})")


def draw(
    path: Path,
    laws: list[fit.Law],
    points: list[Point],
    minima: list[fit.Parabola],
    n_fitted: int,
    entropy: tuple | None,
) -> None:
    """Write the figure. The points after n_fitted were not fitted. entropy: bounds of the smallest possible loss."""
    import matplotlib
    from matplotlib.figure import Figure

    C = [6 * p.N * p.D for p in points]
    budgets, law = np.geomspace(min(C), 10 * max(C), 50), laws[0]
    star = dict(color="k", marker="*", markersize=12, linestyle="")
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(13, 10), layout="constrained")
        [[curves, equal], [optimum, residuals]] = figure.subplots(2, 2)
        for color, size in enumerate(dict.fromkeys(p.size for p in points)):
            own = sorted([p for p in points if p.size == size], key=lambda p: p.D)
            N, D, losses = (np.array(column) for column in zip(*[(p.N, p.D, p.loss) for p in own]))
            curves.plot(6 * N * D, losses, "o", color=f"C{color}", label=f"{size}, N = {N[0]:.2g}")
            smooth = np.geomspace(D[0], D[-1], 50)
            curves.plot(6 * N[0] * smooth, law.loss(N[0], smooth), color=f"C{color}", linewidth=1)
            residuals.plot(losses, 100 * (law.loss(N, D) / losses - 1), "o", color=f"C{color}", label=size)
        frontier = [x.loss(*x.optimum(budgets)) for x in laws]
        curves.plot(budgets, frontier[0], "k--", label="compute-optimal")
        curves.fill_between(budgets, *middle(frontier[1:]), color="k", alpha=0.1)
        if entropy:
            curves.axhspan(*entropy, color="C3", label="entropy of the text")
        for color, m in enumerate(minima):
            smooth = np.geomspace(min(m.N), max(m.N), 50)
            equal.plot(m.N, m.losses, "o", color=f"C{color}", label=f"{m.C:.1e} FLOPs")
            equal.plot(smooth, np.polyval(m.coefficients, np.log(smooth)), color=f"C{color}", linewidth=1)
            equal.plot(m.lowest, np.polyval(m.coefficients, np.log(m.lowest)), **star)
            optimum.plot(m.C, m.lowest, **star, label="" if color else "N of the parabolas")
        for i, name in enumerate(("N, parameters", "D, tokens")):
            optimum.plot(budgets, law.optimum(budgets)[i], color=f"C{i}", label=name)
            optimum.fill_between(budgets, *middle([x.optimum(budgets)[i] for x in laws[1:]]), color=f"C{i}", alpha=0.15)
        for p in points[n_fitted:]:
            errors = [100 * (x.loss(p.N, p.D) / p.loss - 1) for x in laws]
            residuals.plot([p.loss] * 2, middle(errors[1:]), "k", linewidth=1)
            residuals.plot(p.loss, errors[0], **star, label="held out, with 90 % of resamples")
            curves.plot(6 * p.N * p.D, p.loss, **star, label="held out")
        residuals.axhline(0, color="0.5", linewidth=1)
        curves.set(title="Loss against compute", xlabel="FLOPs", ylabel="validation loss")
        equal.set(title="Sizes at equal compute", xlabel="N, parameters", ylabel="validation loss")
        optimum.set(title="Compute-optimal size and tokens", xlabel="FLOPs")
        residuals.set(title="Predicted against measured", xlabel="measured loss", ylabel="error of the prediction, %")
        for axes in (curves, equal, optimum, residuals):
            axes.set(xscale="log", yscale="linear" if axes is residuals else "log")
            if axes.lines:  # without parabolas there is nothing to explain
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
        found = [*pool.map(lambda size: train_size(cfg, base, size), cfg.sizes[::-1])][::-1]
    points = sorted([p for runs in found for p in runs], key=lambda p: p.steps > cfg.lengths[-1])
    n_fitted = len(cfg.sizes) * len(cfg.lengths)
    N, D, L = (np.array(column) for column in zip(*[(p.N, p.D, p.loss) for p in points[:n_fitted]]))
    law = fit.fit(N, D, L)
    laws, minima = [law, *fit.bootstrap(N, D, L, law)], fit.parabolas(N, D, L)
    print_report(laws, points, minima, n_fitted)
    if entropy:
        E = with_interval([x.E for x in laws])
        print(f"E {E}; entropy of the text, nats per token: between {entropy[0]:.4f} and {entropy[1]:.4f}")
    draw(out_dir / "Scaling.png", laws, points, minima, n_fitted, entropy)
    results = dict(entropy=entropy, points=[p._asdict() for p in points], laws=[x._asdict() for x in laws])
    files.write_json(out_dir / "scaling.json", results)
    print(f"wrote {out_dir / 'scaling.json'} and {out_dir / 'Scaling.png'}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
