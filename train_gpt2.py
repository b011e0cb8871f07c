"""Pretrain GPT-2 on token shards or on one text file.

    python train_gpt2.py demo                       # a laptop's CPU: input.txt, three minutes, no download
    python train_gpt2.py                            # one GPU: GPT-2 124M on the shards of fineweb.py
    torchrun --nproc_per_node=8 train_gpt2.py       # eight GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST train_gpt2.py    # of two
    python train_gpt2.py gpt2-medium --data=edu_fineweb100B --max_steps=50000

Writes <out_dir>/log.txt and <out_dir>/ckpt_<step>.pt. The same command continues an interrupted run, with the
same losses to the last bit; on another number of devices it sees the same batches. See --help.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import (
    differences,
    find_resume,
    load_model,
    require_checkpoint_space,
    save_in_background,
    without_tensors,
)
from data import Windows, check_shards, get_tokenizer, open_data, prefetch, require_data, step_windows
from files import make_folder
from hellaswag import Questions, evaluate, find_rows, prepare, read_rows
from model import GPT, SIZES, GPTConfig, pad_vocab
from optimizers import keep_zeros, load_moments, make_optimizers, zero_masks
from plot import draw, read_log
from sampling import generate
from training import (
    Dist,
    Log,
    attention_kernel,
    autocast,
    backward,
    barrier,
    check_least,
    check_recipe,
    cleanup,
    cosine_lr,
    count_bad,
    exact_kernels,
    fit_micro_batch,
    parse,
    peak_flops,
    pick_precision,
    require_compiler,
    setup,
    stop_on_signals,
    train_step,
    validate,
    wsd_lr,
)

# By device: steps that are queued behind one before its numbers are read, so that a GPU never waits for us
LAG = {"cuda": 1}


@dataclass(frozen=True)
class Config:
    data: str = "edu_fineweb10B"  # folder of token shards (python fineweb.py), or one .txt file
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # of the shards, or for the .txt file
    out_dir: str = "out/gpt2"  # where log.txt and checkpoints go
    resume: Literal["auto", "never"] = "auto"  # auto: continue out_dir's newest checkpoint; never: refuse
    init_from: str = ""  # start from the weights of this checkpoint, of the same shape; "": random ones
    keep_masks: bool = True  # weights that prune.py made zero stay zero

    model: str = "gpt2"  # a size of model.py's table
    attention: Literal["flash", "manual"] = "flash"  # flash: fused kernels; manual: written out, slower
    T: int = 1024  # sequence length, tokens; becomes the model's block_size
    B: int | None = None  # sequences per forward and device; None: as many as fit. Does not change the curve
    total_batch_size: int = 2**19  # tokens per optimizer step over all devices (GPT-3 paper, table 2.1: 0.5M)

    max_steps: int = 19073  # optimizer steps; 10e9 tokens / 2**19 is one epoch of sample-10BT
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, with AdamW for the rest
    max_lr: float = 6e-4  # peak learning rate (GPT-3 paper, table 2.1)
    min_lr_frac: float = 0.1  # the cosine ends at this share of max_lr (GPT-3 paper, appendix B)
    warmup_steps: int = 715  # linear warmup; 375e6 tokens / 2**19 (GPT-3 paper, appendix B)
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warmup; wsd: level, then linear to the end
    decay_frac: float = 0.2  # wsd: this last share of max_steps goes down
    weight_decay: float = 0.1  # on matrices and embeddings only (GPT-3 paper, appendix B)
    beta1: float = 0.9  # AdamW (GPT-3 paper, appendix B)
    beta2: float = 0.95  # AdamW (GPT-3 paper, appendix B)
    eps: float = 1e-8  # AdamW (GPT-3 paper, appendix B)
    momentum: float = 0.95  # of Muon (Jordan et al. 2024)
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping (GPT-3 paper, appendix B)
    seed: int = 1337  # of the initial weights, the order of the data, and the samples

    eval_every: int = 250  # steps between validation losses and samples
    val_tokens: int = 10_485_760  # tokens a validation, or all there are; the same on any number of devices
    hella_every: int | None = None  # steps between HellaSwag scores; 0: none; None: as eval_every on CUDA
    hella_rows: int = 0  # score only the first so many rows; 0: all
    hella_data: str = ""  # rows, a .jsonl file; "": the validation set, downloaded once
    n_samples: int = 4  # samples each time; 0: none
    sample_tokens: int = 32  # length of a sample, tokens
    prompt: str = "Hello, I'm a language model,"  # what the samples continue
    save_every: int = 250  # steps between checkpoints
    plot: bool = True  # draw Loss.png and Hellaswag.png into out_dir at the end
    keep: int = 2  # newest checkpoints kept; one of gpt2 takes 1.5 GB

    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool | None = None  # torch.compile the training step; None: on CUDA
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


DEMO = Config(
    data=str(Path(__file__).parent / "input.txt"),
    tokenizer="bytes",
    out_dir="out/demo",
    model="demo",
    T=256,
    total_batch_size=8 * 256,
    max_steps=1200,
    min_lr_frac=0.0,
    optimizer="muon",
    momentum=0.9,
    max_lr=1e-2,
    warmup_steps=50,
    val_tokens=2**16,
    eval_every=200,
    hella_every=200,
    hella_data=str(Path(__file__).parent / "demo" / "hellaswag.jsonl"),
    n_samples=2,
    sample_tokens=200,
    prompt="Once upon a time",
    save_every=400,
)

CONFIGS = {
    "gpt2": Config(),
    # learning rates and batches of the GPT-3 paper's table 2.1; steps for 10e9 tokens, warmup for 375e6
    "gpt2-medium": Config(model="gpt2-medium", out_dir="out/gpt2-medium", max_lr=3e-4),
    "gpt2-large": Config(model="gpt2-large", out_dir="out/gpt2-large", max_lr=2.5e-4),
    "gpt2-xl": Config(
        model="gpt2-xl",
        out_dir="out/gpt2-xl",
        max_lr=2e-4,
        total_batch_size=2**20,
        max_steps=9536,
        warmup_steps=357,
    ),
    "gpt3-1.3b": Config(
        model="gpt3-1.3b",
        out_dir="out/gpt3-1.3b",
        T=2048,
        max_lr=2e-4,
        total_batch_size=2**20,
        max_steps=9536,
        warmup_steps=357,
    ),
    "gpt3-2.7b": Config(
        model="gpt3-2.7b",
        out_dir="out/gpt3-2.7b",
        T=2048,
        max_lr=1.6e-4,
        total_batch_size=2**20,
        max_steps=9536,
        warmup_steps=357,
    ),
    "gpt3-6.7b": Config(
        model="gpt3-6.7b",
        out_dir="out/gpt3-6.7b",
        T=2048,
        max_lr=1.2e-4,
        total_batch_size=2**21,
        max_steps=4768,
        warmup_steps=178,
    ),
    "demo": DEMO,
    # Tiny Shakespeare (Karpathy 2015, 1.1 MB) byte by byte, its last tenth held out; 78 s on two cores
    "shakespeare": Config(
        data="tinyshakespeare.txt",
        tokenizer="bytes",
        out_dir="out/shakespeare",
        model="shakespeare",
        T=64,
        total_batch_size=16 * 64,
        max_steps=1600,
        optimizer="muon",
        momentum=0.9,
        max_lr=1e-2,
        min_lr_frac=0.0,
        warmup_steps=30,
        schedule="wsd",
        decay_frac=1.0,  # linear from the first step on
        weight_decay=0.02,
        grad_clip=0.0,
        eval_every=800,
        n_samples=0,
        hella_every=0,
        save_every=1000,
    ),
    "nd-demo": replace(DEMO, model="nd-demo", out_dir="out/nd-demo"),  # the same with NdLinear
    "ndgpt2-96m": Config(model="ndgpt2-96m", out_dir="out/ndgpt2-96m"),
    "ndgpt2-82m": Config(model="ndgpt2-82m", out_dir="out/ndgpt2-82m"),
}


def samples(raw: GPT, cfg: Config, step: int, amp: torch.autocast) -> list[str]:
    """Continuations of the prompt, drawn from (seed, step)."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    prompt = tokenizer.encode_ordinary(cfg.prompt) or [tokenizer.eot_token]
    rows = [list(prompt) for _ in range(cfg.n_samples)]
    seeds = [cfg.seed + step * cfg.n_samples + row for row in range(cfg.n_samples)]
    with amp:
        for tokens in generate(raw, rows, cfg.sample_tokens, top_k=50, seeds=seeds, stop=tokenizer.eot_token):
            for row, token in zip(rows, tokens):
                if token is not None and token != tokenizer.eot_token:
                    row.append(token)
    return [tokenizer.decode(row) for row in rows]


