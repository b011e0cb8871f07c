"""Alternating repeats, JSON results and a figure, for bench.py."""

import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from neogpt import config, files, model, run, runtime


def clock() -> float:
    """The time in seconds, after the GPU has done its queued work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def run_alternating(variants: dict[str, Callable], repeats: int, unit: str, only: tuple[str, ...] = ()) -> list[dict]:
    """Time every variant, or `only` these, `repeats` times, in alternating order; print and return rates per second.
    The first repeat warms up and is not counted. A variant returns its number of units, or (that number, clock() after
    its setup). The first variant is the baseline of the ratios.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants if not only or name in only}
    if not rates:
        raise ValueError(f"--only: expected some of {', '.join(variants)}")
    for repeat in range(repeats):
        for name in list(rates)[:: -1 if repeat % 2 else 1]:
            start = clock()
            done = variants[name]()
            n, start = done if isinstance(done, tuple) else (done, start)
            rates[name].append(n / (clock() - start))
    rows, table = [], [("", f"median {unit}", "min", "max", "ratio")]
    baseline = statistics.median(rates[next(iter(rates))][1:])  # the first variant
    for name, (_, *counted) in rates.items():
        median, low, high = statistics.median(counted), min(counted), max(counted)
        rows.append(dict(name=name, unit=unit, median=median, min=low, max=high, ratio=median / baseline))
        table.append((name, f"{median:,.1f}", f"{low:,.1f}", f"{high:,.1f}", f"{median / baseline:.3f}"))
    print(config.format_table(table), flush=True)
    return rows


def transformers_decoder(raw: model.GPT, prompts: list, n_tokens: int, rt: runtime.Runtime) -> Callable[[], int]:
    """Greedy `generate` of transformers with random weights: the shape of `raw`, the precision of `rt`."""
    import transformers

    c, ids = raw.config, torch.tensor(prompts, device=rt.device)
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size, vocab_size=c.n_tokens)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=None))
    other.to(rt.device, torch.bfloat16 if rt.precision == "bf16" else torch.float32).eval()
    options = dict(do_sample=False, max_new_tokens=n_tokens, attention_mask=torch.ones_like(ids))
    return lambda: other.generate(ids, **options)[:, ids.size(1) :].numel()


def overview(measurements: dict[str, Callable[[], list[dict]]], rt: runtime.Runtime, path: Path) -> list[dict]:
    """Run all measurements; print the rates of NeoGPT and of the baselines, and draw their ratios as bars into a PNG
    file. A measurement returns rows of `run_alternating`: the first is the baseline, the last NeoGPT's.
    """
    from matplotlib.figure import Figure

    rows, axes = [], Figure(figsize=(8, 1 + 0.5 * len(measurements))).subplots()
    table = [("", "NeoGPT", "", "baseline", "", "ratio")]
    for name, measure in measurements.items():
        print(name)
        try:
            found = measure()
        except OSError as error:  # no network for GPT-2's vocabulary
            print(f"left out: {error}")
            continue
        rows += [row | dict(measurement=name) for row in found]
        ours, ratio, rate = found[-1], found[-1]["ratio"], f"{found[-1]['median']:,.0f}"
        baseline, other = (found[0]["name"], f"{found[0]['median']:,.0f}") if len(found) > 1 else ("none", "")
        table.append((name, rate, ours["unit"], baseline, other, f"{ratio:.2f}"))
        axes.barh(name, ratio, color="C0" if other else "0.8")
        axes.text(max(ratio, 1), name, f" {ratio:.2f} × {baseline}, {rate} {ours['unit']}", va="center")
    name = str(collect_env.get_cpu_info(collect_env.run)).split("Model name:")[-1].strip().partition("\n")[0]
    name = f"{name}, {torch.get_num_threads()} threads" if rt.device.type == "cpu" else name
    title = f"{name}, {runtime.processor(rt.device)}, {rt.precision}, PyTorch {torch.__version__}"
    print(f"{title}\n{config.format_table(table)}", flush=True)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="NeoGPT's rate / baseline's rate", xlim=(0, 1.8 * axes.get_xlim()[1]))
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_write(path) as temporary:
        axes.figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    return rows


def write_json(path: Path, **results: Any) -> None:
    """Write results with the command, the revision of the code, the machine and the versions of packages."""
    machine = collect_env.get_env_info()._asdict()  # also PyTorch and CUDA
    names = "tiktoken", "gigatoken", "pyarrow", "transformers"
    versions = {d.name: d.version for d in metadata.distributions() if d.name in names}
    facts = dict(command=" ".join(sys.argv), code=run.code_revision(), machine=machine, versions=versions)
    files.write_json(path, facts | results)
    print(f"wrote {path}")
