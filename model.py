"""GPT-2: the model, its sizes, sampling with a key-value cache, and Hugging Face weights in and out.

The one definition that every script shares. Parameters have GPT-2's names and shapes, so that weights travel:

    raw = GPT(GPTConfig(**SIZES["gpt2"]))     # random weights
    raw = GPT.from_hf("gpt2")                 # OpenAI's weights, from the Hugging Face hub or a local folder
    logits, loss = raw(idx, targets)          # idx, targets: (B, T) of token ids; a target of -100 is ignored

Letters: B batch, T time (tokens), S keys attended to, C width (n_embd), V vocabulary, nh heads, hs head size.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Radford et al. 2019 for gpt2 … gpt2-xl; Brown et al. 2020 (arXiv:2005.14165), table 2.1, for gpt3-*.
# ndgpt2-*: GPT-2 whose MLPs are made of NdLinear layers (see NdMLP).
SIZES: dict[str, dict[str, Any]] = {
    "demo": dict(n_layer=3, n_head=4, n_embd=128, block_size=256, gelu="erf"),  # minutes on two CPU cores
    "shakespeare": dict(n_layer=2, n_head=4, n_embd=128, block_size=64, gelu="erf"),  # and one
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),  # 1558M
    "nd-demo": dict(
        n_layer=3,
        n_head=4,
        n_embd=128,
        block_size=256,
        gelu="erf",
        mlp="ndlinear",
        mlp_width=256,
        mlp_modes=2,
    ),
    "ndgpt2-96m": dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, mlp="ndlinear", mlp_width=1536, mlp_modes=2
    ),
    "ndgpt2-82m": dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, mlp="ndlinear", mlp_width=768, mlp_modes=6
    ),
    "gpt3-1.3b": dict(n_layer=24, n_head=16, n_embd=2048, block_size=2048),
    "gpt3-2.7b": dict(n_layer=32, n_head=32, n_embd=2560, block_size=2048),
    "gpt3-6.7b": dict(n_layer=32, n_head=32, n_embd=4096, block_size=2048),
}


# what the strings of a GPTConfig may be
CHOICES = {"attention": ("flash", "manual"), "gelu": ("tanh", "erf"), "mlp": ("dense", "ndlinear")}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. A value out of range raises ValueError: no file can ask for anything."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest sequence, tokens
    n_tokens: int = 50257  # ids the tokenizer has; only these are ever sampled
    vocab_size: int = 50304  # rows of the embedding: n_tokens padded to a multiple of 64, for speed
    attention: str = "flash"  # flash: PyTorch's fused kernels; manual: written out in `manual_attention`
    gelu: str = "tanh"  # tanh: GPT-2's approximation; erf: the function itself, on a CPU three times as fast
    mlp: str = "dense"  # dense: GPT-2's; ndlinear: of NdLinear layers
    mlp_width: int = 0  # of ndlinear: size of the hidden tensor's first mode; 0: 4 n_embd
    mlp_modes: int = 1  # of ndlinear: size of its second mode

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least, most = 0 if name == "mlp_width" else 1, 1000 if name == "n_layer" else 2**20 - 1
            known = CHOICES.get(name)
            fits = value in known if known else type(value) is int and least <= value <= most
            if not fits:
                expected = " or ".join(map(repr, known)) if known else f"an integer from {least} to {most}"
                raise ValueError(f"{name}={value!r} in the model's configuration: expected {expected}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if self.n_tokens > self.vocab_size:
            raise ValueError(f"n_tokens={self.n_tokens} must not exceed vocab_size={self.vocab_size}")


def pad_vocab(n_tokens: int) -> int:
    """Rows of the embedding for a tokenizer of `n_tokens` ids: the next multiple of 64 (50257 -> 50304)."""
    return -(-n_tokens // 64) * 64


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix or an embedding, and not a bias, a gain, or a vector in two axes."""
    return p.dim() >= 2 and min(p.shape) > 1


# -----------------------------------------------------------------------------
# Attention, the key-value cache, blocks


