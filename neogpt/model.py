"""GPT-2: configuration, attention, MLP, blocks and the model. Parameters have GPT-2's names and shapes.

    raw = GPT(GPTConfig(**SIZES["gpt2"]))     # random weights; OpenAI's: hf.load("gpt2")
    logits = raw(idx)                         # idx: (B, T) token ids -> (B, T, V)
    loss = raw(idx, targets)                  # targets: (B, T) token ids; targets of -100 are ignored

Letters: B batch, T time (tokens), S keys, C width (n_embd), V vocabulary, nh heads, hs head size.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from neogpt import ndlinear

# Radford et al. 2019 for gpt2 … gpt2-xl; Brown et al. 2020 (arXiv:2005.14165), table 2.1, for gpt3-*.
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)
DEMO = dict(n_layer=3, n_head=4, n_embd=128, block_size=256, gelu="erf")
SIZES: dict[str, dict[str, Any]] = {
    "demo": DEMO,  # trains in minutes on two CPU cores
    "shakespeare": dict(n_layer=2, n_head=4, n_embd=128, block_size=64, gelu="erf"),  # trains in less than two minutes
    "gpt2": GPT2,  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),  # 1558M
    "gpt3-1.3b": dict(n_layer=24, n_head=16, n_embd=2048, block_size=2048),  # the table's 24 heads do not divide 2048
    "gpt3-2.7b": dict(n_layer=32, n_head=32, n_embd=2560, block_size=2048),
    "gpt3-6.7b": dict(n_layer=32, n_head=32, n_embd=4096, block_size=2048),
    "nd-demo": DEMO | dict(mlp="ndlinear", mlp_width=256, mlp_modes=2),
    "ndgpt2-96m": GPT2 | dict(mlp="ndlinear", mlp_width=1536, mlp_modes=2),
    "ndgpt2-82m": GPT2 | dict(mlp="ndlinear", mlp_width=768, mlp_modes=6),
}
# for scaling laws: n layers of width 64 n (d12 is gpt2), and two layers of width C
SIZES |= {f"d{n}": dict(n_layer=n, n_head=n, n_embd=64 * n, block_size=1024) for n in range(2, 25, 2)}
SIZES |= {f"demo-w{C}": DEMO | dict(n_layer=2, n_head=2, n_embd=C) for C in (24, 32, 48, 64, 96)}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Values are validated (ValueError), because configurations are read from files."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest sequence, tokens
    n_tokens: int = 50257  # number of ids of the tokenizer; padded ids are never sampled
    vocab_size: int = 50304  # rows of the embedding: see `pad_vocab`
    attention: Literal["flash", "manual"] = "flash"  # flash: PyTorch's fused kernels; manual: `manual_attention` below
    residual: Literal["fp32", "bf16"] = "fp32"  # dtype of the residual stream under autocast; bf16 halves its traffic
    gelu: Literal["tanh", "erf"] = "tanh"  # tanh: GPT-2's approximation; erf: exact, three times as fast on a CPU
    mlp: Literal["dense", "ndlinear"] = "dense"  # a name of MLPS below
    mlp_width: int | None = None  # ndlinear: size of the hidden tensor's first mode; None: 4 n_embd
    mlp_modes: int = 1  # ndlinear: size of the hidden tensor's second mode

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(GPTConfig).items():
            value, largest = vars(self)[name], 1000 if name == "n_layer" else 2**20
            allowed = get_args(kind) if get_origin(kind) is Literal else range(1, largest + 1)
            valid = type(value) in (int, str) and value in allowed  # True and 1.0 are in the range too
            if not valid and (name, value) != ("mlp_width", None):
                raise ValueError(f"{name}={value!r} in the model configuration: expected a value in {allowed}")
        if self.n_embd % self.n_head or self.n_tokens > self.vocab_size:
            raise ValueError(f"{self}: n_head must divide n_embd, and n_tokens must not exceed vocab_size")


SMALL_VOCAB = 1024  # up to here a head in fp32 costs nothing, and padding does not pay


def pad_vocab(n_tokens: int) -> int:
    """The rows of the embedding: the next multiple of 64 (50257 -> 50304), or n_tokens if they are few."""
    return n_tokens if n_tokens <= SMALL_VOCAB else -(-n_tokens // 64) * 64


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix with more than one row and column: not a bias or a gain."""
    return p.dim() >= 2 and min(p.shape) > 1


def weight_matrices(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose weight is a matrix, of a GPT (without its head) or of a block, by name."""
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    return {name: m for name, m in linears.items() if is_matrix(m.weight)}


class Cache(Protocol):
    """A key-value cache (generate.KVCache): stores a layer's k, v (B, nh, T, hs), returns all so far (B, nh, S, hs)."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √hs) V, (B, nh, T, hs), from q (B, nh, T, hs) and k, v (B, nh, S, hs). mask: broadcasts to
    (B, nh, T, S), True where a query attends; None: causal, and the queries are the last T of the S positions.
    """
    T, S, hs = q.size(-2), k.size(-2), q.size(-1)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=1 / math.sqrt(hs))  # (B, nh, T, S)
    return F.softmax(scores, dim=-1) @ v  # (B, nh, T, hs)


QUERY_CHUNK = 256  # queries at a time: their scores stay in a CPU cache


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`manual_attention` with PyTorch's fused kernels, unless they are slow: one query on CUDA; bf16 on a CPU."""
    T, S = q.size(-2), k.size(-2)
    if not (q.is_cuda and T == 1 or q.is_cpu and q.dtype == torch.bfloat16):
        # is_causal aligns the triangle to the top left, which for one query would hide all keys but the first
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
    if T == 1 and q.is_cpu:  # the keys and values of generate.KVCache are fp32 there
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    k, v, parts = k.to(q.dtype), v.to(q.dtype), []
    if T <= QUERY_CHUNK:  # without the loop below, which torch.compile would unroll for every T
        return manual_attention(q, k, v, mask)
    for end in range(QUERY_CHUNK, T + QUERY_CHUNK, QUERY_CHUNK):
        rows, n_keys = slice(end - QUERY_CHUNK, end), S - T + end if mask is None else S  # later keys are hidden
        part = mask if mask is None or mask.size(-2) == 1 else mask[..., rows, :]
        parts.append(manual_attention(q[..., rows, :], k[..., :n_keys, :], v[..., :n_keys, :], part))
    return torch.cat(parts, dim=-2)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.layer = config.n_head, layer
        self.attend = flash_attention if config.attention == "flash" else manual_attention

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, nh, S, hs)
        y = self.attend(q, k, v, mask)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


