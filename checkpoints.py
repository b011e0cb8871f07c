"""Checkpoints: what a run leaves behind, how the next one goes on from it, and the model in it."""

import re
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed
from safetensors import SafetensorError

from data import get_tokenizer
from files import one_line, require_space, written_whole
from hf import from_hf
from lora import apply_adapter, read_adapter_config
from model import GPT, GPTConfig
from training import Dist

MAKERS = {"pretraining": "train_gpt2.py", "sft": "sft.py", "dpo": "dpo.py"}  # the stages
FORMAT = 1  # raise it when a checkpoint's keys change their meaning


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest (highest step) first."""
    found = [
        (int(m[1]), p)
        for p in Path(folder).glob("ckpt_*.pt")
        if (m := re.fullmatch(r"ckpt_(\d+)\.pt", p.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    state: tensors and plain Python values, with at least stage, step, model, model_config and tokenizer.
    """
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"format": FORMAT} | state, file)
        except RuntimeError as error:  # torch's writer covers a full disk with an error of its own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write folder/ckpt_<step>.pt, then remove the oldest, so that with it `keep` are left. For rank 0 only.

    One of a later step stays and does not count: if it is there, it could not be read.
    """
    path = Path(folder) / f"ckpt_{state['step']:06d}.pt"
    write_checkpoint(path, state)
    checkpoints = list_checkpoints(folder)
    for old in checkpoints[checkpoints.index(path) :][max(1, keep) :]:
        old.unlink()


def require_checkpoint_space(folder: Path, n_params: int, keep: int, n_best: int = 0) -> None:
    """SystemExit unless the disk has room for `keep` checkpoints of fp32 weights and two moments, `n_best`
    copies of the best and one being written; what is there already counts.
    """
    there = [*list_checkpoints(folder)[:keep], *folder.glob("best.pt")]
    n_bytes = (keep + n_best + 1) * 12 * n_params - sum(path.stat().st_size for path in there)
    require_space(folder, n_bytes, f"keeping {keep} checkpoints{' and the best' * n_best}, and writing one,")


def save_in_background(pool: ThreadPoolExecutor, folder: Path, state: dict[str, Any], keep: int) -> Future:
    """`save_checkpoint` on the pool's thread: returns when the state is copied, or its copying is queued.

    What happens to the tensors afterwards does not reach the checkpoint. Takes its size in host memory; from
    CUDA that is pinned and rounded up to powers of two, up to twice as much.
    """
    copies: dict[int, torch.Tensor] = {}  # by address: tied weights stay one

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(copy(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        if value.data_ptr() not in copies:
            on_cuda = value.is_cuda  # pinned, so that the copy only has to be queued
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_cuda)
            copies[value.data_ptr()] = host.copy_(value, non_blocking=on_cuda)
        return copies[value.data_ptr()]

    state = copy(state)
    copied = torch.cuda.Event() if any(host.is_pinned() for host in copies.values()) else None
    copies.clear()  # the recursive function refers to itself, and would keep them until garbage is collected
    if copied:
        copied.record()

    def write() -> None:
        if copied:
            copied.synchronize()
        save_checkpoint(folder, state, keep)

    return pool.submit(write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU; ValueError says why it cannot be used. Never unpickles objects."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have several
        objects = "Weights only load failed" in str(error)
        reason = "it holds Python objects, which are never loaded" if objects else one_line(error)
        raise ValueError(f"cannot use the checkpoint {path}: {reason}") from error
    if (
        not isinstance(state, dict)
        or not {"format", "step", "model", "model_config", "tokenizer"} <= state.keys()
    ):
        raise ValueError(f"cannot use the checkpoint {path}: it was not written by NeoGPT")
    if state["format"] != FORMAT:
        raise ValueError(f"cannot use the checkpoint {path}: format {state['format']}, not {FORMAT}")
    return state


def open_checkpoint(
    path: str | Path, say: Callable[[str], None] = print, maker: str = "train_gpt2.py"
) -> dict[str, Any]:
    """The checkpoint in a file, or the newest readable one in a folder; SystemExit if there is none.

    maker: the script that the message then names.
    """
    path = Path(path)
    candidates = [path] if path.is_file() else list_checkpoints(path)
    if not candidates:
        raise SystemExit(f"no checkpoint in {path}: train one first, for example with `python {maker} demo`")
    for number, candidate in enumerate(candidates, 1):
        try:
            return load_checkpoint(candidate)
        except ValueError as error:
            if number == len(candidates):
                raise SystemExit(str(error)) from error
            say(f"{error}; falling back to {candidates[number].name}")


def find_resume(folder: Path, resume: str, dist: Dist, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The checkpoint to continue from, the same on all ranks, or None for a fresh start."""
    if resume == "never" and list_checkpoints(folder):
        raise SystemExit(
            f"{folder} holds checkpoints, and --resume=never: remove it, or choose another --out_dir"
        )
    state = open_checkpoint(folder, say) if list_checkpoints(folder) else None
    step = -1 if state is None else state["step"]
    if dist.world_size > 1:
        steps = [None] * dist.world_size
        torch.distributed.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise SystemExit(
                f"ranks see different checkpoints (steps {steps}): all nodes must share the folder {folder}"
            )
    if dist.rank == 0:
        for stale in Path(folder).glob("ckpt_*.pt.tmp"):
            stale.unlink()
    return state