class Linear(nn.Linear):
    """nn.Linear; for a few rows on a CPU, as in sampling, by products that read W at the speed of memory."""

    def forward(self, x: Tensor) -> Tensor:
        n_rows = x.numel() // x.size(-1)
        plain = (
            x.device.type == "cpu" and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        )
        if not plain or torch.is_grad_enabled() or not n_rows <= 32:
            return super().forward(x)
        y = few_rows(x.reshape(n_rows, -1), self.weight, self.bias)
        return y.view(*x.shape[:-1], -1)


CPU = torch.backends.cpu.get_cpu_capability()


def few_rows(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b of a few rows, (n, in) -> (n, out), which the BLAS in PyTorch is slow at.

    With AVX-512 it rearranges W for x Wᵀ but not for W xᵀ: 8 rows through all maps of gpt2 take 41 ms
    instead of 74. With AVX2 it shares out badly what one product is, but not parts of it: 50 ms instead of 88,
    and one row 24 instead of 38 (two cores each; bench/RESULTS.md).
    """
    if CPU == "AVX512" and len(x) > 1:
        xT = x.T.contiguous()
        return (W @ xT if b is None else torch.addmm(b[:, None], W, xT)).T
    parts = 16 if CPU == "AVX2" else 1
    n_out = len(W) // parts * parts
    if parts == 1 or n_out == 0:
        return F.linear(x, W, b)
    xs, Ws = x.expand(parts, -1, -1), W[:n_out].view(parts, -1, W.size(1)).mT  # (parts, in, out / parts)
    y = torch.bmm(xs, Ws) if b is None else torch.baddbmm(b[:n_out].view(parts, 1, -1), xs, Ws)
    y = y.transpose(0, 1).reshape(len(x), n_out)
    if n_out < len(W):
        y = torch.cat([y, F.linear(x, W[n_out:], b if b is None else b[n_out:])], dim=1)
    return y


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √hs) V, step by step.

    q: (B, nh, T, hs); k, v: (B, nh, S, hs); mask: broadcasts to (B, nh, T, S), True where a query may look.
    Without a mask, the queries are the last T of the S positions and see nothing after themselves.
    """
    T, S, hs = q.size(-2), k.size(-2), q.size(-1)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, S)
    weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights @ v  # (B, nh, T, hs)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same through PyTorch's fused kernels; without a mask, T is S (causal) or 1 (it sees all)."""
    # is_causal aligns the triangle to the top left, which for one query would hide all keys but the first
    is_causal = mask is None and q.size(-2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


class KVCache:
    """Keys and values of every layer, for rows that are each filled to a length of their own.

    A static one hands out all its slots behind a mask, so that every token is the same work on the same
    memory and can be recorded or compiled; the other hands out only the slots that are filled.
    """

    def __init__(self, n_layer: int, n_slots: int, static: bool = False) -> None:
        self.n_slots = n_slots  # tokens a row can hold
        self.static = static
        self.keys: list[Tensor | None] = [None] * n_layer  # each (B, nh, n_slots, hs), made when first filled
        self.values: list[Tensor | None] = [None] * n_layer
        self.lengths: Tensor | None = None  # (B,) int64: slots filled in each row
        self.filling = True  # takes prompts; afterwards one token at a time
        self.longest = 0  # max of lengths, kept on the host so that nothing waits for the device
        self.ragged = False  # whether lengths differ

    def set_lengths(self, lengths: list[int], device: torch.device) -> None:
        """Declare the first `lengths[b]` slots of row b valid; what lies behind them is padding."""
        new = torch.tensor(lengths, device=device)
        self.lengths = new if self.lengths is None else self.lengths.copy_(new)
        self.filling = False
        self.longest = max(lengths)
        self.ragged = len(set(lengths)) > 1

    def advance(self) -> None:
        """Every row grew by the one token that `extend` wrote."""
        self.lengths += 1
        if not self.static:  # a recorded step is not to depend on a number that changes
            self.longest += 1

    def n_seen(self) -> int:
        """How many slots are handed out while the next token is stored and attended to."""
        return self.n_slots if self.static else self.longest + 1

    def mask(self) -> Tensor | None:
        """Which slots the next token of each row may see, (B, 1, 1, S): its own, and those filled."""
        if not (self.static or self.ragged):
            return None
        slots = torch.arange(self.n_seen(), device=self.lengths.device)
        return (slots <= self.lengths[:, None])[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, nh, T, hs) behind what `layer` holds; return the keys and values to attend to.

        While it is being filled it takes any T (the prompt); after that T is 1.
        """
        B, nh, T, hs = k.shape
        if self.filling:
            if self.keys[layer] is None:
                self.keys[layer] = k.new_zeros(B, nh, self.n_slots, hs)
                self.values[layer] = v.new_zeros(B, nh, self.n_slots, hs)
            self.keys[layer][:, :, :T] = k
            self.values[layer][:, :, :T] = v
            return k, v
        assert T == 1, f"a filled cache takes one token at a time, got {T}"
        if self.static or self.ragged:
            rows = torch.arange(B, device=k.device)
            self.keys[layer][rows, :, self.lengths] = k[:, :, 0]
            self.values[layer][rows, :, self.lengths] = v[:, :, 0]
        else:
            self.keys[layer][:, :, self.longest] = k[:, :, 0]
            self.values[layer][:, :, self.longest] = v[:, :, 0]
        S = self.n_seen()
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position over itself and the positions before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.layer = layer
        self.attend = flash_attention if config.attention == "flash" else manual_attention

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        shape = B, T, self.n_head, C // self.n_head
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, nh, S, hs)
            q = q.contiguous()  # from Linear the other way around it is not, and fused kernels want it
        y = self.attend(q, k, v, mask)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


# config.gelu -> PyTorch's name of the approximation
APPROXIMATE = {"tanh": "tanh", "erf": "none"}


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, around a GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.approximate = APPROXIMATE[config.gelu]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class NdLinear(nn.Module):
    """A linear map along each mode of a tensor in turn, the first mode first (arXiv:2503.17353, algorithm 1).

    (..., d_1, …, d_n) -> (..., h_1, …, h_n), with matrices (h_i, d_i) and, if wanted, biases (h_i,): without
    biases the linear map whose matrix is the Kronecker product of the factors.
    """

    def __init__(self, d: Sequence[int], h: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        if len(d) != len(h) or not d:
            raise ValueError(f"NdLinear needs as many modes out as in, not {tuple(d)} -> {tuple(h)}")
        self.modes = nn.ModuleList(nn.Linear(d_i, h_i, bias=bias) for d_i, h_i in zip(d, h))

    def forward(self, x: Tensor) -> Tensor:
        for axis, linear in enumerate(self.modes, -len(self.modes)):
            x = linear(x.movedim(axis, -1)).movedim(-1, axis)
        return x


class NdMLP(nn.Module):
    """An MLP of two NdLinear layers, (C, 1) -> (I, f) -> GELU -> (I, f) -> (C, 1): NdGPT-2's.

    The second mode comes from and goes to size one, so a hidden unit is gelu(w_j u_i + β_j) with u = W x + b,
    and the block a dense one of width I whose activation is learned: Σ_j v_j gelu(w_j t + β_j).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, I, f = config.n_embd, config.mlp_width or 4 * config.n_embd, config.mlp_modes  # noqa: E741
        self.c_fc = NdLinear((C, 1), (I, f))
        self.c_proj = NdLinear((I, f), (C, 1))
        self.approximate = APPROXIMATE[config.gelu]

    def forward(self, x: Tensor) -> Tensor:
        # The literal order is self.c_proj(gelu(self.c_fc(x[..., None])))[..., 0]. Two changes make it cheap:
        # the second mode stands first, so that all arithmetic runs along I; and it is contracted before the
        # large product, for 1/f of that one's cost. The large bias would have been mixed too: Σ v times.
        (large_in, spread), (large_out, mix) = self.c_fc.modes, self.c_proj.modes
        u = large_in(x)  # (B, T, I); under autocast in bf16, as the rest should be
        w, beta, v = (
            p.to(u.dtype).view(-1, *[1] * u.dim()) for p in (spread.weight, spread.bias, mix.weight)
        )
        hidden = F.gelu(torch.addcmul(beta, w, u), approximate=self.approximate)  # (f, B, T, I)
        mixed = (v * hidden).sum(0)  # (B, T, I)
        return large_out(mixed) + (mix.weight.sum() - 1) * large_out.bias + mix.bias


def matrices(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a block that are matrices, by name: all but NdLinear's mixing vectors."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and is_matrix(module.weight)
    }


class Block(nn.Module):
    """Attention, then the MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config) if config.mlp == "dense" else NdMLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


# -----------------------------------------------------------------------------
# The model


class GPT(nn.Module):
    """GPT-2: token and position embeddings, blocks, a final norm, a head that shares the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation from PyTorch's global random state; raises if a parameter has no rule.

        Matrices and embeddings N(0, 0.02); the projections that write into the residual stream 0.02 / √(2
        n_layer), so that its variance does not grow with depth. OpenAI drew wpe with 0.01; like most
        reproductions we use 0.02. NdLinear's small factors begin near 1 and 1/f, so that an NdMLP begins as a
        dense MLP would: with 0.02 for every factor its output would be 1e5 times too small to learn from.
        """
        for name, p in self.named_parameters():
            if name.endswith("c_fc.modes.1.weight"):  # (f, 1), scattered: equal ones would stay equal
                nn.init.normal_(p, mean=1.0, std=0.1)
            elif name.endswith("c_proj.modes.1.weight"):  # (1, f)
                nn.init.constant_(p, 1 / p.numel())
            elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                nn.init.ones_(p)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            elif name.endswith(("c_proj.weight", "c_proj.modes.0.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith(
                ("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight", "modes.0.weight")
            ):
                nn.init.normal_(p, std=0.02)
            else:
                raise AssertionError(f"no initialisation rule for the parameter {name}")

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, pos: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> the normalised hidden states (B, T, C) that the head turns into logits.

        Several texts packed into one row need positions of their own, `pos` (B, T) below block_size, and a
        `mask` (B, 1, T, T), True where a query (third axis) may look; they go without a cache.
        """
        T, block_size = idx.size(1), self.config.block_size
        if pos is None and cache is not None and not cache.filling:
            pos, mask = cache.lengths[:, None], cache.mask()  # (B, 1): each row goes on from its own length
        elif pos is None:
            assert T <= block_size, f"{T} tokens do not fit into block_size={block_size}"
            pos = torch.arange(T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache, mask)
        return self.transformer.ln_f(x)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        pos: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V) and, given targets (B, T), their cross-entropy in nats.

        `reduction` is "mean" over the targets that are not -100, "sum" as `training.train_step` wants it, or
        "none" for (B · T,), 0 where the target is -100. `pos` and `mask` as in `hidden`.
        """
        logits = self.lm_head(self.hidden(idx, pos=pos, mask=mask))
        if targets is None:
            return logits, None
        # log-softmax in at least float32: over 50,000 classes bf16 is too coarse
        full = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(
            full.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction
        )

    def n_params(self) -> int:
        """Number of parameters, the tied embedding once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs to train on one token of a sequence of T (PaLM's count, arXiv:2204.02311, appendix B).

        Forward and backward are 6 per parameter of a matrix product (the tied head is one, the look-ups are
        not), and attention's two products are 12 · n_layer · C · T, counted in full although half of it is
        masked.
        """
        matrices = sum(p.numel() for p in self.parameters() if is_matrix(p))
        return (
            6 * (matrices - self.transformer.wpe.weight.numel())
            + 12 * self.config.n_layer * self.config.n_embd * T
        )

    # -------------------------------------------------------------------------
    # Sampling

    def cast_linears(self, dtype: torch.dtype) -> None:
        """Keep the linear maps in `dtype`, where autocast would cast them for every token; not for training.

        The token embedding, tied to the head, goes with them.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def fill_cache(self, windows: list[list[int]], cache: KVCache) -> Tensor:
        """Run rows of different lengths at once, forgetting what the cache held; return the logits behind
        each row's last token (B, V).

        Rows are padded on the right: a causal model never looks there, so no mask is needed and positions are
        true.
        """
        device = self.lm_head.weight.device
        lengths = [len(window) for window in windows]
        idx = torch.tensor(
            [window + [0] * (max(lengths) - len(window)) for window in windows], device=device
        )  # (B, T)
        cache.filling = True
        x = self.hidden(idx, cache)  # (B, T, C)
        cache.set_lengths(lengths, device)
        last = x[torch.arange(len(windows), device=device), cache.lengths - 1]  # (B, C)
        return self.lm_head(last)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One token a row, (B,) -> the logits behind it (B, V); the cache grows by it."""
        logits = self.lm_head(self.hidden(tokens[:, None], cache)[:, 0])
        cache.advance()
        return logits

    @torch.no_grad()
    def generate(
        self,
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
        not on its neighbours. stop: a row ends after yielding this id. compile: spend half a minute on
        compiling the work of a token, for many tokens. Raises ValueError for values out of range.

        On CUDA that work is recorded once as a graph, and the host waits once in CHUNK tokens.

        GPT-2's learned positions end at block_size and cannot slide: a row that outgrows them goes on from
        the newer half of its window. A prompt longer than block_size loses its beginning.
        """
        block_size, n_tokens = self.config.block_size, self.config.n_tokens
        seeds = range(len(prompts)) if seeds is None else seeds
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
        check_sampling(temperature, top_k, top_p)

        windows = [list(p[-block_size:]) for p in prompts]
        # compiled for one number of slots, whatever the prompt
        n_slots = block_size if compile else min(block_size, max(map(len, windows)) + max_new_tokens)
        # all randomness is drawn up front on the CPU: the same on every device, and no row disturbs another
        draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        draws = torch.stack(draws).to(self.lm_head.weight.device)  # (B, max_new_tokens)
        on_cuda = draws.is_cuda
        cache = KVCache(self.config.n_layer, n_slots, static=on_cuda or compile)

        def pick(logits: Tensor, draw: Tensor) -> Tensor:
            return pick_token(logits[:, :n_tokens], draw, temperature, top_k, top_p)  # (B,)

        def step(tokens: Tensor, draw: Tensor) -> Tensor:
            return pick(self.decode(tokens, cache), draw)

        step = torch.compile(step, fullgraph=True, dynamic=False) if compile else step
        ended, done, recorded = [False] * len(prompts), 0, not on_cuda
        while done < max_new_tokens and not all(ended):
            drawn = []  # tokens (B,) on the device, read all at once
            if done == 0 or max(map(len, windows)) > block_size:
                windows = [w if len(w) <= block_size else w[-max(1, block_size // 2) :] for w in windows]
                tokens = pick(self.fill_cache(windows, cache), draws[:, done])
                drawn.append(tokens)
            room = block_size - max(map(len, windows)) + 1
            chunk = CHUNK.get(draws.device.type, 1)
            for i in range(len(drawn), min(chunk, max_new_tokens - done, room)):
                if not recorded:  # now that the cache has a free slot
                    step, recorded = record(step, (tokens, draws[:, done + i]), cache.lengths), True
                tokens = step(tokens, draws[:, done + i])
                drawn.append(tokens)
            for ids in torch.stack(drawn).tolist():
                for window, token in zip(windows, ids):
                    window.append(token)
                done += 1
                yield [None if end else token for token, end in zip(ids, ended)]
                ended = [end or token == stop for token, end in zip(ids, ended)]
                if all(ended):
                    return

    # -------------------------------------------------------------------------
    # Weights in and out

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model that takes over `weights`; ValueError if a name or shape is not the configuration's."""
        with torch.device("meta"):  # nothing is allocated before the shapes have been checked
            raw = cls(config)
        expected = {name: tuple(p.shape) for name, p in raw.state_dict().items()}
        found = {name: tuple(p.shape) for name, p in weights.items() if isinstance(p, Tensor)}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{name} has shape {found.get(name)} where the model has {expected.get(name)}"
                )
        raw.load_state_dict(weights, assign=True)
        raw.lm_head.weight = raw.transformer.wte.weight  # assigning loads the tied tensor twice
        return raw.requires_grad_(True)

    @classmethod
    def from_hf(cls, name: str) -> "GPT":
        """GPT-2 from the Hugging Face hub ("gpt2", "gpt2-xl", "user/model") or a local folder in its format.

        Needs config.json and model.safetensors (or the parts named in model.safetensors.index.json). fp32,
        CPU.
        """
        from safetensors.torch import load_file

        hf = json.loads(hf_file(name, "config.json").read_text())
        known = dict(model_type="gpt2", layer_norm_epsilon=1e-5, n_inner=None)
        known |= dict(scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False)
        known |= dict(scale_attn_weights=True, tie_word_embeddings=True)
        for key, value in known.items():
            # n_inner may also spell out the default
            if hf.get(key, value) != value and not (key == "n_inner" and hf[key] == 4 * hf["n_embd"]):
                raise ValueError(
                    f"{name} is not a GPT-2 as we build it: {key}={hf[key]!r} in config.json, not {value!r}"
                )
        activation = hf.get("activation_function", "gelu_new")
        if activation not in HF_GELU.values():
            expected = " or ".join(map(repr, HF_GELU.values()))
            raise ValueError(
                f"{name} is not a GPT-2 as we build it: activation_function={activation!r}, not {expected}"
            )
        config = GPTConfig(
            gelu=next(ours for ours, theirs in HF_GELU.items() if theirs == activation),
            n_layer=hf["n_layer"],
            n_head=hf["n_head"],
            n_embd=hf["n_embd"],
            block_size=hf["n_positions"],
            n_tokens=hf["vocab_size"],
            vocab_size=hf["vocab_size"],
        )
        try:
            parts = ["model.safetensors"]
            files = [hf_file(name, part) for part in parts]
        except FileNotFoundError:
            index = json.loads(hf_file(name, "model.safetensors.index.json").read_text())
            files = [hf_file(name, part) for part in sorted(set(index["weight_map"].values()))]
        weights = {}
        for file in files:
            for key, tensor in load_file(file).items():
                key = key.removeprefix("transformer.")
                if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # the tied head again, and the causal mask as a buffer
                if key.endswith(CONV1D):
                    tensor = tensor.t().contiguous()
                weights["transformer." + key] = tensor.float()
        if "transformer.wte.weight" in weights:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        return cls.from_weights(config, weights)

    def to_hf(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors for Hugging Face's GPT2LMHeadModel, without padded ids."""
        from safetensors.torch import save_file

        folder = Path(folder)
        config, weights = self.config, {}
        if config.mlp != "dense":
            raise ValueError(f"a GPT-2 of Hugging Face has no mlp={config.mlp!r}")
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in self.state_dict().items():
            if name == "transformer.wte.weight":
                tensor = tensor[: config.n_tokens]
            if name.endswith(CONV1D):
                tensor = tensor.t()
            if name != "lm_head.weight":  # tied: stored once
                weights[name] = tensor.detach().cpu().contiguous()
        hf = dict(
            architectures=["GPT2LMHeadModel"],
            model_type="gpt2",
            activation_function=HF_GELU[config.gelu],
            layer_norm_epsilon=1e-5,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.n_tokens,
            bos_token_id=config.n_tokens - 1,  # end-of-text is the last id of both our tokenizers
            eos_token_id=config.n_tokens - 1,
            tie_word_embeddings=True,
        )
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


HF_GELU = {"tanh": "gelu_new", "erf": "gelu"}  # config.gelu -> activation_function in config.json

# Hugging Face keeps GPT-2's matrices as (in, out), the transpose of nn.Linear's (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def hf_file(name: str, file: str) -> Path:
    """The local path of `file` of a model folder or of a model on the hub (downloaded once, then cached)."""
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise FileNotFoundError(f"no {file} in {name}")
        return Path(name) / file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:
        raise ConnectionError("no folder of that name, and the hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"no {file} in {name} on the Hugging Face hub") from error


# By device: tokens drawn before they are read. So many may be drawn in vain behind the last row's end, which
# is cheaper for a GPU than to wait for each; a CPU has nothing to wait for.
CHUNK = {"cuda": 16}


def record(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], state: Tensor) -> Callable[..., Tensor]:
    """step(*inputs), recorded as a CUDA graph: one launch instead of hundreds. Running it for the record
    leaves `state`, which it changes in place, as it was.
    """
    inputs, before = tuple(x.clone() for x in inputs), state.clone()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
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
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.float().topk(k)  # (B, k), most likely first
    probs = F.softmax(logits / temperature, dim=-1)
    # keep ids while the probability before them is below top_p: the one that crosses the boundary stays
    probs = probs * (probs.cumsum(dim=-1) - probs < top_p)
    cdf = probs.cumsum(dim=-1)
    # the first id whose cdf exceeds draw * total; it exists and has probability above 0, because draw < 1
    choice = (cdf <= draw[:, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return ids.gather(-1, choice).squeeze(-1)
