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
    log = Path(folder, "log.txt")
    if not log.exists() or b" val " not in log.read_bytes():  # it can be killed before its first loss
        return None
    _, curves, constants = plot.read_log(folder)
    expected = dict(data=base.data, T=base.T, total_batch_size=base.total_batch_size)
    for name in expected.keys() & constants.keys():
        if constants[name] != str(expected[name]).split(" ")[0]:  # read_log ends values at a space
            raise ValueError(f"{folder} was trained with {name}={constants[name]}: use another --out_dir")
    return float(curves["val"][1][-1]) if curves["val"][0][-1] == steps else None


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
    shape = train_gpt2.expected_config(replace(base, model=size), data.get_tokenizer(base.tokenizer).n_vocab)
    with torch.device("meta"):
        N = model.GPT(shape).flops_per_token(base.T) / 6
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


def middle(values: list) -> np.ndarray:
    """The 5th and 95th percentiles, (2, …), of results of the resamples, (n, …)."""
    return np.percentile(values, [5, 95], axis=0)


def with_intervals(laws: list[fit.Law], results: Callable[[fit.Law], Sequence[float]]) -> list[str]:
    """The results of the first law as text, with the middle 90 % of those of the others."""
    first, *others = (results(law) for law in laws)
    return [f"{x:.4g} [{low:.4g} … {high:.4g}]" for x, low, high in zip(first, *middle(others))]


def as_arrays(points: list[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and loss of all points."""
    return tuple(np.array([(p.N, p.D, p.loss) for p in points]).T)


def print_report(laws: list[fit.Law], fitted: list[Point], held_out: list[Point]) -> None:
    """Print the constants beside published ones, optima and predictions. laws: of all points, then of the resamples."""
    C = max(6 * p.N * p.D for p in fitted + held_out)

    def constants(law: fit.Law) -> list[float]:
        N, D = law.optimum(C)
        return [*law, law.beta / (law.alpha + law.beta), D / N]

    rows = [["", *fit.Law._fields, "a in N ~ C^a", "tokens per parameter"]]
    rows.append(["this study", *with_intervals(laws, constants)])
    rows += [[name, *(f"{x:.4g}" for x in constants(law))] for name, law in fit.PUBLISHED.items()]
    if len(minima := fit.parabolas(*as_arrays(fitted))) > 1:
        slope = np.polyfit(np.log([m.C for m in minima]), np.log([m.lowest for m in minima]), 1)[0]
        rows.append(["parabolas", *[""] * 5, f"{slope:.4g}", ""])
    print(config.format_table(rows))
    rows = [["FLOPs", "N_opt", "D_opt", "loss"]]
    for budget in C * np.array([0.1, 1, 10]):  # ten times is as far as laws hold
        results = with_intervals(laws, lambda law, C=budget: [*law.optimum(C), law.loss(*law.optimum(C))])
        rows.append([f"{budget:.2e}", *results])
    print(config.format_table(rows))
    for p in held_out:
        [predicted] = with_intervals(laws, lambda law, p=p: [law.loss(p.N, p.D)])
        error = f"{laws[0].loss(p.N, p.D) / p.loss - 1:+.2%}"
        print(f"held out: {p.folder}: predicted {predicted}, measured {p.loss:.4f} ({error})")


def draw(path: Path, laws: list[fit.Law], fitted: list[Point], held_out: list[Point], entropy: float | None) -> None:
    """Write the figure. entropy: a lower bound of the loss."""
    import matplotlib
    from matplotlib.figure import Figure

    C = [6 * p.N * p.D for p in fitted + held_out]
    budgets, law = np.geomspace(min(C), 10 * max(C), 50), laws[0]
    star = dict(color="k", marker="*", markersize=12, linestyle="")
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(13, 10), layout="constrained")
        [[curves, equal], [optimum, residuals]] = figure.subplots(2, 2)
        for color, size in enumerate(dict.fromkeys(p.size for p in fitted)):
            N, D, losses = as_arrays([p for p in fitted if p.size == size])
            curves.plot(6 * N * D, losses, f"C{color}o", label=f"{size}, N = {N[0]:.2g}")
            smooth = np.geomspace(D[0], D[-1], 50)
            curves.plot(6 * N[0] * smooth, law.loss(N[0], smooth), f"C{color}", linewidth=1)
            residuals.plot(losses, 100 * (law.loss(N, D) / losses - 1), f"C{color}o", label=size)
        for color, m in enumerate(fit.parabolas(*as_arrays(fitted))):
            smooth = np.geomspace(min(m.N), max(m.N), 50)
            equal.plot(m.N, m.losses, f"C{color}o", label=f"{m.C:.1e} FLOPs")
            equal.plot(smooth, np.polyval(m.coefficients, np.log(smooth)), f"C{color}", linewidth=1)
            optimum.plot(m.C, m.lowest, **star, label="" if color else "N of the parabolas")
        lines = [(curves, "k", "compute-optimal", lambda law: law.loss(*law.optimum(budgets)))]
        lines += [(optimum, "C0", "N, parameters", lambda law: law.optimum(budgets)[0])]
        lines += [(optimum, "C1", "D, tokens", lambda law: law.optimum(budgets)[1])]
        for axes, color, label, results in lines:
            axes.plot(budgets, results(law), color, label=label)
            axes.fill_between(budgets, *middle([results(x) for x in laws[1:]]), color=color, alpha=0.15)
        for p in held_out:
            curves.plot(6 * p.N * p.D, p.loss, **star, label="held out")
            errors = [100 * (x.loss(p.N, p.D) / p.loss - 1) for x in laws]
            residuals.plot([p.loss] * 2, middle(errors[1:]), "k", linewidth=1)
            residuals.plot(p.loss, errors[0], **star, label="held out, with 90 % of resamples")
        if entropy:
            curves.axhline(entropy, color="C3", label="entropy of the text")
        curves.set(title="Loss against compute", xlabel="FLOPs", ylabel="validation loss")
        equal.set(title="Sizes at equal compute", xlabel="N, parameters", ylabel="validation loss")
        optimum.set(title="Compute-optimal size and tokens", xlabel="FLOPs")
        residuals.set(title="Predicted against measured", xlabel="measured loss", ylabel="error of the prediction, %")
        for axes in figure.axes:
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
        found = [*pool.map(lambda size: train_size(cfg, base, size), cfg.sizes[::-1])]
    points = [p for runs in found[::-1] for p in runs]
    n_fitted = len(cfg.sizes) * len(cfg.lengths)
    fitted, held_out = points[:n_fitted], points[n_fitted:]
    law = fit.fit(*as_arrays(fitted))
    laws = [law, *fit.bootstrap(*as_arrays(fitted), law)]
    print_report(laws, fitted, held_out)
    if entropy:
        [E] = with_intervals(laws, lambda law: [law.E])
        print(f"E {E}; entropy of the text, nats per token: {entropy:.4f} or slightly more")
    draw(out_dir / "Scaling.png", laws, fitted, held_out, entropy)
    results = dict(entropy=entropy, points=[p._asdict() for p in points], laws=[x._asdict() for x in laws])
    files.write_json(out_dir / "scaling.json", results)
    print(f"wrote {out_dir / 'scaling.json'} and {out_dir / 'Scaling.png'}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
