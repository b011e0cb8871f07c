"""Checkpoint files, and `load_model`, which opens a model from any source."""

import zipfile
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.distributed
from torch import Tensor

from neogpt import data, files, hf, lora, model, runtime

SCRIPT_OF_STAGE = {"pretraining": "train_gpt2.py", "sft": "sft.py", "dpo": "dpo.py", "grpo": "grpo.py"}
FORMAT = 2  # increase when a key changes its meaning


@dataclass(frozen=True)
class Checkpoint:
    """Every key of a checkpoint file. Values are tensors and plain Python values."""

    stage: str  # a key of SCRIPT_OF_STAGE
    step: int  # optimizer steps done
    model: dict[str, Tensor]  # the state dict; adapters are merged
    model_config: dict[str, Any]  # of GPTConfig
    tokenizer: str  # "gpt2" or "bytes"
    config: dict[str, Any] = field(default_factory=dict)  # constants of the script
    facts: dict[str, str] = field(default_factory=dict)  # see Run.identify
    optimizers: list[dict] | None = None  # moments of each optimizer; None: the run cannot continue from here
    adapters: dict[str, Tensor] = field(default_factory=dict)  # LoRA matrices that are being trained
    base: str = ""  # fine-tuning: fingerprint of the weights that it started from
    n_sequences: int = 0  # position in the data: sequences (pretraining), rows (sft), pairs (dpo), prompts (grpo) seen
    n_tokens: int = 0  # tokens seen, without padding
    seconds: float = 0.0  # wall-clock time
    scores: dict[str, Any] = field(default_factory=dict)  # the latest values; best: the lowest val
    B: int = 0  # micro-batch size; the same B gives the same bits
    world_size: int = 1
    pruned: dict[str, Any] = field(default_factory=dict)  # constants of prune.py, if it wrote the file
    format: int = FORMAT


def write(path: Path, ckpt: Checkpoint) -> None:
    """Write one checkpoint file atomically."""
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(vars(ckpt), file)
        except RuntimeError as error:  # raised by torch.save while it handles the OSError of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save(folder: Path, ckpt: Checkpoint, keep_last: int, best: bool = False) -> None:
    """Write folder/ckpt_<step>.pt and, if `best`, best.pt without moments; keep only the newest `keep_last` files."""
    path = folder / f"ckpt_{ckpt.step:06d}.pt"
    if best:
        write(folder / "best.pt", replace(ckpt, optimizers=None, adapters={}))
    write(path, ckpt)
    checkpoints = list_checkpoints(folder)
    # files of later steps were not readable when the run was resumed, so they do not count
    for old in checkpoints[checkpoints.index(path) + keep_last :]:
        old.unlink()


