"""Pretrain GPT-2 on token shards or on a text file.

    python train_gpt2.py demo                       # on a laptop CPU: input.txt, 2 to 4 minutes, no download
    python train_gpt2.py                            # one GPU: GPT-2 124M on the shards of fineweb.py
    torchrun --nproc_per_node=8 train_gpt2.py       # eight GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST train_gpt2.py    # first of two nodes

Writes <out_dir>/log.txt and <out_dir>/ckpt_<step>.pt. The same command continues an interrupted run with the same
losses, bit for bit; on another number of devices it sees the same batches.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

import hellaswag
from neogpt import checkpoint, config, data, generate, model, optim, runtime, training
from neogpt.run import Run


@dataclass(frozen=True)
class Config:
    data: str = "edu_fineweb10B"  # folder of token shards (fineweb.py), several ('edu-*' or A,B), or one .txt file
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # of the shards, or for the .txt file
    out_dir: str = "out/gpt2"  # where log.txt and checkpoints go
    init_from: str = ""  # start from the weights of this model, as --checkpoint of sft.py; "": random weights
    branch_from: str = ""  # continue this checkpoint file of another run; the learning rates before it must be equal
    model: str = "gpt2"  # a name in SIZES of neogpt/model.py
    attention: Literal["flash", "manual"] = "flash"  # flash: fused kernels; manual: written out, slower
    residual: Literal["auto", "fp32", "bf16"] = "auto"  # dtype of the residual stream in bf16 runs; auto: bf16 on CUDA
    T: config.PositiveInt = 1024  # sequence length, tokens; becomes the model's block_size
    B: config.PositiveInt | None = None  # micro-batch size; does not change the curve; None: as many as fit
    sharded: bool = False  # divide weights, gradients and moments among the devices (FSDP2), for models of billions
    recompute: bool = False  # compute activations again in the backward pass: a third more work, much less memory
    total_batch_size: config.PositiveInt = 2**19  # tokens per step of all devices (GPT-3 paper, table 2.1: 0.5M)

    max_steps: config.PositiveInt = 19073  # optimizer steps; 10e9 tokens / 2**19 is one epoch of sample-10BT
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    max_lr: config.NonNegativeFloat = 6e-4  # peak learning rate (GPT-3 paper, table 2.1)
    min_lr_frac: config.Fraction = 0.1  # the schedule ends at this fraction of max_lr (GPT-3 paper, appendix B)
    warmup_steps: config.NonNegativeInt = 715  # linear warmup; 375e6 tokens / 2**19 (GPT-3 paper, appendix B)
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warmup; wsd: constant, then linear decay
    decay_frac: config.Fraction = 0.2  # wsd: the fraction of max_steps that decays
    weight_decay: config.NonNegativeFloat = 0.1  # on matrices and embeddings only (GPT-3 paper, appendix B)
    beta1: config.Decay = 0.9  # AdamW (GPT-3 paper, appendix B)
    beta2: config.Decay = 0.95  # AdamW (GPT-3 paper, appendix B)
    eps: config.NonNegativeFloat = 1e-8  # AdamW (GPT-3 paper, appendix B)
    momentum: config.Decay = 0.95  # Muon (Jordan et al. 2024)
    grad_clip: config.NonNegativeFloat = 1.0  # largest gradient norm; 0: no clipping (GPT-3 paper, appendix B)
    seed: config.Seed = 1337  # of initial weights, data order and samples
    eval_every: config.PositiveInt = 250  # steps between validation losses and samples
    val_tokens: config.PositiveInt = 10_485_760  # validation tokens; all if there are fewer
    hellaswag_every: config.NonNegativeInt | None = None  # steps between scores; 0: never; None: eval_every on CUDA
    hellaswag_rows: config.PositiveInt | None = None  # score only this many rows; None: all
    hellaswag_data: str = ""  # rows, a .jsonl or .parquet file; "": the validation set, downloaded once
    n_samples: config.NonNegativeInt = 4  # samples at each evaluation
    sample_tokens: config.NonNegativeInt = 32  # length of a sample, tokens
    prompt: str = "Hello, I'm a language model,"  # what the samples continue
    save_every: config.PositiveInt = 250  # steps between checkpoints
    keep_last: config.PositiveInt = 2  # number of newest checkpoints to keep; one of gpt2 takes 1.5 GB
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""  # show the values of log.txt there too; "": nowhere
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool | None = None  # torch.compile the training step; None: on CUDA
    deterministic: bool = True  # CUDA kernels that give the same bits every time: a resumed run is exact


DEMO = Config(
    data=str(config.ROOT / "input.txt"),
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
    hellaswag_every=200,
    hellaswag_data=str(config.ROOT / "demo" / "hellaswag.jsonl"),
    n_samples=2,
    sample_tokens=200,
    prompt="Once upon a time",
    save_every=400,
)
# batches of the GPT-3 paper's table 2.1 for the larger models; steps for 10e9 tokens, warmup for 375e6
BATCH_1M = Config(total_batch_size=2**20, max_steps=9536, warmup_steps=357)
BATCH_2M = Config(total_batch_size=2**21, max_steps=4768, warmup_steps=178)
CONFIGS = {
    "gpt2": Config(),
    "gpt2-medium": Config(model="gpt2-medium", out_dir="out/gpt2-medium", max_lr=3e-4),
    "gpt2-large": Config(model="gpt2-large", out_dir="out/gpt2-large", max_lr=2.5e-4),
    "gpt2-xl": replace(BATCH_1M, model="gpt2-xl", out_dir="out/gpt2-xl", max_lr=2e-4),
    "gpt3-1.3b": replace(BATCH_1M, model="gpt3-1.3b", out_dir="out/gpt3-1.3b", T=2048, max_lr=2e-4),
    "gpt3-2.7b": replace(BATCH_1M, model="gpt3-2.7b", out_dir="out/gpt3-2.7b", T=2048, max_lr=1.6e-4),
    "gpt3-6.7b": replace(BATCH_2M, model="gpt3-6.7b", out_dir="out/gpt3-6.7b", T=2048, max_lr=1.2e-4),
    "demo": DEMO,
    # Tiny Shakespeare as bytes; 78 s on two CPU cores. The README says where to download it.
    "shakespeare": replace(
        DEMO,
        data="tinyshakespeare.txt",
        out_dir="out/shakespeare",
        model="shakespeare",
        T=64,
        total_batch_size=16 * 64,
        max_steps=1600,
        warmup_steps=30,
        schedule="wsd",
        decay_frac=1.0,
        weight_decay=0.02,
        grad_clip=0.0,
        val_tokens=2**20,
        eval_every=800,
        n_samples=0,
        hellaswag_every=0,
        save_every=1000,
    ),
    "nd-demo": replace(DEMO, model="nd-demo", out_dir="out/nd-demo"),
    "ndgpt2-96m": Config(model="ndgpt2-96m", out_dir="out/ndgpt2-96m"),
    "ndgpt2-82m": Config(model="ndgpt2-82m", out_dir="out/ndgpt2-82m"),
}


def check(cfg: Config, world_size: int) -> int:
    """Raise ValueError for the first constant that is out of range. Returns the sequences per device and step."""
    if cfg.model not in model.SIZES:
        raise ValueError(f"--model={cfg.model}: expected one of {', '.join(model.SIZES)}")
    if cfg.branch_from and cfg.init_from:
        raise ValueError(f"--init_from={cfg.init_from} with --branch_from={cfg.branch_from}: use one of them")
    if start := cfg.branch_from or cfg.init_from:
        checkpoint.refuse_own_folder(cfg.out_dir, start)
    unit = cfg.T * world_size
    per_rank, rest = divmod(cfg.total_batch_size, unit)
    if rest:
        raise ValueError(f"--total_batch_size={cfg.total_batch_size} must be a multiple of T x devices = {unit}")
    if cfg.B and per_rank % cfg.B:
        raise ValueError(f"--B={cfg.B} does not divide the {per_rank} sequences per device and step: omit it")
    return per_rank


def lr_schedule(cfg: Config) -> Callable[[int], float]:
    """Step -> learning rate."""
    return optim.schedule(cfg.schedule, cfg.max_steps, cfg.warmup_steps, cfg.max_lr, cfg.min_lr_frac, cfg.decay_frac)


def check_branch(cfg: Config, start: checkpoint.Checkpoint) -> None:
    """Raise ValueError unless the steps before a branch had the learning rates of this configuration."""
    names = "schedule", "max_steps", "warmup_steps", "max_lr", "min_lr_frac", "decay_frac"
    if missing := {*names} - start.config.keys():
        raise ValueError(f"--branch_from={cfg.branch_from}: its configuration has no {min(missing)}")
    old, new = lr_schedule(replace(cfg, **{name: start.config[name] for name in names})), lr_schedule(cfg)
    if changed := [step for step in range(start.step) if old(step) != new(step)]:
        rates = f"the learning rate of step {changed[0]} was {old(changed[0]):.6g} and would be {new(changed[0]):.6g}"
        raise ValueError(f"--branch_from={cfg.branch_from}: {rates}; use --schedule=wsd, and branch before the decay")


def expected_config(cfg: Config, n_tokens: int, auto: str = "fp32") -> model.GPTConfig:
    """The shape of the model. n_tokens: number of ids of the tokenizer; auto: the residual stream if it is "auto"."""
    residual = auto if cfg.residual == "auto" else cfg.residual
    shape = model.SIZES[cfg.model] | dict(block_size=cfg.T, attention=cfg.attention, residual=residual)
    return model.GPTConfig(**shape, n_tokens=n_tokens, vocab_size=model.pad_vocab(n_tokens))


def build_model(run: Run) -> model.GPT:
    """The model on the CPU: resumed, from init_from, or with random weights. Raises ValueError on another shape."""
    cfg, resumed, auto = run.cfg, run.resumed, runtime.residual_dtype(run.rt.device)
    auto = resumed.model_config.get("residual", "fp32") if resumed else auto  # a resumed run keeps its dtype
    expected = expected_config(cfg, run.tokenizer.n_vocab, auto)
    if resumed:
        if changed := checkpoint.differences(resumed.config, dict(optimizer=cfg.optimizer)):
            raise ValueError(f"{cfg.branch_from or cfg.out_dir} has another {changed}: keep the old or start a new run")
        if run.trunk_log:  # the branch starts; later it is resumed as any run
            check_branch(cfg, resumed)
        raw = checkpoint.to_model(resumed)
    elif cfg.init_from:
        raw = checkpoint.load_model(cfg.init_from).raw
    else:
        torch.manual_seed(cfg.seed)
        return model.GPT(expected)
    start, weights = replace(raw.config, attention=cfg.attention, residual=expected.residual), raw.state_dict()
    if cfg.T < start.block_size and not resumed:  # the first positions serve shorter sequences
        start = replace(start, block_size=cfg.T)
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: cfg.T].clone()
    # OpenAI's vocabulary is not padded, and a run that starts from its weights keeps that size
    if changed := checkpoint.differences(asdict(start), asdict(expected) | dict(vocab_size=start.vocab_size)):
        where = cfg.branch_from or (f"{cfg.out_dir}, use another --out_dir" if resumed else cfg.init_from)
        raise ValueError(f"--model={cfg.model} has another shape ({changed}) than the model in {where}")
    return model.GPT.from_weights(start, weights)


def make_batch(xy: Tensor, B: int, n: int) -> training.Batch:
    """This rank's windows, (rows, T + 1), in a step of n sequences -> micro-batches of B sequences."""
    T = xy.size(1) - 1
    return training.Batch([dict(x=rows[:, :-1], y=rows[:, 1:], n=len(rows) * T) for rows in xy.split(B)], n, n * T)


