"""Batched generation with a KV cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import config, cpu, model

# Tokens generated before the host reads them, by device. A GPU need not wait after every token; up to CHUNK - 1 tokens
# may be generated after the last row has stopped.
CHUNK = {"cuda": 16}


class KVCache:
    """Keys and values of every layer, for rows of different lengths.

    Three modes: dynamic (attention reads the filled slots), static (it reads all slots, so every token is the same
    work; required for CUDA graphs), and compiled (the slot count is a dynamic dimension). A mask is needed in the last
    two, and wherever row lengths differ.
    """

    def __init__(self, n_layer: int, max_seq_len: int, static: bool = False, compiled: bool = False) -> None:
        self.max_seq_len, self.static, self.compiled = max_seq_len, static, compiled
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer  # keys, values: (B, nh, max_seq_len, hs)
        self.lengths: Tensor | None = None  # (B,) int64: filled slots of each row
        self.longest = 0  # max of lengths, kept on the host
        self.masked: bool | None = None  # whether attention needs a mask; None during prefill

    def set_lengths(self, lengths: list[int], device: torch.device) -> None:
        """After prefill: the first `lengths[b]` slots of row b are valid, the rest is padding."""
        new = torch.tensor(lengths, device=device)
        if self.lengths is None:
            self.lengths, self.rows = new, torch.arange(len(new), device=device)
            self.slots = torch.arange(self.max_seq_len, device=device)  # those that attention reads with a mask
        else:
            self.lengths.copy_(new)  # in place: the CUDA graph holds this address
        self.masked = self.static or self.compiled or len(set(lengths)) > 1
        self.advance(max(lengths))

    def advance(self, longest: int) -> None:
        """Call before each decode step with the current length of the longest row."""
        self.longest = longest
        if self.masked and not self.static:
            self.slots = torch.arange(longest + 1, device=self.lengths.device)
        if self.compiled:
            torch._dynamo.mark_dynamic(self.slots, 0)

    def mask(self) -> Tensor | None:
        """The slots that each row's next token attends to, (B, 1, 1, S): the filled ones and its own."""
        return (self.slots <= self.lengths[:, None])[:, None, None] if self.masked else None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, nh, T, hs) of a layer, T = 1 after prefill; return all keys and values (B, nh, S, hs)."""
        B, nh, T, hs = k.shape
        if self.masked is None:
            if self.layers[layer] is None:
                shape = B, nh, self.max_seq_len, hs
                self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
            for stored, new in zip(self.layers[layer], (k, v)):
                stored[:, :, :T] = new
            return k, v
        assert T == 1, f"decoding takes one token per row, got {T}"
        for stored, new in zip(self.layers[layer], (k, v)):
            if self.masked:
                stored[self.rows, :, self.lengths] = new[:, :, 0]
            else:
                stored[:, :, self.longest] = new[:, :, 0]
        keys, values = self.layers[layer]
        S = len(self.slots) if self.masked else self.longest + 1
        return keys[:, :, :S], values[:, :, :S]


def prefill(raw: model.GPT, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Process prompts of different lengths, replacing the cache's content; return the next logits (B, V).

    Rows are padded on the right, where a causal model does not look, so no mask is needed.
    """
    device = raw.lm_head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    cache.masked = None
    x = raw.trunk(torch.tensor(padded, device=device), cache)  # (B, T, C)
    cache.set_lengths(lengths, device)
    last = x[torch.arange(len(prompts), device=device), cache.lengths - 1]  # (B, C)
    return raw.lm_head(last)