def open_windows(cfg: Config, tokenizer: tiktoken.Encoding, dist: Dist) -> tuple[Windows, Windows]:
    """The training and the validation windows of T + 1 tokens; a folder's shards are checked first."""
    splits = open_data(cfg.data, tokenizer)
    if dist.rank == 0 and Path(cfg.data).is_dir():
        check_shards(cfg.data, tokenizer.n_vocab)
    barrier(dist)
    train, val = (Windows(shards, cfg.T) for shards in splits)
    return train, val


def sequences_per_rank(cfg: Config, dist: Dist) -> int:
    """How many sequences of T tokens a device takes in one step; SystemExit if they do not divide."""
    unit = cfg.T * dist.world_size
    if cfg.total_batch_size % unit:
        raise SystemExit(
            f"total_batch_size={cfg.total_batch_size} is not divisible by T={cfg.T} x {dist.world_size} "
            f"device(s); the next that is: {-(-cfg.total_batch_size // unit) * unit}"
        )
    per_rank = cfg.total_batch_size // unit
    if cfg.B is not None and (cfg.B < 1 or per_rank % cfg.B):
        raise SystemExit(
            f"B={cfg.B} does not divide a device's {per_rank} sequences a step: leave it out to fit"
        )
    return per_rank


def pick_rows(
    cfg: Config, raw: GPT, per_rank: int, state: dict | None, amp: torch.autocast, dist: Dist
) -> int:
    """B, the sequences of one forward pass, where the configuration leaves it open: as many as fit."""
    if state and state["world_size"] == dist.world_size and per_rank % state["B"] == 0:
        return state["B"]  # what fits may have changed since, but the same B keeps the same bits
    on_cuda = dist.device.type == "cuda"
    most = 2**16 if on_cuda else 2**12  # tokens; a GPU is not faster with more, a CPU's caches hold less
    sizes = [
        rows for rows in range(1, per_rank + 1) if per_rank % rows == 0 and rows * cfg.T <= max(most, cfg.T)
    ]
    if not on_cuda:
        return max(sizes)

    def run(rows: int) -> None:
        idx = torch.zeros(rows, cfg.T, dtype=torch.int64, device=dist.device)
        with exact_kernels(), amp:
            raw(idx, idx)[1].backward()

    # what is not there yet: AdamW's moments, unless they were loaded, and DDP's copy of the gradients
    coming = raw.n_params() * ((0 if state else 8) + (4 if dist.world_size > 1 else 0))
    rows = fit_micro_batch(run, sizes, coming, dist.device)
    raw.zero_grad()
    if dist.world_size > 1:  # the fullest GPU decides for all
        fewest = torch.tensor(rows, device=dist.device)
        torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
        rows = int(fewest)
    return rows