def without_tensors(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A checkpoint less its weights and moments, which need not stay in memory once the model has them."""
    return state and {
        key: value for key, value in state.items() if key not in ("model", "optimizers", "adapters")
    }


def refuse_own_folder(out_dir: str, checkpoint: str) -> None:
    """SystemExit if a run would write where the checkpoint it starts from lies."""
    start = Path(checkpoint).resolve()
    if Path(out_dir).resolve() in (start, start.parent):
        raise SystemExit(f"out_dir={out_dir} holds the checkpoint to start from: choose another --out_dir")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two configurations: "max_lr 0.0006 -> 0.001, B None -> 8"; "" if nothing did."""
    keys = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} {old.get(key)} -> {new[key]}" for key in keys)


def load_hf(name: str) -> tuple[GPT, tiktoken.Encoding]:
    """The model and tokenizer of a GPT-2 on the Hugging Face hub, or in a folder in its format."""
    try:
        raw = from_hf(name)
    except Exception as error:  # the hub's many errors, a foreign config.json, damaged weights
        raise SystemExit(
            f"cannot load {name!r} from the Hugging Face hub or a folder: {one_line(error)}"
        ) from error
    names = {50257: "gpt2", 257: "bytes"}
    if raw.config.n_tokens not in names:
        raise SystemExit(f"{name!r} has {raw.config.n_tokens} token ids: no tokenizer of ours has so many")
    return raw, get_tokenizer(names[raw.config.n_tokens])


def load_with_adapter(folder: Path, say: Callable[[str], None]) -> tuple[GPT, tiktoken.Encoding]:
    """The model that a folder in PEFT's format names as its base, with the folder's adapter merged in."""
    try:
        base = read_adapter_config(folder)["base_model_name_or_path"]
        ours = Path(base).is_file() or bool(list_checkpoints(Path(base)))
        ours = ours or (Path(base) / "adapter_config.json").is_file()
        raw, tokenizer = load_model(base if ours else "", "" if ours else base, say)
        raw = apply_adapter(raw, folder)
    except RecursionError as error:
        raise SystemExit(f"the adapter in {folder} is its own base") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SystemExit(f"cannot use the adapter in {folder}: {one_line(error)}") from error
    say(f"{folder}: an adapter for {base}")
    return raw, tokenizer


def load_model(
    checkpoint: str, hf: str, say: Callable[[str], None] = print, stages: tuple[str, ...] = ()
) -> tuple[GPT, tiktoken.Encoding]:
    """The model and tokenizer of a checkpoint file or folder, or of `hf` if that is not ""; on the CPU.

    A folder with an adapter in PEFT's format gives its base with the adapter merged in. stages: those a
    checkpoint may be of ("pretraining", "sft", "dpo"); none: any.
    """
    if hf:
        return load_hf(hf)
    if (Path(checkpoint) / "adapter_config.json").is_file():
        return load_with_adapter(Path(checkpoint), say)
    named = [stage for stage in ("sft", "dpo") if stage in Path(checkpoint).name]  # as their folders are
    state = open_checkpoint(checkpoint, say, MAKERS[[*stages, *named, "pretraining"][0]])
    stage = state.get("stage", "pretraining")
    if not state["model"] and "adapters" in state:
        folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
        raise SystemExit(f"the checkpoint in {checkpoint} holds only adapters: take {folder / 'adapter'}")
    if stages and stage not in stages:
        makers = " or ".join(f"{name} ({MAKERS[name]})" for name in stages)
        raise SystemExit(f"the checkpoint in {checkpoint} is of {stage}: start from one of {makers}")
    try:
        raw = GPT.from_weights(GPTConfig(**state["model_config"]), state["model"])
    except (TypeError, ValueError, AttributeError) as error:
        raise SystemExit(
            f"the checkpoint in {checkpoint} does not fit together: {one_line(error)}"
        ) from error
    tokenizer = get_tokenizer(state["tokenizer"])
    if tokenizer.n_vocab != raw.config.n_tokens:
        raise SystemExit(
            f"{checkpoint} has {raw.config.n_tokens} token ids, its tokenizer {tokenizer.n_vocab}"
        )
    what = f"{stage}, step {state['step']}, {raw.n_params():,} parameters, tokenizer {tokenizer.name}"
    say(f"{checkpoint}: {what}")
    return raw, tokenizer
