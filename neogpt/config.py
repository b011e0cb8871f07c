"""Command line, ranges of constants and error reporting of every script: `config.run(main, CONFIGS)`."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_type_hints

from neogpt import files

ROOT = Path(__file__).resolve().parent.parent  # the repository
Config = TypeVar("Config")

# Types of constants with their ranges, for `check`
PositiveInt = Annotated[int, "[1, inf)"]
NonNegativeInt = Annotated[int, "[0, inf)"]
PositiveFloat = Annotated[float, "(0, inf)"]
NonNegativeFloat = Annotated[float, "[0, inf)"]
Fraction = Annotated[float, "[0, 1]"]
Decay = Annotated[float, "[0, 1)"]  # of an average
Seed = Annotated[int, "[0, 9e18]"]


def parse(configs: dict[str, Config], doc: str, args: Sequence[str] | None = None) -> Config:
    """Read the command line `script.py [NAME] [--constant=value …]`. NAME selects one of `configs`; default: the first.
    Comments of the dataclass become the help. `--chat` means `--chat=True`, ~ the home folder. Raises as `check` does.
    """
    import tyro

    args = sys.argv[1:] if args is None else args
    args = [re.sub("^--[a-z_-]+=~(?=/)", lambda m: m[0][:-1] + str(Path.home()), arg) for arg in args]
    if not args or args[0].startswith("-"):
        args.insert(0, next(iter(configs)))
    flags = {f"__{field.name}" for field in fields(next(iter(configs.values()))) if "bool" in str(field.type)}
    for i, following in enumerate([*args[1:], "--"]):
        if args[i].replace("-", "_") in flags and following.startswith("--"):  # no value follows
            args[i] += "=True"
    description = f"{doc.strip()}\n\nConfigurations: {', '.join(configs)}"
    shown = {args[0]: configs[args[0]]} if args[0] in configs else configs
    shown = {name: (description, config) for name, config in shown.items()}
    options = dict(use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    with contextlib.redirect_stderr(sys.stderr if is_rank_0 else io.StringIO()):  # tyro prints wrong values always
        cfg = tyro.extras.overridable_config_cli(shown, args=args, console_outputs=is_rank_0, **options)
    check(cfg)
    return cfg


def run(main: Callable[[Config], None], configs: dict[str, Config]) -> None:
    """Run main(config) with the configuration of the command line. An OSError, a lack of GPU memory, or a ValueError
    raised by this repository is a message for the user: one line and exit code 1. All others have a traceback.
    """
    is_rank_0 = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"  # of each machine
    try:
        main(parse(configs, sys.modules[main.__module__].__doc__))
    except BrokenPipeError:  # the reader of our output, for example `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("interrupted" if is_rank_0 else 130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of PyTorch, which is not imported here
            raise
        remedy = "use a smaller --B" if hasattr(next(iter(configs.values())), "B") else "use a smaller model"
        sys.exit(f"error: {str(error).partition('. GPU')[0]}: {remedy}")
    except (ValueError, OSError) as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(origin.filename).resolve()
        ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts and origin.line.startswith("raise")
        if not ours and not isinstance(error, OSError):
            raise
        # a wrong value is the same on all ranks of a machine, but an OSError can occur on one rank only
        sys.exit(f"error: {files.one_line(error)}" if is_rank_0 or isinstance(error, OSError) else 1)


def check(cfg: object) -> None:
    """Raise ValueError for the first constant of a Config that is outside the range of its type."""
    for name, hint in get_type_hints(type(cfg), include_extras=True).items():
        for kind in (hint, *get_args(hint)):  # the type itself, or the members of a union
            for interval in getattr(kind, "__metadata__", ()):
                require(interval, **{name: vars(cfg)[name]})


def require(interval: str, **values: float | None) -> None:
    """Raise ValueError for the first of `values` outside `interval`, such as "[0, 1)". None passes."""
    low, high = map(float, interval[1:-1].split(","))
    included = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "[]"]
    for name, value in values.items():
        if not (value is None or low < value < high or value in included):  # also for NaN
            raise ValueError(f"--{name}={value} must be in {interval}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"--{name}={value} must be less than 2**63")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells -> right-aligned columns as text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
