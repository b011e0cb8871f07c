"""The training step, the same for every stage and any number of ranks; the validation loss; the memory plan."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neogpt import data, model, runtime

# loss_fn(model, micro_batch) -> (loss, metrics): the loss summed over the units of the micro-batch (target tokens or
# pairs), and detached sums of other quantities to log, by name. It runs under autocast.
LossFn = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]


class Batch(NamedTuple):
    """The data of one optimizer step."""

    micro_batches: list[dict[str, Any]]  # of this rank: arguments of loss_fn; "n" is the number of units
    n_sequences: int  # of all ranks
    n_tokens: int  # of all ranks, without padding


class StepResult(NamedTuple):
    """The result of one training step, equal on all ranks."""

    loss: float  # mean over the units of the whole step
    grad_norm: float  # before clipping
    skipped: bool  # loss or gradient was not finite, and no parameter changed
    stop: bool  # a rank was asked to stop
    metrics: dict[str, float]  # means over the units of the whole step


def backward(
    net: nn.Module, batch: dict[str, Any], loss_fn: LossFn, scale: float | Tensor, rt: runtime.Runtime
) -> tuple[Tensor, dict]:
    """Forward and backward pass of scale · loss; returns the detached loss sum and the metrics."""
    with runtime.strict_determinism():
        with rt.autocast():
            loss, metrics = loss_fn(net, batch)
        (loss * scale).backward()
    return loss.detach(), metrics


def train_step(
    net: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[dict[str, Any]],
    loss_fn: LossFn,
    *,
    lr: float,
    grad_clip: float,
    rt: runtime.Runtime,
    stop: bool = False,
) -> Callable[[], StepResult]:
    """Queue one optimizer step over the micro-batches of all ranks; return a function that waits for its result.

    Equal to one large batch, however it is split: losses are summed and divided by the number of units in the whole
    step, because a mean of means would be wrong where micro-batches differ in units. grad_clip: largest gradient norm,
    0 for no limit. Optimizers must honor `found_inf`. If net is sharded, ranks need equally many micro-batches.
    """
    n = sum(batch["n"] for batch in micro_batches)
    if rt.world_size > 1:
        n = runtime.all_reduce_sum(torch.full((), n, dtype=torch.float64, device=rt.device), rt)
    sums = torch.zeros(1, device=rt.device)  # of the loss, then of each metric
    for i, batch in enumerate(micro_batches):
        # DDP stores all gradients and reduces them with the last micro-batch; no_sync must also enclose the forward
        # pass. FSDP2 cannot store them and reduces them with every micro-batch.
        accumulate = isinstance(net, DistributedDataParallel) and i < len(micro_batches) - 1
        with net.no_sync() if accumulate else nullcontext():
            # DDP and FSDP2 average; we want the sum
            loss, metrics = backward(net, batch, loss_fn, rt.world_size / n, rt)
        sums = sums + torch.stack([loss, *metrics.values()])
    norm = nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    norm = norm.full_tensor() if runtime.is_sharded(net) else norm
    # one all-reduce, so that every rank has the same numbers and takes the same decision
    sums = runtime.all_reduce_sum(torch.cat([sums, sums.new_full((1,), stop)]), rt)
    numbers = torch.cat([torch.stack([norm, sums[-1], sums[0] / n]), sums[1:-1] / n])
    nonfinite = (~numbers[:3].isfinite()).any().float()  # on the device, so that nothing waits
    skip = rt.device.type == "mps" and bool(nonfinite)  # AdamW on MPS ignores found_inf
    for optimizer in optimizers:
        optimizer.found_inf = nonfinite  # if it is 1, the step changes nothing
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skip:
            optimizer.step()
        optimizer.zero_grad()
    read = runtime.async_to_host(numbers)

    def result() -> StepResult:
        norm, stops, loss, *means = read()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        return StepResult(loss, norm, skipped, stops > 0, dict(zip(metrics, means)))

    return result


def wrap(
    raw: model.GPT, rt: runtime.Runtime, sharded: bool, recompute: bool, compile: bool = False, dynamic: bool = False
) -> nn.Module:
    """The model of the training step, on this rank's device: compiled if `compile`, in DDP if there are several ranks.
    raw becomes a part of it; make optimizers afterwards. dynamic: allow changing shapes and graph breaks; without it,
    the compiled forward pass must be one graph. recompute: the backward pass computes the activations of each block
    again, instead of keeping them (arXiv:1604.06174).

    sharded: instead of DDP, each rank stores its part of the rows of every parameter (FSDP2, arXiv:2304.11277). A pass
    gathers one block at a time, so all ranks must run equally many passes. In bf16 runs on CUDA blocks are gathered in
    bf16; what is stored and summed is fp32. The embeddings and the final norm are gathered together.
    """
    sharded, options = sharded and rt.world_size > 1, dict(fullgraph=not dynamic, dynamic=dynamic)
    if compile:
        runtime.require_compiler(rt.device)
    for block in raw.transformer.h:
        if sharded and compile:  # block by block: FSDP2 gathers their weights outside of the graphs
            block.forward = torch.compile(block.forward, **options)
        if recompute:  # nothing in a block is random
            checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
            block.forward = partial(checkpoint, block.forward)
    if not sharded:
        net = torch.compile(raw.to(rt.device), **options) if compile else raw.to(rt.device)
        return DistributedDataParallel(net) if rt.world_size > 1 else net
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    low = rt.precision == "bf16" and rt.device.type == "cuda"  # on a CPU layer norms cannot mix dtypes
    dtypes = (torch.bfloat16, torch.float32) if low else (None, None)
    policy = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)  # autocast selects the dtype of inputs
    for block in raw.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(raw, mesh=mesh)
    for module in (raw, *raw.transformer.h):
        module.set_force_sum_reduction_for_comms(rt.device.type == "cpu")  # gloo can only sum
    return raw


@torch.no_grad()
def validate(net: nn.Module, val: data.Windows, n_tokens: int, B: int, rt: runtime.Runtime) -> float:
    """Mean loss, nats per token, over the first n_tokens of the validation windows, B windows at a time. If net is
    compiled, B must be the size of its micro-batches.
    """
    n = max(1, min(len(val), n_tokens // val.T))
    losses = [torch.zeros((), device=rt.device)]  # on the device, so that nothing waits
    own = np.arange(rt.rank, n, rt.world_size)
    for start in range(0, -(-n // rt.world_size), B):  # equally many passes on all ranks
        xy = runtime.to_device(torch.from_numpy(val.read(own[start : start + B])), rt.device)  # (at most B, T + 1)
        pad = (0, 0, 0, B - len(xy))  # a compiled model needs one shape
        with rt.autocast():
            losses.append(net(F.pad(xy[:, :-1], pad), F.pad(xy[:, 1:], pad, value=-100), reduction="sum"))
    if runtime.is_sharded(net):
        net.reshard()  # a pass without gradients leaves the embeddings gathered
    return runtime.all_reduce_sum(torch.stack(losses).cpu().double().sum(), rt).item() / (n * val.T)


# measured on CPUs: holes in the heap per byte of activations; bytes of libraries and their kernels, by precision
HOLES, LIBRARIES = 0.5, {"fp32": 5e7, "bf16": 8e7}


def plan_memory(
    raw: model.GPT, B: int, T: int, rt: runtime.Runtime, sharded: bool, recompute: bool, muon: bool, compiled: bool
) -> dict[str, float]:
    """Peak memory per device in bytes, by kind, if a step has several micro-batches of B sequences of T tokens. raw:
    can be on the meta device. compiled: both passes are one graph; sharded models are compiled block by block.
    """
    c, n, n_tokens, on_cpu = raw.config, rt.world_size if sharded else 1, B * T, rt.device.type == "cpu"
    n_trained = sum(p.numel() for p in raw.parameters() if p.requires_grad)
    n_matrices = sum(linear.weight.numel() for linear in model.weight_matrices(raw).values())
    n_block, n_head = sum(p.numel() for p in raw.transformer.h[0].parameters()), raw.lm_head.weight.numel()
    size = 2 if rt.precision == "bf16" else 4  # bytes of an activation
    residual = size if c.residual == "bf16" else 4  # and of an element of the residual stream
    mlp = 8 * c.n_embd if c.mlp == "dense" else (2 + 2 * c.mlp_modes) * (c.mlp_width or 4 * c.n_embd)
    # of one block: the residual stream twice; the outputs of both norms and of attention, q, k, v; the MLP
    block = n_tokens * (2 * residual * c.n_embd + size * (6 * c.n_embd + mlp))
    if c.attention == "manual" or size == 2 and on_cpu:
        n_keys = T if c.attention == "manual" else min(T, (T + model.QUERY_CHUNK) / 2)  # per query
        block += n_tokens * n_keys * c.n_head * (size if on_cpu else size + 4)  # autocast on CUDA: an fp32 softmax
    blocks = c.n_layer * n_tokens * residual * c.n_embd + block if recompute else c.n_layer * block
    # the log-softmax and two gradients of it, fp32; a compiled graph keeps the logits and overwrites them
    per_logit = size if compiled and n == 1 else 12
    activations = blocks + n_tokens * ((residual + size) * c.n_embd + per_logit * c.vocab_size)
    if n > 1:  # gathered: two blocks, their gradients, and the rest, fp32 and as autocast rounds it
        activations += (4 * size + 8) * n_block + 6 * n_head
    elif size == 2:  # weights as autocast rounds them
        activations += 2 * (n_matrices + n_head)
    plan = dict(weights=4 * raw.n_params() / n, gradients=4 * n_trained / n * (2 if rt.world_size > n else 1))  # DDP's
    plan["moments"] = (8 * n_trained - 4 * n_matrices * muon) / n
    # or Muon's temporaries, or `Run.full_model`, while there are no gradients
    others = 16 * n_matrices * muon / n, 4 * raw.n_params() - plan["gradients"] if n > 1 else 0
    plan["activations"] = max(activations, *others)
    if on_cpu:  # the copy of a checkpoint is written during the next step; it fills the holes that freed tensors left
        copies = n * (plan["weights"] + plan["moments"])
        plan |= dict(heap=max(copies, HOLES * plan["activations"]), libraries=LIBRARIES[rt.precision])
    return plan


def check_memory(raw: model.GPT, B: int, rt: runtime.Runtime, **options: Any) -> str:
    """One line that compares `plan_memory` with the memory of the device and, if it is too small, names what would fit.
    Raises ValueError if not even weights, gradients and moments fit. options: of `plan_memory`.
    """
    available, plan = runtime.device_memory(rt.device), plan_memory(raw, B, rt=rt, **options)
    text = " + ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in plan.items())
    text = f"memory per device with B={B}: {text} = {sum(plan.values()) / 1e9:.1f} GB of {available / 1e9:.1f} GB"
    if sum(plan.values()) <= available:
        return text
    sharded = [dict(sharded=True)] * all(p.requires_grad for p in raw.parameters())  # adapters cannot be sharded
    changes = [*sharded, dict(recompute=True), *(dict(B=b) for b in range(B - 1, 0, -1) if B % b == 0)]
    totals = [sum(plan_memory(raw, **dict(B=B, rt=rt) | options | change).values()) for change in changes]
    fits = [f"--{name}={x}" for change, n in zip(changes, totals) if n <= available for name, x in change.items()]
    remedy = f"{'more devices with --sharded' if sharded else '--B=1'} --recompute, a smaller --T or a smaller model"
    text += f"; enough would be {' or '.join(fits[:3]) or remedy}"
    if plan["weights"] + plan["gradients"] + plan["moments"] > available:
        raise ValueError(f"too little memory: {text}")
    return text


def pick_B(run: Any, per_rank: int, **options: Any) -> int:
    """The micro-batch size: that of the configuration or of the resumed run, else as many sequences as `plan_memory`
    fits into 85 % of the memory. run: a Run of train_gpt2.py. per_rank: sequences per step on this rank.
    """
    cfg, rt, resumed = run.cfg, run.rt, run.resumed
    if cfg.B:
        return cfg.B
    if resumed and resumed.world_size == rt.world_size and resumed.B and per_rank % resumed.B == 0:
        return resumed.B  # the same B gives the same bits
    limit = 2**16 if rt.device.type == "cuda" else 2**12  # tokens: larger is not faster on a GPU, and slower on a CPU
    sizes = [B for B in range(1, per_rank + 1) if per_rank % B == 0 and B * cfg.T <= limit]
    available = 0.85 * runtime.device_memory(rt.device)
    return max((B for B in sizes if sum(plan_memory(run.raw, B, rt=rt, **options).values()) < available), default=1)
