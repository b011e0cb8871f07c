"""Batched generation with a KV cache."""

import functools
import types
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import cpu, model

# Tokens per row that are generated before the host reads them, by device (else 1), so that a GPU does not wait for the
# host after every token. Up to CHUNK - 1 tokens are discarded after the last row has ended.
CHUNK = {"cuda": 16}
capture_stream = functools.cache(torch.cuda.Stream)  # one per device: a stream keeps a workspace for matrix products
newest_graph: dict[torch.device, torch.cuda.CUDAGraph] = {}  # kept so that the next graph can use its memory pool


class KVCache:
    """Keys and values of every layer, for rows of different lengths. Attention reads the filled slots or, if `static`,
    all slots, so that every decode step is the same work, as CUDA graphs require.
    """

    def __init__(self, n_layer: int, max_seq_len: int, static: bool = False) -> None:
        self.max_seq_len, self.static = max_seq_len, static
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer  # keys, values: (B, nh, max_seq_len, hs)
        self.lengths: Tensor | None = None  # (B,) int64: filled slots of each row
        self.longest = 0  # on the host: filled slots of the longest row, also if `keep` dropped it; 0 during prefill
        self.masked = False  # whether attention needs a mask

    def set_lengths(self, lengths: list[int], device: torch.device) -> None:
        """Call after prefill: the first `lengths[b]` slots of row b are valid, the other slots are padding."""
        new = torch.tensor(lengths, device=device)
        if self.lengths is None:
            self.lengths, self.rows = new, torch.arange(len(new), device=device)
            self.slots = torch.arange(self.max_seq_len, device=device)  # that attention reads if masked
        else:
            self.lengths.copy_(new)  # in place: the CUDA graph holds this address
        self.masked = self.static or len(set(lengths)) > 1
        self.advance(max(lengths))

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the cache, in this order; a row can be kept several times."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        self.lengths, self.rows = self.lengths[rows], torch.arange(len(rows), device=rows.device)

    def advance(self, longest: int) -> None:
        """Call before each decode step with the current length of the longest row."""
        self.longest = longest
        if self.masked and not self.static:
            self.slots = torch.arange(longest + 1, device=self.lengths.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, nh, T, hs) of a layer, T = 1 after prefill; return all keys and values (B, nh, S, hs)."""
        B, nh, T, hs = k.shape
        if self.layers[layer] is None:
            shape = B, nh, self.max_seq_len, hs
            # on a CPU attention reads fp32: see model.flash_attention
            dtype = torch.promote_types(k.dtype, torch.float32) if k.is_cpu else k.dtype
            self.layers[layer] = k.new_zeros(shape, dtype=dtype), v.new_zeros(shape, dtype=dtype)
        for stored, new in zip(self.layers[layer], (k, v)):
            if self.masked:
                stored[self.rows, :, self.lengths] = new[:, :, 0].to(stored.dtype)
            else:
                stored[:, :, self.longest : self.longest + T] = new
        keys, values = self.layers[layer]
        S = len(self.slots) if self.masked else self.longest + T
        return keys[:, :, :S], values[:, :, :S]


def prefill(raw: model.GPT, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Process whole prompts, replacing the cache's content; return the logits of the next token (B, V)."""
    # padding on the right needs no mask: a causal model does not look there
    device = raw.lm_head.weight.device
    places = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if cache.layers[0] is None and len(places) < len(prompts):  # process equal prompts once
        logits = prefill(raw, [*map(list, places)], cache)
        rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
        cache.keep(rows)
        return logits[rows]
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    cache.longest, cache.masked = 0, False
    x = raw.trunk(torch.tensor(padded, device=device), cache)  # (B, T, C)
    cache.set_lengths(lengths, device)
    return raw.head(x[cache.rows, cache.lengths - 1])