APPROXIMATE = {"tanh": "tanh", "erf": "none"}  # config.gelu -> the argument of F.gelu


class MLP(nn.Module):
    """GPT-2's MLP: two linear layers around a GELU, with a hidden width of 4 C."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = APPROXIMATE[config.gelu]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


MLPS = {
    "dense": MLP,
    "ndlinear": lambda c: ndlinear.NdMLP(c.n_embd, c.mlp_width or 4 * c.n_embd, c.mlp_modes, APPROXIMATE[c.gelu]),
}


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and added to the residual stream (pre-norm)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, logits (B, T, V) and targets (B, T); -100 is ignored. reduction: "none" gives (B · T,)."""
    # bf16 is too coarse for a log-softmax over 50,000 classes
    full = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(full.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction)


class GPT(nn.Module):
    """GPT-2: token and position embeddings, blocks, a final norm, and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialization from PyTorch's global random state. Raises AssertionError if a parameter has no rule.

        The standard deviation is 0.02, and 0.02 / √(2 n_layer) for projections into the residual stream, so that its
        variance does not grow with depth. OpenAI used 0.01 for wpe; like most reproductions we use 0.02.
        """
        normal = functools.partial(nn.init.normal_, std=0.02)
        residual = functools.partial(nn.init.normal_, std=0.02 / math.sqrt(2 * self.config.n_layer))
        rules = ndlinear.INIT | {".bias": nn.init.zeros_}  # suffix of the name -> function
        rules |= dict.fromkeys(("ln_1.weight", "ln_2.weight", "ln_f.weight"), nn.init.ones_)
        rules |= dict.fromkeys(("c_proj.weight", "c_proj.modes.0.weight"), residual)
        rules |= dict.fromkeys([f"{n}.weight" for n in ("wte", "wpe", "c_attn", "c_fc", "c_fc.modes.0")], normal)
        for name, p in self.named_parameters():
            rule = next((rule for suffix, rule in rules.items() if name.endswith(suffix)), None)
            assert rule, f"no initialization rule for the parameter {name}"
            rule(p)

    def embed(self, idx: Tensor, pos: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> the input of the first block (B, T, C). pos: positions (B, T); None: 0 … T - 1."""
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)
            assert len(pos) <= self.config.block_size, f"{len(pos)} tokens exceed block_size={self.config.block_size}"
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        is_bf16 = self.config.residual == "bf16" and torch.is_autocast_enabled(x.device.type)
        return x.bfloat16() if is_bf16 else x

    def trunk(
        self, idx: Tensor, cache: Cache | None = None, pos: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> normalized hidden states (B, T, C), the input of the head. pos: see `embed`; mask: see
        `manual_attention`. Packed sequences need both.
        """
        x = self.embed(idx, pos)
        for block in self.transformer.h:
            x = block(x, cache, mask)
        return self.transformer.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Normalized hidden states (…, C) -> logits (…, V); for a small vocabulary in fp32 even under autocast."""
        if self.config.vocab_size > SMALL_VOCAB:
            return self.lm_head(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.lm_head(x.to(self.lm_head.weight.dtype))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        pos: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), or the `cross_entropy` of targets (B, T). pos, mask: see `trunk`.
        With targets it returns no logits, because a compiled graph would fill and read a gradient of zeros for them.
        """
        logits = self.head(self.trunk(idx, pos=pos, mask=mask))
        return logits if targets is None else cross_entropy(logits, targets, reduction)

    def n_params(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs per token of a sequence of T tokens (PaLM, arXiv:2204.02311, appendix B): 6 per weight of the
        matrices and the head, and 12 · n_layer · C · T for attention, without a causal discount.
        """
        n_weights = sum(linear.weight.numel() for linear in [*weight_matrices(self).values(), self.lm_head])
        return 6 * n_weights + 12 * self.config.n_layer * self.config.n_embd * T

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model with these weights (not copied). Raises ValueError if names, shapes or dtypes do not match."""
        with torch.device("meta"):  # allocates nothing: the weights replace the parameters
            raw = cls(config)
        for name, p in weights.items():
            dense = isinstance(p, Tensor) and p.is_floating_point() and p.layout == torch.strided and p.is_contiguous()
            if not dense or p.dtype != next(iter(weights.values())).dtype:
                raise ValueError(f"{name} is not a dense floating-point tensor of the same dtype as the others")
        try:
            raw.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # the second line of the message names the first mismatch
            raise ValueError(f"the weights do not fit the model: {str(error).splitlines()[1].strip():.200}") from error
        raw.lm_head.weight = raw.transformer.wte.weight  # tied again: the weights were assigned one by one
        return raw