def decode_one_token(raw: model.GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """One token per row, (B,) -> the next logits (B, V). The caller advances the cache."""
    x = raw.trunk(tokens[:, None], cache, pos=cache.lengths[:, None], mask=cache.mask())  # (B, 1, C)
    cache.lengths += 1
    return raw.lm_head(x[:, 0])


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample one id per row, (B,), from logits (B, V) with uniform numbers in [0, 1), (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids, k = logits.float(), None, min(top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or top_p < 1:  # sorting everything is slow, and only top_p needs it
        logits, ids = logits.topk(k)  # (B, k), most likely first
    below = logits - logits.amax(dim=-1, keepdim=True)  # at most 0, so no temperature overflows
    probs = F.softmax(below / max(temperature, 1e-30), dim=-1)
    if top_p < 1:  # keep ids while the probability before them is below top_p: the id that crosses it stays
        probs = probs * (probs.cumsum(dim=-1) - probs < top_p)
    cdf = probs.cumsum(dim=-1)
    # the first id whose cdf exceeds uniform · total; it has probability above 0, because uniform < 1
    choice = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a sampling option that is out of range."""
    config.require("[0, inf)", temperature=temperature, top_k=top_k)
    config.require("(0, 1]", top_p=top_p)


@torch.no_grad()
def generate(
    raw: model.GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop: int | None = None,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Continue every prompt; yield one list per step with each row's new token, None for rows that have ended.

    prompts: B lists of token ids, not empty; only the last block_size ids are used. temperature: 0 is greedy. top_k:
    keep the k most likely ids, 0 for all. top_p: keep the most likely ids with this total probability. seeds: one per
    row, default 0, 1, …; a row depends on its prompt and seed, and on other rows only through rounding. stop: a row
    ends after this id. compile: compile the decode step, for up to a minute. Raises ValueError for values out of range.

    On CUDA the decode step is captured as a graph, and the host waits once per CHUNK tokens. Learned positions end at
    block_size: a longer row continues from the newer half of its window.
    """
    block_size, n_tokens = raw.config.block_size, raw.config.n_tokens
    seeds = range(len(prompts)) if seeds is None else seeds
    if not prompts or not all(prompts) or len(seeds) != len(prompts):
        raise ValueError("generate needs prompts of at least one token, and one seed per prompt")
    if any(not 0 <= token < n_tokens for prompt in prompts for token in prompt):
        raise ValueError(f"a prompt has a token id outside 0 … {n_tokens - 1}")
    check_sampling(temperature, top_k, top_p)
    config.require("[0, inf)", max_new_tokens=max_new_tokens)

    windows = [list(prompt[-block_size:]) for prompt in prompts]
    # all random numbers come from the CPU up front: equal on every device, and no row disturbs another
    uniforms = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    uniforms = torch.stack(uniforms, dim=1).to(raw.lm_head.weight.device)  # (max_new_tokens, B)
    max_seq_len = min(block_size, max(map(len, windows)) + max_new_tokens)
    if compile and uniforms.is_cpu:  # + 1: dynamo would specialize where the slot count equals the size
        max_seq_len = block_size + 1
    elif compile:  # a power of two, so that few sizes are compiled
        max_seq_len = min(block_size, max(256, 2 ** (max_seq_len - 1).bit_length()))
    static = uniforms.is_cuda or compile and not uniforms.is_cpu
    cache = KVCache(raw.config.n_layer, max_seq_len, static, compiled=compile and uniforms.is_cpu)

    def next_tokens(logits: Tensor, u: Tensor) -> Tensor:
        return sample(logits[:, :n_tokens], u, temperature, top_k, top_p)  # (B,)

    def step(tokens: Tensor, u: Tensor) -> Tensor:
        return next_tokens(decode_one_token(raw, tokens, cache), u)

    if compile:
        on_cpu = uniforms.is_cpu
        step = cpu.compile_frozen(step, raw) if on_cpu else torch.compile(step, fullgraph=True, dynamic=False)
    with nullcontext() if compile else cpu.fast_cpu_linears(raw, len(prompts)):
        yield from decode_loop(raw, windows, uniforms, cache, next_tokens, step, stop)


def decode_loop(
    raw: model.GPT,
    windows: list[list[int]],
    uniforms: Tensor,
    cache: KVCache,
    next_tokens: Callable[[Tensor, Tensor], Tensor],
    step: Callable[[Tensor, Tensor], Tensor],
    stop: int | None,
) -> Iterator[list[int | None]]:
    """Prefill, decode, and prefill again when a row has reached block_size; yields as `generate`.

    uniforms: (max_new_tokens, B). next_tokens: logits (B, V), uniforms (B,) -> tokens (B,). step: tokens, uniforms ->
    tokens.
    """
    block_size, max_new_tokens = raw.config.block_size, len(uniforms)
    ended, done, captured = [False] * len(windows), 0, not uniforms.is_cuda
    while done < max_new_tokens and not all(ended):
        new = []  # tokens (B,) on the device, read together
        if done == 0 or max(map(len, windows)) > block_size:
            windows = [w if len(w) <= block_size else w[-max(1, block_size // 2) :] for w in windows]
            tokens = next_tokens(prefill(raw, windows, cache), uniforms[done])
            new.append(tokens)
        free_slots = block_size - max(map(len, windows)) + 1
        n_chunk = min(CHUNK.get(uniforms.device.type, 1), max_new_tokens - done, free_slots)
        for i in range(len(new), n_chunk):
            if not captured:  # only now the cache has a free slot
                step, captured = capture_cuda_graph(step, (tokens, uniforms[done + i]), cache.lengths), True
            tokens = step(tokens, uniforms[done + i])
            cache.advance(cache.longest + 1)
            new.append(tokens)
        for ids in torch.stack(new).tolist():
            for window, token in zip(windows, ids):
                window.append(token)
            done += 1
            yield [None if end else token for token, end in zip(ids, ended)]
            ended = [end or token == stop for token, end in zip(ids, ended)]
            if all(ended):
                return


def complete(
    raw: model.GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, eot: int, **options: object
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt without end-of-text, and whether the row ended with it. options: of `generate`."""
    steps = list(generate(raw, prompts, max_new_tokens, stop=eot, **options))
    rows = [[token for token in row if token is not None] for row in zip(*steps)] or [[] for _ in prompts]
    return [(row[: len(row) - (row[-1:] == [eot])], row[-1:] == [eot]) for row in rows]


def cast_linears(raw: model.GPT, dtype: torch.dtype) -> None:
    """Convert the linear layers and the tied embedding, which autocast would cast for every token. Not for training."""
    for module in raw.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for captures: every stream keeps a workspace for its matrix products."""
    return torch.cuda.Stream(device)


@contextmanager
def nondeterministic_scatter() -> Iterator[None]:
    """Inside, index_put writes directly. Its deterministic kernel handles duplicate indices by sorting; ours are
    unique.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def capture_cuda_graph(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], state: Tensor) -> Callable[..., Tensor]:
    """step(*inputs) as a CUDA graph: one launch instead of hundreds. The capture leaves `state`, which step changes in
    place, as it was.
    """
    inputs, before = tuple(x.clone() for x in inputs), state.clone()
    side, graph = capture_stream(state.device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), nondeterministic_scatter():
        for _ in range(3):  # compilation, kernel selection and workspaces must not be captured
            step(*inputs)
            state.copy_(before)
        torch.cuda.synchronize()
        # not `torch.cuda.graph`: it empties the allocator's cache, and it fails if the threads of the loader or of a
        # checkpoint use CUDA meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        out = step(*inputs)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)

    def replay(*new: Tensor) -> Tensor:
        for x, value in zip(inputs, new):
            x.copy_(value)
        graph.replay()
        return out.clone()

    return replay
