"""Alternating repeats and JSON results, for bench.py."""

import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from neogpt import config, files, run


def clock() -> float:
    """The time in seconds, after the GPU has done its queued work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def run_alternating(variants: dict[str, Callable[[], Any]], repeats: int, unit: str) -> list[dict]:
    """Time every variant `repeats` times, in alternating order; print and return rates per second. The first repeat
    warms up and is not counted. A variant returns its number of units, or (that number, clock() after its setup).
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants)[:: -1 if repeat % 2 else 1]:
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


def write_json(path: Path, **results: Any) -> None:
    """Write results with the command, the revision of the code, the machine and the versions of packages."""
    machine = collect_env.get_env_info()._asdict()  # also PyTorch and CUDA
    versions = {d.name: d.version for d in metadata.distributions() if d.name in ("tiktoken", "gigatoken", "pyarrow")}
    facts = dict(command=" ".join(sys.argv), code=run.code_revision(), machine=machine, versions=versions)
    files.write_json(path, facts | results)
    print(f"wrote {path}")