def build(
    cfg: Config, n_tokens: int, state: dict | None, dist: Dist, say: Callable[[str], None]
) -> tuple[GPT, list[torch.optim.Optimizer]]:
    """Model and optimizers on the device: fresh from the seed, from init_from, or as `state` has them."""
    if cfg.model not in SIZES:
        raise SystemExit(f"unknown model {cfg.model!r}: expected one of {', '.join(SIZES)}")
    if cfg.init_from and not state:
        start, _ = load_model(cfg.init_from, "", say)
    # OpenAI's weights come without padding, and a run that began with them goes on without
    vocab_size = state["model_config"]["vocab_size"] if state else pad_vocab(n_tokens)
    vocab_size = start.config.vocab_size if cfg.init_from and not state else vocab_size
    shape = SIZES[cfg.model] | dict(block_size=cfg.T, n_tokens=n_tokens, vocab_size=vocab_size)
    config = GPTConfig(**shape, attention=cfg.attention)
    if state and (state.get("stage") != "pretraining" or "optimizers" not in state):
        raise SystemExit(f"the checkpoint in {cfg.out_dir} is not of train_gpt2.py: choose another --out_dir")
    # an older checkpoint may not name what has a default
    if state and (changed := differences(asdict(GPTConfig(**state["model_config"])), asdict(config))):
        raise SystemExit(
            f"the checkpoint in {cfg.out_dir} is of another model ({changed}): choose another --out_dir"
        )
    torch.manual_seed(cfg.seed)
    if state:
        raw = GPT.from_weights(config, state["model"])
    elif cfg.init_from:
        if changed := differences(
            asdict(start.config), asdict(config) | dict(attention=start.config.attention)
        ):
            raise SystemExit(f"the model in {cfg.init_from} has another shape ({changed})")
        raw = GPT.from_weights(config, start.state_dict())
    else:
        raw = GPT(config)
    try:
        raw.to(dist.device)
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(f"{cfg.model} does not fit into the memory of {dist.device}") from error
    betas = (cfg.beta1, cfg.beta2)
    settings = dict(weight_decay=cfg.weight_decay, betas=betas, eps=cfg.eps, momentum=cfg.momentum)
    optimizers = make_optimizers(raw, optimizer=cfg.optimizer, **settings)
    if state and state["config"]["optimizer"] != cfg.optimizer:
        raise SystemExit(
            f"the checkpoint in {cfg.out_dir} was trained with --optimizer={state['config']['optimizer']}"
        )
    if state:
        load_moments(optimizers, state["optimizers"])
    if cfg.keep_masks and (masks := zero_masks(raw)):
        keep_zeros(optimizers, raw, masks)
        say(f"{len(masks)} pruned matrices: their zeros stay zero")
    return raw, optimizers