def loss_fn(net: nn.Module, batch: dict) -> tuple[Tensor, dict]:
    """The cross-entropy of a micro-batch, summed over its tokens."""
    with runtime.single_shape_attention():
        return net(batch["x"], batch["y"], reduction="sum"), {}


def print_samples(run: Run) -> None:
    """Print continuations of the prompt. The seeds depend on cfg.seed and the step."""
    cfg, n, eot = run.cfg, run.cfg.n_samples, run.tokenizer.eot_token
    raw = run.full_model() if n and run.step else None  # on all ranks; most models are untrained at step 0
    if run.rt.rank or not raw:
        return
    prompt = run.tokenizer.encode_ordinary(cfg.prompt) or [eot]
    seeds = range(cfg.seed + run.step * n, cfg.seed + (run.step + 1) * n)
    with run.rt.autocast():
        for ids, _ in generate.complete(raw, [prompt] * n, cfg.sample_tokens, eot, top_k=50, seeds=seeds):
            runtime.print0(f"  > {run.tokenizer.decode(prompt + ids)}")


def results_table(cfg: Config, run: Run) -> str:
    """This run's results, those of published models if tokenizer and HellaSwag rows are the same, and how to plot."""
    scores = [f"{run.scores[name]:.4f}" if name in run.scores else "-" for name in ("val", "hella")]
    cost = f"{run.n_tokens:,}", f"{run.seconds / 3600:.2f}", f"{run.n_tokens / run.seconds:,.0f}"
    header = ["", "validation loss", "HellaSwag", "parameters", "tokens", "hours", "tok/s"]
    rows = [header, [cfg.out_dir, *scores, f"{run.raw.n_params():,}", *cost]]
    if cfg.tokenizer == "gpt2" and not (cfg.hellaswag_data or cfg.hellaswag_rows):
        rows.append(["GPT-2 124M on FineWeb-Edu", "3.2924", "0.2955", "124,439,808", "-", "-", "-"])
        rows.append(["GPT-3 124M", "-", "0.3370", "125,000,000", "300,000,000,000", "-", "-"])
    return f"{config.format_table(rows)}\ncurves: python -m tools.plot --runs {cfg.out_dir} --out_dir={cfg.out_dir}"


