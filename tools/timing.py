"""Alternating repeats, JSON results and a figure, for bench.py."""

import platform
import re
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


def run_alternating(variants: dict[str, Callable[[], Any]], repeats: int, unit: str) -> list[dict]:
    """Time every variant `repeats` times, in alternating order; print and return rates per second.

    The first repeat warms up and is not counted. A variant returns its number of units, or (that number, clock() after
    its setup). The first variant is the baseline of the ratios.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants)[:: -1 if repeat % 2 else 1]:
            start = clock()
            done = variants[name]()
            n, start = done if isinstance(done, tuple) else (done, start)
            rates[name].append(n / (clock() - start))
    rows, table = [], [("", f"median {unit}", "min", "max", "ratio")]
    baseline = statistics.median(rates[next(iter(rates))][1:])
    for name, (_, *counted) in rates.items():
        median, low, high = statistics.median(counted), min(counted), max(counted)
        rows.append(dict(name=name, unit=unit, median=median, min=low, max=high, ratio=median / baseline))
        table.append((name, f"{median:,.1f}", f"{low:,.1f}", f"{high:,.1f}", f"{median / baseline:.3f}"))
    print(config.format_table(table), flush=True)
    return rows


def transformers_decoder(
    raw: model.GPT, prompts: list[list[int]], new_tokens: int, rt: runtime.Runtime
) -> Callable[[], int]:
    """Greedy `generate` of transformers with random weights: the shape of `raw`, the precision of `rt`."""
    import transformers

    c, ids = raw.config, torch.tensor(prompts, device=rt.device)
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size, vocab_size=c.n_tokens)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=None))
    other.to(rt.device, torch.bfloat16 if rt.precision == "bf16" else torch.float32).eval()
    options = dict(do_sample=False, max_new_tokens=new_tokens, attention_mask=torch.ones_like(ids))
    return lambda: other.generate(ids, **options)[:, ids.size(1) :].numel()


def summarize(rows: list[dict], rt: runtime.Runtime, path: Path) -> None:
    """Print the rates of NeoGPT and of the baselines, and draw their ratios as bars into a PNG file. rows: of
    `run_alternating`, with the name of the measurement as `what`; of each, the first is the baseline, the last NeoGPT.
    """
    from matplotlib.figure import Figure

    cpu = collect_env.get_cpu_info(collect_env.run) or platform.processor()
    found = re.search("Model name: *(.*)", cpu)  # of lscpu
    name = found[1] if found else cpu.partition("\n")[0]
    name = runtime.processor(rt.device) if rt.device.type == "cuda" else f"{name}, {runtime.processor(rt.device)}"
    title = f"{name}, {torch.get_num_threads()} threads, {rt.precision}, PyTorch {torch.__version__}"
    groups = {row["what"]: [other for other in rows if other["what"] == row["what"]] for row in rows}
    table = [("", "NeoGPT", "", "baseline", "", "ratio")]
    axes = Figure(figsize=(8, 1 + 0.5 * len(groups))).subplots()
    for what, group in groups.items():
        other, ours = group[0], group[-1]
        rate = f"{ours['median']:,.0f}", ours["unit"]
        against = (other["name"], f"{other['median']:,.0f}", f"{ours['ratio']:.2f}") if other is not ours else ("",) * 3
        table.append((what, *rate, *against))
        axes.barh(what, ours["ratio"], color="C0" if against[0] else "0.8")
        axes.text(ours["ratio"], what, f" {against[2]} × {against[0]}, {' '.join(rate)}", va="center")
    print(f"{title}\n{config.format_table(table)}", flush=True)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="NeoGPT's rate / baseline's rate", xlim=(0, 1.8 * axes.get_xlim()[1]))
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_write(path) as temporary:
        axes.figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def write_json(path: Path, **results: Any) -> None:
    """Write results with the command, the revision of the code, the machine and the versions of packages."""
    machine = collect_env.get_env_info()._asdict()  # also PyTorch and CUDA
    versions = {d.name: d.version for d in metadata.distributions() if d.name in ("tiktoken", "gigatoken", "pyarrow")}
    facts = dict(command=" ".join(sys.argv), code=run.code_revision(), machine=machine, versions=versions)
    files.write_json(path, facts | results)
    print(f"wrote {path}")