def save(
    pool: ThreadPoolExecutor, cfg: Config, raw: GPT, optimizers: list[torch.optim.Optimizer], **facts: object
) -> Future:
    """Begin to write a checkpoint: all that `main` needs to go on, and what later stages want to know."""
    state = dict(
        stage="pretraining",
        model=raw.state_dict(),
        optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers],
        model_config=asdict(raw.config),
        config=asdict(cfg),
        tokenizer=cfg.tokenizer,
        **facts,
    )
    return save_in_background(pool, Path(cfg.out_dir), state, cfg.keep)


def load_questions(
    cfg: Config, tokenizer: tiktoken.Encoding, dist: Dist, say: Callable[[str], None]
) -> Questions | None:
    """HellaSwag's rows, ready to be scored; None where they are not wanted or, as it says, cannot be had."""
    if cfg.hella_every == 0 or (cfg.hella_every is None and dist.device.type != "cuda"):
        return None
    try:
        rows = read_rows(find_rows(cfg.hella_data, dist), cfg.hella_rows, say)
    except SystemExit as error:
        if cfg.hella_data or dist.world_size > 1:  # the other ranks are waiting
            raise SystemExit(f"{error}; --hella_every=0 trains without it") from error
        say(f"HellaSwag is left out: {error}")
        return None
    return prepare(rows, tokenizer, "completion", cfg.T, say)


def learning_rate(cfg: Config) -> Callable[[int], float]:
    """The schedule: a step's learning rate."""
    names = ("max_steps", "warmup_steps", "max_lr", "min_lr_frac")
    settings = {name: getattr(cfg, name) for name in names}
    if cfg.schedule == "wsd":
        return partial(wsd_lr, **settings, decay_frac=cfg.decay_frac)
    return partial(cosine_lr, **settings)


def slow_on_cpu(cfg: Config, raw: GPT) -> str:
    """A warning, where a step would keep a CPU of 0.1 TFLOP/s busy for more than two minutes; else ""."""
    seconds = raw.flops_per_token(cfg.T) * cfg.total_batch_size / 1e11
    if seconds < 120:
        return ""
    return (
        f"a step may take a CPU {timedelta(seconds=round(seconds))}: lower --total_batch_size, take a "
        "smaller --model, or begin with `python train_gpt2.py demo`"
    )