def main(cfg: Config) -> None:
    """Train until max_steps; evaluate, sample and save in between."""
    rt = runtime.setup(cfg.device, cfg.precision, cfg.deterministic)
    per_rank = check(cfg, rt.world_size)
    n = per_rank * rt.world_size  # sequences per step
    tokenizer = data.get_tokenizer(cfg.tokenizer)
    compiled = rt.device.type == "cuda" if cfg.compile is None else cfg.compile
    plan = dict(T=cfg.T, sharded=cfg.sharded, recompute=cfg.recompute, muon=cfg.optimizer == "muon", compiled=compiled)
    with torch.device("meta"):  # allocates nothing
        shape = model.GPT(expected_config(cfg, tokenizer.n_vocab))
    training.check_memory(shape, cfg.B or 1, rt, **plan)  # raises before the data are read
    splits = data.open_data(cfg.data, tokenizer, check=rt.rank == 0)
    train, val = (data.Windows(shards, cfg.T, tokenizer.n_vocab) for shards in splits)
    run = Run(cfg, "pretraining", tokenizer, rt, cfg.branch_from)
    rt, raw = run.rt, build_model(run)
    settings = dict(weight_decay=cfg.weight_decay, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, momentum=cfg.momentum)
    net = training.wrap(raw, rt, cfg.sharded, cfg.recompute, compiled)
    run.attach(raw, net, optim.make_optimizers(raw, optimizer=cfg.optimizer, **settings))
    run.flops_per_token = raw.flops_per_token(cfg.T)
    questions, every = None, cfg.hellaswag_every
    if every or (every is None and rt.device.type == "cuda"):
        questions = hellaswag.try_load_questions(cfg.hellaswag_data, cfg.hellaswag_rows, tokenizer, cfg.T, rt)

    def read(step: int) -> training.Batch:
        windows = run.items(step, n, len(train))[rt.rank * per_rank : (rt.rank + 1) * per_rank]
        xy = runtime.to_device(torch.from_numpy(train.read(windows)), rt.device)  # (per_rank, T + 1)
        return make_batch(xy, run.B, n)

    run.B = training.pick_B(run, per_rank, **plan)
    kernel = runtime.attention_kernel(raw.config, run.B, cfg.T, rt)
    scored = data.checksum(p.inputs for p in questions.packed) if questions else "none"
    contents = dict(training_data=data.fingerprint(train.shards), validation_data=data.fingerprint(val.shards))
    run.identify(**contents, hellaswag=scored, kernel=kernel, compiled=compiled, B=run.B)
    runtime.print0(f"{cfg.model}: {raw.n_params():,} parameters, {len(train):,} training windows of {cfg.T} tokens")
    runtime.print0(f"{cfg.total_batch_size:,} tokens per step, {per_rank // run.B} x B={run.B} sequences per device")
    dtypes = f"{rt.precision}, residual {raw.config.residual}"
    runtime.print0(f"{rt.world_size} x {rt.device.type}, {dtypes}, compile={compiled}, {kernel}")
    runtime.print0(training.check_memory(raw, run.B, rt, **plan))
    run.warm_up(read(run.step), loss_fn)
    if rt.device.type == "cpu" and run.flops_per_token * cfg.total_batch_size > 1e13:  # a CPU does about 1e11 a second
        runtime.print0("a step can take minutes on this CPU: lower --total_batch_size, or use the demo")
    lr_at = lr_schedule(cfg)
    batches = data.prefetch(read, run.step, cfg.max_steps)
    for step in run.steps(cfg.max_steps):
        if run.due(cfg.eval_every):
            loss = training.validate(run.model, val, cfg.val_tokens, run.B, rt)
            runtime.print0(f"step {step}: validation loss {loss:.4f}")
            print_samples(run)
            run.record(val=loss)
        if questions and run.due(cfg.hellaswag_every or cfg.eval_every):
            run.record(hella=hellaswag.evaluate(run.full_model(), questions, rt).accuracy["per token"])
            runtime.print0(f"step {step}: HellaSwag acc_norm {run.scores['hella']:.4f} ({len(questions.label):,} rows)")
        if run.due(cfg.save_every):
            run.save()
        if run.last:
            break
        run.update(next(batches), loss_fn, lr=lr_at(step))
    if not run.stopped:
        runtime.print0(results_table(cfg, run))
    run.finish()


if __name__ == "__main__":
    config.run(main, CONFIGS)
