"""Sampling: continuations of prompts, a token a row and step, with a key-value cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import FEW, GPT, KVCache, Linear

# By device: tokens drawn before they are read. So many may be drawn in vain behind the last row's end, which
# is cheaper for a GPU than to wait for each; a CPU has nothing to wait for.
CHUNK = {"cuda": 16}

LARGE = 2**18  # weights of a matrix; `quick_products` gains nothing on smaller ones
PARTS = 16  # that `product_in_parts` makes of a matrix


def cast_linears(raw: GPT, dtype: torch.dtype) -> None:
    """Keep the linear maps in `dtype`, where autocast would cast them for every token; not for training.

    The token embedding, tied to the head, goes with them.
    """
    for module in raw.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


@contextmanager
def quick_products(raw: GPT, n_rows: int) -> Iterator[None]:
    """While it lasts, products with a large matrix of a model in fp32 on a CPU are made in the quickest way
    known for `n_rows` rows. PyTorch's BLAS lets cores idle when there is one, and when there are several it
    rearranges the matrix for every product; so these read a copy of it, made now in 0.1 s.

    On two cores with AVX2, for all maps of gpt2: one row 28 ms instead of 37, eight 46 instead of 112.
    """
    instructions = torch.backends.cpu.get_cpu_capability()  # the widest that PyTorch uses: "AVX2", …
    linears = [] if torch.is_autocast_enabled("cpu") else [m for m in raw.modules() if isinstance(m, Linear)]
    try:
        for linear in linears:
            W, b = linear.weight.detach(), linear.bias
            if not W.is_cpu or W.dtype != torch.float32 or W.numel() < LARGE:
                continue
            if 1 < n_rows <= FEW and "AVX" in instructions:
                W = torch.ops.mkldnn._reorder_linear_weight(W, 8)  # the same for any number from two
                linear.few = functools.partial(packed_product, W=W, b=b)
            elif n_rows == 1 and instructions == "AVX2":
                linear.few = functools.partial(product_in_parts, W=W, b=b)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("few", None)


def packed_product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b by oneDNN, (…, in) -> (…, out), of a W that lies in the order in which it reads it."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def product_in_parts(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b as PARTS products that share out the rows of W, (…, in) -> (…, out)."""
    rows, n_out = x.reshape(-1, x.size(-1)), len(W) // PARTS * PARTS  # what is left over goes by itself
    xs, Ws = rows.expand(PARTS, -1, -1), W[:n_out].view(PARTS, -1, W.size(1)).mT  # (PARTS, in, out / PARTS)
    y = torch.bmm(xs, Ws) if b is None else torch.baddbmm(b[:n_out].view(PARTS, 1, -1), xs, Ws)
    y = y.transpose(0, 1).reshape(len(rows), n_out)
    if n_out < len(W):
        y = torch.cat([y, F.linear(rows, W[n_out:], b if b is None else b[n_out:])], dim=1)
    return y.view(*x.shape[:-1], len(W))


def fill_cache(raw: GPT, windows: list[list[int]], cache: KVCache) -> Tensor:
    """Run rows of different lengths at once, forgetting what the cache held; return the logits behind
    each row's last token (B, V).

    Rows are padded on the right: a causal model never looks there, so no mask is needed and positions are
    true.
    """
    device = raw.lm_head.weight.device
    lengths = [len(window) for window in windows]
    idx = torch.tensor(
        [window + [0] * (max(lengths) - len(window)) for window in windows], device=device
    )  # (B, T)
    cache.filling = True
    x = raw.hidden(idx, cache)  # (B, T, C)
    cache.set_lengths(lengths, device)
    last = x[torch.arange(len(windows), device=device), cache.lengths - 1]  # (B, C)
    return raw.lm_head(last)


