"""GPT-2: the model, its sizes, and the key-value cache that attention fills in sampling.

The one definition that every script shares. Parameters have GPT-2's names and shapes, so that weights travel:

    raw = GPT(GPTConfig(**SIZES["gpt2"]))     # random weights; OpenAI's: hf.from_hf("gpt2")
    logits, loss = raw(idx, targets)          # idx, targets: (B, T) of token ids; a target of -100 is ignored

Letters: B batch, T time (tokens), S keys attended to, C width (n_embd), V vocabulary, nh heads, hs head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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


FEW = 64  # rows; of 512 a product is as quick in PyTorch's own way


class Linear(nn.Linear):
    """nn.Linear, to which sampling on a CPU gives another way to multiply a few rows."""

    few: Callable[[Tensor], Tensor] | None = None  # see `sampling.quick_products`

    def forward(self, x: Tensor) -> Tensor:
        if self.few is None or torch.is_grad_enabled() or x.numel() > FEW * x.size(-1):
            return super().forward(x)
        return self.few(x)


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

    It hands out the slots that the longest row fills. A static one hands out all, so that every token is the
    same work on the same memory and can be recorded; one for compiled work hands out their number as
    something that varies. Both mask what a row may not see; another one only where the lengths differ.
    """

    def __init__(self, n_layer: int, n_slots: int, static: bool = False, compiled: bool = False) -> None:
        self.n_slots = n_slots  # tokens a row can hold
        self.static = static
        self.compiled = compiled
        self.keys: list[Tensor | None] = [None] * n_layer  # each (B, nh, n_slots, hs), made when first filled
        self.values: list[Tensor | None] = [None] * n_layer
        self.lengths: Tensor | None = None  # (B,) int64: slots filled in each row
        self.rows: Tensor | None = None  # (B,) int64: 0 … B - 1
        self.slots: Tensor | None = None  # (S,) int64: those handed out behind a mask, 0 … S - 1
        self.filling = True  # takes prompts; afterwards one token at a time
        self.longest = 0  # max of lengths, kept on the host so that nothing waits for the device
        self.masked = False

    def set_lengths(self, lengths: list[int], device: torch.device) -> None:
        """Declare the first `lengths[b]` slots of row b valid; what lies behind them is padding."""
        new = torch.tensor(lengths, device=device)
        if self.lengths is None:
            self.lengths, self.rows = new, torch.arange(len(new), device=device)
            self.slots = torch.arange(self.n_slots, device=device)
        else:
            self.lengths.copy_(new)  # in place: where it lies is recorded
        self.filling = False
        self.masked = self.static or self.compiled or len(set(lengths)) > 1
        self.see(max(lengths))

    def see(self, longest: int) -> None:
        """For the host, before every token: the longest row's length, to which the token will be added."""
        self.longest = longest
        if self.masked and not self.static:
            self.slots = torch.arange(longest + 1, device=self.lengths.device)
        if self.compiled:
            torch._dynamo.mark_dynamic(self.slots, 0)

    def mask(self) -> Tensor | None:
        """Which slots the next token of each row may see, (B, 1, 1, S): its own, and those filled."""
        return (self.slots <= self.lengths[:, None])[:, None, None] if self.masked else None

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
        if self.masked:
            self.keys[layer][self.rows, :, self.lengths] = k[:, :, 0]
            self.values[layer][self.rows, :, self.lengths] = v[:, :, 0]
        else:
            self.keys[layer][:, :, self.longest] = k[:, :, 0]
            self.values[layer][:, :, self.longest] = v[:, :, 0]
        S = len(self.slots) if self.masked else self.longest + 1
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
        self.modes = nn.ModuleList(Linear(d_i, h_i, bias=bias) for d_i, h_i in zip(d, h))

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

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model that takes over `weights`; ValueError if a name or shape is not the configuration's."""
        with torch.device("meta"):  # nothing is allocated before the shapes have been checked
            raw = cls(config)
        expected = {name: tuple(p.shape) for name, p in raw.state_dict().items()}

        def shape(p: Any) -> tuple[int, ...] | str:
            floats = isinstance(p, Tensor) and p.is_floating_point() and p.layout == torch.strided
            return tuple(p.shape) if floats else "of no floats"

        found = {name: shape(p) for name, p in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{name} has shape {found.get(name)} where the model has {expected.get(name)}"
                )
        raw.load_state_dict(weights, assign=True)
        raw.lm_head.weight = raw.transformer.wte.weight  # assigning loads the tied tensor twice
        return raw.requires_grad_(True)
