"""Time variants of the same work in alternating repeats, and write the results with the hardware and versions."""

import contextlib
import io
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neogpt import config, files, run


def clock() -> float:
    """Seconds on a clock, after the GPU has done its queued work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_alternating(variants: dict[str, Callable[[], Any]], repeats: int, unit: str) -> list[dict]:
    """Time every variant `repeats` times, in forward and backward order by turns; print and return rates per second.

    The first repeat warms up and is not counted. A variant returns how many units it processed, or that and the clock
    after its setup. A failing variant (out of memory) is skipped unless it is the baseline, which is the first, or the
    only one left to compare.
    """
    baseline, rates = next(iter(variants)), {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(rates)[:: -1 if repeat % 2 else 1]:
            start = clock()
            try:
                done = variants[name]()
            except (RuntimeError, ValueError) as error:
                if name == baseline or len(rates) == 2:
                    raise
                print(f"skipped: {name}: {files.one_line(error)}", flush=True)
                del rates[name]
                continue
            n, start = done if isinstance(done, tuple) else (done, start)
            rates[name].append(n / (clock() - start))
    rows, table = [], [("", f"median {unit}", "min", "max", "ratio")]
    for name, (_, *counted) in rates.items():
        row = dict(name=name, unit=unit, median=statistics.median(counted), min=min(counted), max=max(counted))
        rows.append(row | dict(ratio=row["median"] / (rows or [row])[0]["median"]))
        table.append((name, *(f"{row[key]:,.1f}" for key in ("median", "min", "max")), f"{rows[-1]['ratio']:.3f}"))
    print(config.format_table(table), flush=True)
    return rows


def write_json(path: Path, **results: Any) -> None:
    """Write results with the command, the hardware and the versions of packages."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search("model name\\s*: (.*)", cpuinfo)
    hardware = dict(cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), system=platform.platform())
    if torch.cuda.is_available():
        hardware |= dict(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    packages = ("torch", "numpy", "tiktoken", "gigatoken", "pyarrow")
    versions = {d.name: d.version for d in metadata.distributions() if d.name in packages}
    versions |= dict(python=platform.python_version(), code=run.code_revision())
    with files.atomic_write(path) as temporary:
        facts = dict(command=" ".join(sys.argv), hardware=hardware, versions=versions) | results
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {path}")