def decode(raw: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """One token a row, (B,) -> the logits behind it (B, V). The host tells the cache that it has grown."""
    logits = raw.lm_head(raw.hidden(tokens[:, None], cache)[:, 0])
    cache.lengths += 1
    return logits


@torch.no_grad()
def generate(
    raw: GPT,
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
    """Continue every prompt; yield one list a step with each row's new token, None for rows that have
    ended.

    prompts: B lists of token ids, not empty, of any lengths. temperature: 0 is greedy. top_k: keep the k
    most likely ids; 0, or more than there are, keeps all. top_p: keep the most likely ids up to this
    total probability. seeds: one a row (default 0, 1, …); a row's tokens depend on its prompt and seed,
    not on its neighbours. stop: a row ends after yielding this id. compile: spend up to a minute on
    compiling the work of a token, for many tokens. Raises ValueError for values out of range.

    On CUDA that work is recorded once as a graph, and the host waits once in CHUNK tokens.

    GPT-2's learned positions end at block_size and cannot slide: a row that outgrows them goes on from
    the newer half of its window. A prompt longer than block_size loses its beginning.
    """
    block_size, n_tokens = raw.config.block_size, raw.config.n_tokens
    seeds = range(len(prompts)) if seeds is None else seeds
    check_prompts(prompts, seeds, max_new_tokens, n_tokens)
    check_sampling(temperature, top_k, top_p)

    windows = [list(p[-block_size:]) for p in prompts]
    # all randomness is drawn up front on the CPU: the same on every device, and no row disturbs another
    draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draws = torch.stack(draws, dim=1).to(raw.lm_head.weight.device)  # (max_new_tokens, B)
    on_cpu, on_cuda = draws.is_cpu, draws.is_cuda
    n_slots = min(block_size, max(map(len, windows)) + max_new_tokens)
    if compile and on_cpu:  # for any number of slots but all, which would be a case of its own
        n_slots = block_size + 1
    elif compile:  # for each number of slots: few, however long the prompts
        n_slots = min(block_size, max(256, 2 ** (n_slots - 1).bit_length()))
    static = on_cuda or compile and not on_cpu
    cache = KVCache(raw.config.n_layer, n_slots, static, compiled=compile and on_cpu)

    def pick(logits: Tensor, draw: Tensor) -> Tensor:
        return pick_token(logits[:, :n_tokens], draw, temperature, top_k, top_p)  # (B,)

    def step(tokens: Tensor, draw: Tensor) -> Tensor:
        return pick(decode(raw, tokens, cache), draw)

    step = compiled(step, raw) if compile else step
    with nullcontext() if compile else quick_products(raw, len(prompts)):
        yield from draw_tokens(raw, windows, draws, cache, pick, step, stop)


def draw_tokens(
    raw: GPT,
    windows: list[list[int]],
    draws: Tensor,
    cache: KVCache,
    pick: Callable[[Tensor, Tensor], Tensor],
    step: Callable[[Tensor, Tensor], Tensor],
    stop: int | None,
) -> Iterator[list[int | None]]:
    """The loop of `generate`: fill the cache, add a token a row and step, and fill it anew when it is full.

    draws: (max_new_tokens, B). pick: logits (B, V) and draws (B,) -> tokens (B,); step: tokens and draws,
    each (B,) -> the next tokens (B,).
    """
    block_size, max_new_tokens = raw.config.block_size, len(draws)
    ended, done, recorded = [False] * len(windows), 0, not draws.is_cuda
    while done < max_new_tokens and not all(ended):
        drawn = []  # tokens (B,) on the device, read all at once
        if done == 0 or max(map(len, windows)) > block_size:
            windows = [w if len(w) <= block_size else w[-max(1, block_size // 2) :] for w in windows]
            tokens = pick(fill_cache(raw, windows, cache), draws[done])
            drawn.append(tokens)
        room = block_size - max(map(len, windows)) + 1
        chunk = CHUNK.get(draws.device.type, 1)
        for i in range(len(drawn), min(chunk, max_new_tokens - done, room)):
            if not recorded:  # now that the cache has a free slot
                step, recorded = record(step, (tokens, draws[done + i]), cache.lengths), True
            tokens = step(tokens, draws[done + i])
            cache.see(cache.longest + 1)
            drawn.append(tokens)
        for ids in torch.stack(drawn).tolist():
            for window, token in zip(windows, ids):
                window.append(token)
            done += 1
            yield [None if end else token for token, end in zip(ids, ended)]
            ended = [end or token == stop for token, end in zip(ids, ended)]
            if all(ended):
                return


def compiled(step: Callable[..., Tensor], raw: GPT) -> Callable[..., Tensor]:
    """step, compiled when it is first called. On a CPU the weights become constants: a second copy of them,
    laid out for the compiler's own products, which for a few rows take about half the time of the BLAS's.
    """
    compile = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    if raw.lm_head.weight.device.type != "cpu":
        return compile(step)
    from torch._dynamo import config as dynamo  # slow imports
    from torch._inductor import config as inductor

    weights = str([(p.sum().item(), p.norm().item()) for p in raw.parameters()])

    def constant_step(*inputs: Tensor) -> Tensor:
        if not weights:  # what is compiled depends on them: of other weights it is compiled anew
            raise AssertionError
        return step(*inputs)

    constants = inductor.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP")
    return dynamo.patch(recompile_limit=64)(constants(compile(constant_step)))


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device to record on: each stream keeps a workspace for its matrix products."""
    return torch.cuda.Stream(device)


@contextmanager
def simple_stores() -> Iterator[None]:
    """Within, a token is stored by a write to its place. PyTorch's deterministic kernel, made for places that
    meet, copies the whole cache to and fro; the places of tokens do not meet, so this is as exact.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def record(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], state: Tensor) -> Callable[..., Tensor]:
    """step(*inputs), recorded as a CUDA graph: one launch instead of hundreds. Running it for the record
    leaves `state`, which it changes in place, as it was.
    """
    inputs, before = tuple(x.clone() for x in inputs), state.clone()
    side, graph = side_stream(state.device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), simple_stores():
        for _ in range(3):  # compiles, picks kernels, allocates workspaces: none of it may be recorded
            step(*inputs)
            state.copy_(before)
        torch.cuda.synchronize()
        # by hand: `torch.cuda.graph` would empty the caches that training fills, and stop at what the threads
        # of the loader and of the checkpoints do meanwhile
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


def check_prompts(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int, n_tokens: int
) -> None:
    """Raise a ValueError that says what `generate` cannot work with."""
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError(
            "generate needs prompts of at least one token each; to start from nothing use end-of-text"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or above")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    if any(not 0 <= token < n_tokens for p in prompts for token in p):
        raise ValueError(f"a prompt has a token id outside 0 … {n_tokens - 1}")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise a ValueError that names the control that is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (all ids) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def pick_token(logits: Tensor, draw: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Choose one id a row from logits (B, V) and one draw from [0, 1) a row (B,); return ids (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids, k = logits.float(), None, min(top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or top_p < 1:  # sorting all is slow, and needed for top_p only
        logits, ids = logits.topk(k)  # (B, k), most likely first
    below = logits - logits.amax(dim=-1, keepdim=True)  # 0 for the likeliest, at any temperature
    probs = F.softmax(below / max(temperature, 1e-30), dim=-1)
    if top_p < 1:  # keep ids while the probability before them is below it: the one that crosses it stays
        probs = probs * (probs.cumsum(dim=-1) - probs < top_p)
    cdf = probs.cumsum(dim=-1)
    # the first id whose cdf exceeds draw * total; it exists and has probability above 0, because draw < 1
    choice = (cdf <= draw[:, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