def table(cfg: Config, raw: GPT, n_tokens: int, scores: dict[str, float], seconds: float) -> str:
    """This run, beside GPT-2 124M and GPT-3 124M where they can be compared, as text."""
    speed = f"{n_tokens / seconds:,.0f}"
    val, hella = (f"{scores[name]:.4f}" if name in scores else "-" for name in ("val", "hella"))
    size, hours = f"{raw.n_params():,}", f"{seconds / 3600:.2f}"
    rows = [
        ("", "validation loss", "HellaSwag", "parameters", "tokens", "hours", "tok/s"),
        (cfg.out_dir, val, hella, size, f"{n_tokens:,}", hours, speed),
    ]
    if cfg.tokenizer == "gpt2" and not cfg.hella_data:  # GPT-2's loss is of FineWeb-Edu's first shard
        rows.append(("GPT-2 124M", "3.2924", "0.2955", "124,439,808", "-", "-", "-"))
        rows.append(("GPT-3 124M", "-", "0.3370", "125,000,000", "300,000,000,000", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main(cfg: Config) -> None:
    """Train until max_steps; evaluate, sample and save on the way."""
    check_least(cfg, 1, "T", "total_batch_size", "max_steps", "eval_every", "save_every", "keep")
    check_least(cfg, 0, "n_samples", "sample_tokens")
    check_recipe(cfg)
    dist = setup(cfg.device, cfg.deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not cfg.deterministic)  # fast for the one shape of training
    stop_requested = stop_on_signals()
    per_rank = sequences_per_rank(cfg, dist)
    N = per_rank * dist.world_size  # sequences a step

    require_data(cfg.data)  # before the vocabulary, which may have to be fetched
    tokenizer = get_tokenizer(cfg.tokenizer)
    train, val = open_windows(cfg, tokenizer, dist)

    # model, optimizer and log, continued where a checkpoint is
    out_dir = Path(cfg.out_dir)
    make_folder(out_dir)
    log = Log(out_dir, dist)
    state = find_resume(out_dir, cfg.resume, dist, log.note)
    raw, optimizers = build(cfg, tokenizer.n_vocab, state, dist, log.note)
    state = without_tensors(state)
    questions = load_questions(cfg, tokenizer, dist, log.note)
    if dist.rank == 0:
        require_checkpoint_space(out_dir, raw.n_params(), cfg.keep)

    # the training forward is compiled and wrapped as `model`; everything else uses `raw`
    precision = pick_precision(cfg.precision, dist.device)
    amp = autocast(precision, dist.device)
    B = cfg.B or pick_rows(cfg, raw, per_rank, state, amp, dist)
    compiled = dist.device.type == "cuda" if cfg.compile is None else cfg.compile
    if compiled:
        require_compiler(dist.device)
    # one graph for one shape: what would break it or change is an error, not a slow run
    model: nn.Module = torch.compile(raw, fullgraph=True, dynamic=False) if compiled else raw
    if dist.world_size > 1:
        model = DistributedDataParallel(model)

    def loss_fn(model: nn.Module, batch: dict) -> Tensor:
        with amp:
            return model(batch["x"], batch["y"], reduction="sum")[1]

    def read(step: int) -> Tensor:
        mine = step_windows(step, N, len(train), cfg.seed)[dist.rank * per_rank : (dist.rank + 1) * per_rank]
        xy = torch.from_numpy(train.read(mine))  # (per_rank, T + 1)
        return xy.pin_memory() if dist.device.type == "cuda" else xy

    def split(xy: Tensor) -> list[dict]:
        xy = xy.to(dist.device, non_blocking=True)
        return [dict(x=rows[:, :-1], y=rows[:, 1:], n=len(rows) * cfg.T) for rows in xy.split(B)]

    if compiled or dist.world_size > 1:
        # Compile outside the clock. And after its first backward DDP regroups the gradients it sums, which
        # moves the last bits: a resumed run must be past that before its first step too.
        backward(model, split(read(0))[0], loss_fn, 1.0)
        raw.zero_grad()

    log.header(cfg, device=dist.device, devices=dist.world_size, B=B)
    if state:
        changed = differences(state["config"], asdict(cfg)) or "nothing"
        log.note(f"continuing {out_dir} from step {state['step']}; changed: {changed}")
    kernel = attention_kernel(raw.config, B, cfg.T, amp, dist.device)
    log.note(
        f"{cfg.model}: {raw.n_params():,} parameters, {len(train):,} training windows of {cfg.T} tokens\n"
        f"{dist.world_size} x {dist.device.type}, {precision}, attention by {kernel}, "
        f"{'compiled' if compiled else 'not compiled'}; a step is {cfg.total_batch_size:,} tokens, "
        f"{per_rank // B} x B={B} sequences a device"
    )
    if dist.device.type == "cpu" and (warning := slow_on_cpu(cfg, raw)):
        log.note(warning)
    if cfg.warmup_steps >= cfg.max_steps:
        log.note(
            f"the warmup of {cfg.warmup_steps} steps is as long as the run or longer: lower --warmup_steps"
        )
    start = state["step"] if state else 0
    if start > cfg.max_steps:
        raise SystemExit(f"the run in {out_dir} is at step {start} already, and max_steps={cfg.max_steps}")
    scores = state["scores"] if state else {}  # the latest
    n_tokens = state.get("tokens", start * state["config"]["total_batch_size"]) if state else 0  # trained on
    began = time.perf_counter() - (state["seconds"] if state else 0)
    peak = peak_flops(dist.device)
    lr_at = learning_rate(cfg)
    batches = prefetch(read, start, cfg.max_steps)
    pending: deque[tuple[int, float, Callable]] = deque()  # step, learning rate, and how to read its numbers
    lag = LAG.get(dist.device.type, 0)
    writer, writing = ThreadPoolExecutor(1), None  # the checkpoint on its way to the disk
    bad_steps, stopped, clock = 0, False, time.perf_counter()
    for step in range(start, cfg.max_steps + 1):
        last = step == cfg.max_steps
        evaluating = step % cfg.eval_every == 0 or last
        scoring = questions is not None and (step % (cfg.hella_every or cfg.eval_every) == 0 or last)
        saving = step > start and (step % cfg.save_every == 0 or last)
        while len(pending) > (0 if evaluating or scoring or saving or stopped else lag):
            done, lr, read_numbers = pending.popleft()
            out = read_numbers()
            dt, clock = time.perf_counter() - clock, time.perf_counter()
            log.scalars(done, train=out.loss, lr=lr, norm=out.grad_norm)
            mfu = peak and raw.flops_per_token(cfg.T) * cfg.total_batch_size / dt / (peak * dist.world_size)
            log.line(done, cfg.max_steps, out, lr, dt, cfg.total_batch_size, mfu)
            bad_steps, stopped = count_bad(bad_steps, out), stopped or out.stop
        if evaluating and not stopped:
            scores["val"] = validate(raw, val, cfg.val_tokens, B, amp, dist)
            log.scalars(step, val=scores["val"], tokens=n_tokens, seconds=time.perf_counter() - began)
            log.note(f"step {step}: validation loss {scores['val']:.4f}")
            for text in samples(raw, cfg, step, amp) if dist.rank == 0 and cfg.n_samples else []:
                log.note(f"  > {text}")
        if scoring and not stopped:
            scores["hella"] = evaluate(raw, questions, amp, dist).accuracy["per token"]
            log.scalars(step, hella=scores["hella"])
            log.note(
                f"step {step}: HellaSwag {scores['hella']:.4f} (acc_norm, {len(questions.label):,} rows)"
            )
        seconds = time.perf_counter() - began
        if writing and (writing.done() or saving or stopped):
            writing.result()  # one at a time; and a full disk ends the run
        if dist.rank == 0 and (saving or stopped and step > start):
            facts = dict(step=step, tokens=n_tokens, scores=scores, seconds=seconds)
            facts |= dict(B=B, world_size=dist.world_size)
            writing = save(writer, cfg, raw, optimizers, **facts)
        if last or stopped:
            break
        if not pending:  # the time of what came between does not count as the step's
            clock = time.perf_counter()

        micro_batches, lr, stop = split(next(batches)), lr_at(step), stop_requested()
        limits = dict(lr=lr, grad_clip=cfg.grad_clip, dist=dist, stop=stop)
        pending.append((step, lr, train_step(model, optimizers, micro_batches, loss_fn, **limits)))
        n_tokens += cfg.total_batch_size

    if writing:
        writing.result()
    if stopped:
        log.note(f"stopped at step {step}; the same command continues")
    elif dist.rank == 0:
        log.note(table(cfg, raw, n_tokens, scores, seconds))
        if cfg.plot:
            draw([(out_dir.name, *read_log(out_dir))], out_dir)
    cleanup(dist)


if __name__ == "__main__":
    main(parse(CONFIGS, __doc__))