def decode_one_token(raw: model.GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Process one token per row, (B,); return the logits of the next token (B, V). The caller advances the cache."""
    lengths = cache.lengths[:, None]
    mask = (cache.slots <= lengths)[:, None, None] if cache.masked else None  # (B, 1, 1, S): filled slots and its own
    x = raw.trunk(tokens[:, None], cache, pos=lengths, mask=mask)  # (B, 1, C)
    cache.lengths += 1
    return raw.head(x[:, 0])


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample one id per row, (B,), from logits (B, V) with uniform random numbers (B,) in [0, 1)."""
    if temperature == 0:
        return logits.float().argmax(dim=-1)  # of bf16 it is four times as slow on a CPU
    logits, ids, k = logits.float(), None, min(top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or top_p < 1:  # sorting everything is slow, and only top_p needs it
        logits, ids = logits.topk(k)  # (B, k), most likely first
    below = logits - logits.amax(dim=-1, keepdim=True)  # at most 0, so no temperature overflows
    probs = F.softmax(below / max(temperature, 1e-30), dim=-1)
    if top_p < 1:  # keep an id if the more likely ids together have less than top_p
        probs = probs * (probs.cumsum(dim=-1) - probs < max(top_p, 1e-30))
    cdf = probs.cumsum(dim=-1)
    # the first id whose cdf exceeds uniform · total; its probability is above 0, because uniform < 1
    choice = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


@torch.no_grad()
def generate(
    raw: model.GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop: int | None = None,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Continue every prompt; yield one list per step with each row's new token, None for rows that have ended.

    prompts: B lists of token ids, not empty; only the last block_size ids are used. temperature: 0 is greedy. top_k:
    keep the k most likely ids, 0 for all. top_p: keep the most likely ids with this total probability.
    repetition_penalty: divides the positive logits of ids that a row has, and multiplies the negative ones; 1 for none
    (arXiv:1909.05858, section 4.1). seeds: one per row, default 0, 1, …; a row depends on its prompt and seed, and on
    other rows only through rounding. stop: a row ends after this id. compile: compile the decode step (CUDA only), in
    up to a minute. At block_size, where the learned positions end, a row continues from its last block_size / 2 tokens.
    """
    block_size, n_tokens = raw.config.block_size, raw.config.n_tokens
    seeds = range(len(prompts)) if seeds is None else seeds
    device = raw.lm_head.weight.device
    windows = [list(prompt[-block_size:]) for prompt in prompts]
    # all random numbers come from the CPU up front: equal on every device, and independent of the other rows
    uniforms = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    seen = torch.zeros(len(prompts), n_tokens, dtype=torch.bool)
    for row, prompt in zip(seen, prompts if repetition_penalty != 1 else ()):
        row[list(prompt)] = True
    uniforms, seen = torch.stack(uniforms, dim=1).to(device), seen.to(device)  # (max_new_tokens, B), (B, n_tokens)

    def sampler(logits: Tensor, u: Tensor, newest: Tensor) -> Tensor:
        if repetition_penalty != 1:
            lower = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen.scatter_(1, newest[:, None], True), lower, logits)
        return sample(logits, u, temperature, top_k, top_p)

    ended = [False] * len(prompts)
    forwards = cpu.fast_linears(raw, len(prompts))
    if compile and len(prompts) == 1:  # methods, because for new partial objects the step would be compiled again
        forwards = {m: types.MethodType(one_row_linear, m) for m in raw.modules() if type(m) is nn.Linear}
    for linear, forward in forwards.items():
        linear.forward = forward
    try:
        for ids in decode_loop(raw, windows, uniforms, sampler, compile, ended if repetition_penalty == 1 else None):
            yield [None if end else token for token, end in zip(ids, ended)]
            ended[:] = [end or token == stop for token, end in zip(ids, ended)]
            if all(ended):
                return
    finally:
        for linear in forwards:
            vars(linear).pop("forward", None)  # another generation may have removed it


def decode_loop(
    raw: model.GPT,
    windows: list[list[int]],
    uniforms: Tensor,
    sampler: Callable[..., Tensor],
    compile: bool,
    ended: list[bool] | None,
) -> Iterator[list[int]]:
    """Yield the next token of every row, max_new_tokens times: prefill, decode, and prefill again at block_size.
    windows: B prompts; uniforms: (max_new_tokens, B); sampler: logits (B, n_tokens), uniforms (B,) and the newest token
    of each row (B,) -> the next tokens (B,). ended: the caller marks here the rows that need no more tokens; they are
    left out once they are a quarter of the rows, if the shape can change, and then yield 0.
    """
    block_size, n_tokens, max_new_tokens = raw.config.block_size, raw.config.n_tokens, len(uniforms)
    max_seq_len = min(block_size, max(map(len, windows)) + max_new_tokens)

    def step(tokens: Tensor, u: Tensor) -> Tensor:
        return sampler(decode_one_token(raw, tokens, cache)[:, :n_tokens], u, tokens)

    if compile:
        max_seq_len = min(block_size, max(256, 2 ** (max_seq_len - 1).bit_length()))  # so that few sizes are compiled
        step = torch.compile(step, fullgraph=True, dynamic=False)
    static = uniforms.is_cuda
    cache = KVCache(raw.config.n_layer, max_seq_len, static)
    n_done, captured, rows = 0, not static, [*range(len(windows))]
    n_rows, tokens = len(rows), uniforms.new_zeros(0)
    while n_done < max_new_tokens:
        left = [i for i, row in enumerate(rows) if not (ended and ended[row])]  # places in the batch
        if 4 * len(left) <= 3 * len(rows) and not static:
            places = torch.tensor(left, device=uniforms.device)
            cache.keep(places)
            tokens, uniforms = tokens[places], uniforms[:, places]
            rows, windows = [rows[i] for i in left], [windows[i] for i in left]
        new = []  # tokens (B,) on the device, read together
        if n_done == 0 or cache.longest == block_size:
            windows = [w if len(w) <= block_size else w[-max(1, block_size // 2) :] for w in windows]
            newest = torch.tensor([window[-1] for window in windows], device=uniforms.device)
            tokens = sampler(prefill(raw, windows, cache)[:, :n_tokens], uniforms[n_done], newest)
            new.append(tokens)
        n_chunk = min(CHUNK.get(uniforms.device.type, 1), len(new) + block_size - cache.longest)
        for u in uniforms[n_done + len(new) : n_done + n_chunk]:
            if not captured:  # not earlier: the capture needs a free slot in the cache
                step, captured = capture_cuda_graph(step, (tokens, u), cache.lengths), True
            tokens = step(tokens, u)
            cache.advance(cache.longest + 1)
            new.append(tokens)
        for ids in torch.stack(new).tolist():
            for window, token in zip(windows, ids):
                window.append(token)
            n_done += 1
            tokens_of = dict(zip(rows, ids))
            yield [tokens_of.get(row, 0) for row in range(n_rows)]


def complete(
    raw: model.GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, eot: int, **options: object
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt without end-of-text, and whether the row ended with it. options: of `generate`."""
    rows = [*zip(*generate(raw, prompts, max_new_tokens, stop=eot, **options))] or [()] * len(prompts)
    return [([token for token in row if token not in (None, eot)], eot in row) for row in rows]


def cast_linears(raw: model.GPT) -> None:
    """Convert the linear layers and the tied embedding to bf16, as autocast would for every token. Not for training."""
    small_head = raw.config.vocab_size <= model.SMALL_VOCAB  # fp32: see GPT.head
    for module in raw.modules():
        if isinstance(module, nn.Linear) and not (small_head and module is raw.lm_head):
            module.bfloat16()


def one_row_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x), (…, in) -> (…, out); one row as fp32 sums of products, which the compiler fuses with the norms."""
    if x.numel() > x.size(-1):  # prefill
        return F.linear(x, linear.weight, linear.bias)
    y = (x.unsqueeze(-2) * linear.weight).sum(dim=-1, dtype=torch.float32)
    return (y if linear.bias is None else y + linear.bias).to(linear.weight.dtype)


def capture_cuda_graph(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], state: Tensor) -> Callable[..., Tensor]:
    """step(*inputs) as one launch of a CUDA graph. The capture restores `state`, which `step` changes in place."""
    inputs, before = tuple(x.clone() for x in inputs), state.clone()
    stream, graph = capture_stream(state.device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    deterministic = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")  # or index_put sorts the indices; those of the cache are unique
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation, kernel selection and workspaces must not be captured
            step(*inputs)
            state.copy_(before)
        torch.cuda.synchronize()
        # not `torch.cuda.graph`, which empties the allocator's cache and fails if another thread uses CUDA meanwhile
        pool = newest_graph[state.device].pool() if state.device in newest_graph else None
        graph.capture_begin(pool, capture_error_mode="thread_local")
        out = step(*inputs)
        graph.capture_end()
        newest_graph[state.device] = graph
    torch.set_deterministic_debug_mode(deterministic)
    torch.cuda.current_stream().wait_stream(stream)

    def replay(*new: Tensor) -> Tensor:
        for x, value in zip(inputs, new):
            x.copy_(value)
        graph.replay()
        return out.clone()

    return replay
