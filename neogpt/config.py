"""Command line and error reporting, the same for every script: `config.run(main, CONFIGS)`.

CONFIGS maps names to instances of the script's Config dataclass; the first one is the default.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from neogpt import files

ROOT = Path(__file__).resolve().parent.parent  # the repository
Config = TypeVar("Config")


def parse(configs: dict[str, Config], doc: str, args: Sequence[str] | None = None) -> Config:
    """Read the command line `script.py [NAME] [--constant=value …]`; NAME selects one of `configs`.

    The comments of the dataclass become the help text. `--chat` means `--chat=True`. args: default sys.argv[1:].
    """
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0].startswith("-"):
        args.insert(0, next(iter(configs)))
    flags = {f"__{field.name}" for field in fields(next(iter(configs.values()))) if "bool" in str(field.type)}
    bare = [following.startswith("--") for following in [*args[1:], "--"]]
    args = [f"{a}=True" if b and a.replace("-", "_") in flags else a for a, b in zip(args, bare)]
    return tyro.extras.overridable_config_cli(
        {name: ("", config) for name, config in configs.items()},
        description=f"{doc.strip()}\n\nConfigurations: {', '.join(configs)}",
        args=args,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def run(main: Callable[[Config], None], configs: dict[str, Config]) -> None:
    """Run main(config) with the configuration of the command line; the only place that reports errors.

    An OSError, or a ValueError raised by this repository, is a message for the user: one line on rank 0 and exit code
    1. Every other exception is a bug and keeps its traceback.
    """
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    try:
        main(parse(configs, sys.modules[main.__module__].__doc__))
    except BrokenPipeError:  # the reader of our output, for example `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("interrupted" if is_rank_0 else 130)
    except (ValueError, OSError) as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(origin.filename).resolve()
        ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts and origin.line.startswith("raise")
        if not ours and not isinstance(error, OSError):
            raise
        # all ranks see the same wrong value, but a disk may be full on one node only
        sys.exit(f"error: {files.one_line(error)}" if is_rank_0 or isinstance(error, OSError) else 1)


def require(interval: str, **values: float | None) -> None:
    """Raise ValueError for the first of `values` outside `interval`, such as "[0, 1)". None passes."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        above = value is None or (low < value if interval[0] == "(" else low <= value)
        below = value is None or (value < high if interval[-1] == ")" else value <= high)
        if not (above and below):  # also for NaN
            raise ValueError(f"--{name}={value} must be in {interval}")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells -> right-aligned columns as text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