@torch.no_grad()
def save_async(pool: Executor | None, folder: Path, ckpt: Checkpoint, keep_last: int, best: bool) -> Future | None:
    """`save` on the pool's only thread. Returns when the tensors are copied (CPU) or their copies are queued (CUDA).
    Sharded tensors are gathered one by one, for which all ranks must call it. Without a pool, nothing is written.
    """
    copies: dict[int, Tensor] = {}  # by address, so that tied weights stay one tensor

    def to_host(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: to_host(item) for key, item in value.items()}
        if isinstance(value, list):
            return [to_host(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        sharded = runtime.is_sharded(value)
        key = id(value) if sharded else value.data_ptr()  # tied parameters of state_dict(keep_vars=True) are one object
        if key not in copies:
            whole = value.full_tensor() if sharded else value
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda) if pool else None
            copies[key] = host.copy_(whole, non_blocking=whole.is_cuda) if pool else value
        return copies[key]

    ckpt = Checkpoint(**to_host(vars(ckpt)))
    if not pool:
        return None
    if any(host.is_pinned() for host in copies.values()):
        pool.submit(torch.cuda.current_stream().record_event().synchronize)
    return pool.submit(save, folder, ckpt, keep_last, best)


def require_space(folder: Path, n_bytes: int, keep_last: int, n_bytes_best: int = 0) -> None:
    """Raise OSError unless keep_last + 1 checkpoints of n_bytes and best.pt fit on the disk instead of the old ones."""
    paths = [*list_checkpoints(folder)[:keep_last], *folder.glob("best.pt")]
    n_new = (keep_last + 1) * n_bytes + n_bytes_best - sum(path.stat().st_size for path in paths)
    files.require_space(folder, n_new, f"writing one more than --keep_last={keep_last} checkpoints")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, highest step first."""
    paths = [path for path in Path(folder).glob("ckpt_*.pt") if path.stem[5:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[5:]), reverse=True)


def check(ckpt: Checkpoint) -> None:
    """Raise ValueError or TypeError unless every value has its type; shapes are checked where the values are used."""

    def is_map(value: Any, key: type, item: Any) -> bool:
        return isinstance(value, dict) and all(type(k) is key and isinstance(v, item) for k, v in value.items())

    maps = [(ckpt.model, Tensor), (ckpt.adapters, Tensor), (ckpt.scores, (int, float)), (ckpt.facts, str)]
    is_valid = files.matches(vars(ckpt) | dict(optimizers=None), vars(Checkpoint("", 0, {}, {}, "")))
    is_valid = is_valid and ckpt.stage in SCRIPT_OF_STAGE and all(is_map(value, str, item) for value, item in maps)
    states = [] if ckpt.optimizers is None else ckpt.optimizers
    is_valid = is_valid and isinstance(states, list) and all(is_map(state, int, dict) for state in states)
    if not (is_valid and all(is_map(moments, str, Tensor) for state in states for moments in state.values())):
        raise ValueError("a value has the wrong type or range")
    model.GPTConfig(**ckpt.model_config)  # raises, if it is invalid or of another version


def read(path: Path, verify: bool = True) -> Checkpoint:
    """Read a checkpoint without unpickling objects. Raises ValueError. verify: check all CRCs; else map the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:  # torch does not compress
                raise ValueError("its entries are compressed")
            if verify and archive.testzip():  # torch.load ignores the CRCs
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
        if state["format"] not in (1, FORMAT):
            raise ValueError(f"format {state['format']}, expected {FORMAT}")
        state = upgrade(state) if state["format"] == 1 else state
        ckpt = Checkpoint(**{f.name: state[f.name] for f in fields(Checkpoint) if f.name in state})
        check(ckpt)
        return ckpt
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        reason = files.one_line(error)
        if "Weights only load failed" in reason:
            reason = "it holds Python objects, which are never loaded"
        elif isinstance(error, (KeyError, TypeError)):
            reason = f"it was not written by NeoGPT ({reason})"
        raise ValueError(f"cannot use the checkpoint {path}: {reason}") from error


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of format 1 with the keys of format 2."""
    config, step, scores = state.get("config", {}), state["step"], state.get("scores", {})
    tokens_per_step = config.get("total_batch_size", 0)  # sft.py and dpo.py counted no tokens
    per_step = config.get("rows_per_step") or config.get("pairs_per_step") or tokens_per_step // config.get("T", 1)
    if isinstance(scores.get("best"), tuple):  # dpo.py stored (loss, margin, step)
        scores = scores | dict(best=scores["best"][0])
    model_config = state["model_config"] | dict(mlp_width=state["model_config"].get("mlp_width") or None)
    position = dict(n_sequences=step * per_step, n_tokens=state.get("tokens", step * tokens_per_step))
    return dict(stage="pretraining") | state | position | dict(model_config=model_config, scores=scores)


def read_newest(source: str | Path, stages: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint in a file, or the newest readable one in a folder. stages: for the message if there is none."""
    source = Path(source)
    candidates = [source] if source.is_file() else list_checkpoints(source)
    if not candidates:
        scripts = " or ".join(SCRIPT_OF_STAGE[stage] for stage in stages or SCRIPT_OF_STAGE)
        raise FileNotFoundError(f"no checkpoint in {source}: write it with {scripts}, or name another checkpoint")
    for candidate in candidates[:-1]:
        try:
            return read(candidate)
        except ValueError as error:
            runtime.print0(f"{error}; trying the one before it")
    return read(candidates[-1])


def find_resume(folder: Path, rt: runtime.Runtime, branch_from: str = "") -> Checkpoint | None:
    """The newest readable checkpoint of a folder or, if it has none, branch_from, on all ranks; None for a new run."""
    ckpt, selected = None, [""]
    if rt.rank == 0 and list_checkpoints(folder):
        ckpt = read_newest(folder)
        selected = [f"ckpt_{ckpt.step:06d}.pt"]
    elif rt.rank == 0 and branch_from:
        ckpt, selected = read(Path(branch_from)), [str(Path(branch_from).resolve())]
    if rt.world_size > 1:
        torch.distributed.broadcast_object_list(selected)
        path = folder / selected[0]
        if not all(runtime.all_gather(not selected[0] or path.is_file(), rt)):
            raise ValueError(f"not every rank sees {path}: all nodes must share the folder {path.parent}")
        if rt.rank and selected[0]:
            ckpt = read(path, verify=False)  # memory-mapped: a node holds it in memory once
    if rt.rank == 0:
        for incomplete in folder.glob("*.pt.tmp"):
            incomplete.unlink()
    return ckpt


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The changed constants of a configuration: "max_lr 0.0006 -> 0.001, B None -> 8"; "" if there are none."""
    changed = [key for key in new if key in old and repr(old[key]) != repr(new[key])]
    return ", ".join(f"{key} {old[key]} -> {new[key]}" for key in changed)


def to_model(ckpt: Checkpoint) -> model.GPT:
    """The model of a checkpoint, in fp32. Raises ValueError if its weights do not fit its configuration."""
    return model.GPT.from_weights(model.GPTConfig(**ckpt.model_config), ckpt.model).float()


class Loaded(NamedTuple):
    """A model from `load_model`."""

    raw: model.GPT  # fp32, on the CPU
    tokenizer: tiktoken.Encoding
    stage: str  # a key of SCRIPT_OF_STAGE
    step: int  # optimizer steps of that stage; 0 if unknown


def load_model(source: str, stages: tuple[str, ...] = ()) -> Loaded:
    """Open a model: an out_dir (its newest checkpoint), a checkpoint file, an adapter folder of PEFT (merged into its
    base), a folder of Hugging Face, or a name on the hub. stages: accepted; () for all. Raises ValueError or OSError.
    """
    path = Path(source)
    # a path that does not exist can be a name on the hub
    is_local = path.exists() or path.suffix == ".pt" or source.startswith(("out/", "/", "."))
    is_adapter, is_hf = (path / "adapter_config.json").is_file(), (path / "config.json").is_file() or not is_local
    ckpt = None if is_adapter or is_hf else read_newest(path, stages)
    try:
        if is_adapter:
            base, _, _ = lora.read_adapter_config(path)
            if Path(base).resolve() == path.resolve():
                raise ValueError("the adapter is its own base")
            loaded = load_model(base)
            return Loaded(lora.apply_adapter(loaded.raw, path), loaded.tokenizer, "sft", 0)
        stage, step = (ckpt.stage, ckpt.step) if ckpt else hf.read_origin(source)
        if stage and stages and stage not in stages:
            expected = " or ".join(f"{stage} ({SCRIPT_OF_STAGE[stage]})" for stage in stages)
            raise ValueError(f"it is of stage {stage}, expected {expected}")
        raw = to_model(ckpt) if ckpt else hf.load(source)
        name = {50257: "gpt2", 257: "bytes"}.get(raw.config.n_tokens, f"of {raw.config.n_tokens} ids")
        tokenizer = data.get_tokenizer(ckpt.tokenizer if ckpt else name)
        if tokenizer.n_vocab != raw.config.n_tokens:
            raise ValueError(f"it has {raw.config.n_tokens} token ids, but its tokenizer has {tokenizer.n_vocab}")
    except Exception as error:  # JSON, safetensors, the hub and wrong shapes raise many kinds
        where = "" if is_local else ", which is not a local file or folder, from the Hugging Face hub"
        raise ValueError(f"cannot load {source}{where}: {files.one_line(error)}") from error
    stage = stage or "pretraining"
    runtime.print0(f"{source}: {stage}, step {step}, {raw.n_params():,} parameters, {tokenizer.name} tokens")
    return Loaded(raw, tokenizer, stage, step)


def refuse_own_folder(out_dir: str, source: str) -> None:
    """Raise ValueError if a run would write into the folder of the checkpoint that it starts from."""
    start = Path(source).resolve()
    if Path(out_dir).resolve() in (start, start.parent):
        raise ValueError(f"--out_dir={out_dir} holds the checkpoint to start from: use another --out_dir")
