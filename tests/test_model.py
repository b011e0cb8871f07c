"""The model against independent references: Hugging Face's GPT-2, closed forms, and loops without a cache."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import model
import sampling
from hf import from_hf, to_hf
from model import GPT, SIZES, GPTConfig, KVCache, Linear, flash_attention, manual_attention, pad_vocab
from sampling import cast_linears, decode, fill_cache, generate, pick_token

ATTENTIONS = ("flash", "manual")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and much slower where cores are shared."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def shape(**changes: Any) -> GPTConfig:
    """A small configuration; 3 of the 64 rows of the embedding are padding."""
    small = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, n_tokens=61, vocab_size=64)
    return GPTConfig(**(small | changes))


def rough_model(seed: int = 0, **changes: Any) -> GPT:
    """A small model in which every parameter is random and large, so that no term can go missing unnoticed.

    At GPT-2's own initialisation biases are 0 and attention is close to uniform: errors there would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = GPT(shape(**changes))
    with torch.no_grad():
        for name, p in raw.named_parameters():
            gain = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            p.copy_(gain + 0.3 * torch.randn(p.shape, generator=generator))
    return raw


def random_ids(*size: int, seed: int = 0, below: int = 61) -> Tensor:
    return torch.randint(below, size, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# Sizes

# name: layers, heads, width, context of the papers' tables (GPT-2, GPT-3 table 2.1), parameters
TABLE = {
    "gpt2": (12, 12, 768, 1024, 124e6),
    "gpt2-medium": (24, 16, 1024, 1024, 355e6),
    "gpt2-large": (36, 20, 1280, 1024, 774e6),
    "gpt2-xl": (48, 25, 1600, 1024, 1558e6),
    "gpt3-1.3b": (24, 16, 2048, 2048, 1.3e9),
    "gpt3-2.7b": (32, 32, 2560, 2048, 2.7e9),
    "gpt3-6.7b": (32, 32, 4096, 2048, 6.7e9),
}


def closed_form(L: int, C: int, T: int, V: int) -> int:
    """Embeddings, then per block 12 C² of matrices, 9 C of biases and 4 C of norms, then the final norm."""
    return V * C + T * C + L * (12 * C * C + 9 * C + 4 * C) + 2 * C


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_papers_shapes_and_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        raw = GPT(GPTConfig(**SIZES[name]))
    c = raw.config
    expected = closed_form(c.n_layer, c.n_embd, c.block_size, V=50304)
    if c.mlp == "ndlinear":
        C, I, f = c.n_embd, c.mlp_width, c.mlp_modes  # noqa: E741
        expected += c.n_layer * ((2 * C * I + I + C + 3 * f + 1) - (8 * C * C + 5 * C))
    assert raw.n_params() == expected
    if name in TABLE:
        L, nh, C, T, n_params = TABLE[name]
        assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (L, nh, C, T)
        assert raw.n_params() == pytest.approx(n_params, rel=0.03)  # the papers round to two digits


def test_published_parameter_counts() -> None:
    counts = {}
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        with torch.device("meta"):
            counts[name] = GPT(GPTConfig(**SIZES[name], vocab_size=50257)).n_params()
    expected = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # of OpenAI's released weights
    assert list(counts.values()) == expected
    with torch.device("meta"):
        assert GPT(GPTConfig(**SIZES["gpt2"])).n_params() == 124_475_904  # V = 50304


def test_flops_per_token_of_gpt2() -> None:
    with torch.device("meta"):
        raw = GPT(GPTConfig(**SIZES["gpt2"], vocab_size=50304))
    attention = 12 * 12 * 768 * 1024
    assert raw.flops_per_token(1024) - attention == 6 * (12 * 12 * 768**2 + 50304 * 768)
    assert raw.flops_per_token(1024) == pytest.approx(854.7e6, abs=0.05e6)
    assert raw.flops_per_token(512) == raw.flops_per_token(1024) - attention // 2


def test_pad_vocab() -> None:
    assert [pad_vocab(n) for n in (1, 64, 65, 257, 50257, 50304)] == [64, 64, 128, 320, 50304, 50304]


@pytest.mark.parametrize("field", ["n_layer", "n_head", "n_embd", "block_size", "n_tokens", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, None, "12", 2**20, 10**30, float("nan")])
def test_config_refuses_values_that_are_no_size(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{field: value})


def test_config_refuses_sizes_that_do_not_fit_together() -> None:
    for changes in (dict(n_embd=100, n_head=12), dict(attention="fast"), dict(attention=None)):
        with pytest.raises(ValueError, match=next(iter(changes))):
            GPTConfig(**changes)
    with pytest.raises(ValueError, match="n_tokens=50305"):
        GPTConfig(n_tokens=50305)
    GPTConfig(n_tokens=50304)  # nothing padded is fine


# -----------------------------------------------------------------------------
# Hugging Face's GPT-2 as the reference

# layers, heads, width, context, vocabulary, batch, tokens
HF_SHAPES = [(1, 1, 8, 8, 11, 1, 1), (2, 2, 16, 32, 61, 3, 32), (3, 4, 32, 20, 97, 2, 13)]


def reference(sizes: tuple[int, ...], seed: int = 0) -> Any:
    """Hugging Face's GPT2LMHeadModel with large random weights, biases and norms."""
    from transformers import GPT2Config, GPT2LMHeadModel

    L, nh, C, T, V = sizes[:5]
    ends = dict(bos_token_id=V - 1, eos_token_id=V - 1)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=L, n_head=nh, n_embd=C, n_positions=T, vocab_size=V, **ends))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(0.25 * torch.randn(p.shape, generator=generator) + (".ln_" in name and "weight" in name))
    return hf.eval()


def with_attention(raw: GPT, attention: str) -> GPT:
    """The same weights under another attention."""
    return GPT.from_weights(replace(raw.config, attention=attention), raw.state_dict())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it, of the second shape."""
    reference(HF_SHAPES[1]).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sizes", HF_SHAPES)
def test_logits_and_gradients_equal_hugging_face(
    sizes: tuple[int, ...], attention: str, tmp_path: Path
) -> None:
    hf = reference(sizes)
    hf.save_pretrained(tmp_path)
    raw = with_attention(from_hf(str(tmp_path)), attention)
    V, B, T = sizes[4:]
    idx, targets = random_ids(B, T, below=V), random_ids(B, T, seed=1, below=V)
    logits, loss = raw(idx, targets)
    expected = hf(idx).logits
    assert expected.std() > 0.5  # else the tolerance would hide much
    # fp32 sums in another order; logits are of order 1 to 10
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(hf.named_parameters())
    for name, p in raw.named_parameters():
        grad = theirs[name].grad
        grad = grad if p.dim() < 2 or "wte" in name or "wpe" in name else grad.t()  # Conv1D is (in, out)
        torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: name + m)


def test_greedy_generation_equals_hugging_face() -> None:
    from transformers import GenerationConfig

    hf = reference(HF_SHAPES[1])
    V, C = 61, 16
    weights = {
        k: v.t() if k.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and v.dim() == 2 else v
        for k, v in hf.state_dict().items()
        if not k.endswith(".attn.bias")
    }
    raw = GPT.from_weights(shape(n_embd=C, block_size=32, n_tokens=V, vocab_size=V), weights)
    prompt = [3, 1, 4, 1, 5]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=27, eos_token_id=None, bos_token_id=None, pad_token_id=0
    )
    theirs = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 5), generation_config=settings)
    ours = [step[0] for step in generate(raw, [prompt], 27, temperature=0)]
    assert prompt + ours == theirs[0].tolist()


@pytest.mark.parametrize("edition", ["sharded", "hub", "half"])
def test_from_hf_reads_every_edition(edition: str, exported: Path, tmp_path: Path) -> None:
    """In several parts; as OpenAI's weights are on the hub, bare names and mask buffers; in fp16."""
    idx = random_ids(2, 9)
    hf = reference(HF_SHAPES[1])
    if edition == "half":
        hf = hf.half().float()  # the weights that fp16 keeps
    expected = hf(idx).logits
    folder = tmp_path / edition
    if edition == "sharded":
        hf.save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        assert not (folder / "model.safetensors").exists()
    else:
        folder = exported
        weights = load_file(folder / "model.safetensors")
        if edition == "half":
            weights = {name: tensor.half() for name, tensor in weights.items()}
        else:
            weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
            for layer in range(2):
                weights[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
                weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(weights, folder / "model.safetensors")
    raw = from_hf(str(folder))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in raw.parameters())
    assert raw.lm_head.weight is raw.transformer.wte.weight
    torch.testing.assert_close(raw(idx)[0], expected, atol=1e-4, rtol=0)


def test_to_hf_is_read_by_transformers_without_the_padded_ids(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    raw = rough_model()
    to_hf(raw, tmp_path / "new" / "folder")
    hf, info = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    idx = random_ids(3, 16)
    assert hf.config.vocab_size == 61 and hf.eval()(idx).logits.shape == (3, 16, 61)
    torch.testing.assert_close(hf(idx).logits, raw(idx)[0][..., :61], atol=1e-4, rtol=0)

    again = from_hf(str(tmp_path / "new" / "folder"))
    assert again.config == replace(raw.config, vocab_size=61)
    assert torch.equal(again(idx)[0], from_hf(str(tmp_path / "new" / "folder"))(idx)[0])
    for name, p in again.state_dict().items():
        assert torch.equal(p, raw.state_dict()[name][: p.size(0)]), name


FOREIGN = [
    dict(model_type="gptj"),
    dict(activation_function="relu"),
    dict(layer_norm_epsilon=1e-6),
    dict(n_inner=100),
    dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(reorder_and_upcast_attn=True),
    dict(tie_word_embeddings=False),
]


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: next(iter(change)))
def test_from_hf_refuses_a_model_that_is_built_otherwise(change: dict, exported: Path) -> None:
    edit_config(exported, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        from_hf(str(exported))


def test_from_hf_takes_n_inner_that_spells_out_the_default(exported: Path) -> None:
    edit_config(exported, n_inner=4 * 16)
    assert from_hf(str(exported)).config.n_embd == 16


def test_from_hf_refuses_weights_that_config_json_does_not_describe(exported: Path) -> None:
    edit_config(exported, n_layer=3)
    with pytest.raises(ValueError, match=r"h\.2\."):
        from_hf(str(exported))
    edit_config(exported, n_layer=2)
    weights = load_file(exported / "model.safetensors")
    del weights["transformer.wte.weight"]
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head|wte"):
        from_hf(str(exported))


def test_from_hf_names_the_missing_file(exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        from_hf(str(exported))
    (exported / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_hf(str(exported))


def test_from_hf_on_the_hub(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if name == "user/unreachable":
            raise errors.LocalEntryNotFoundError("no connection")
        if not (exported / file).exists():
            raise errors.EntryNotFoundError("404")
        return str(exported / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert from_hf("user/model").config.n_layer == 2
    assert asked == [("user/model", "config.json"), ("user/model", "model.safetensors")]
    with pytest.raises(ConnectionError, match="cannot be reached"):
        from_hf("user/unreachable")
    (exported / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors.* user/model"):
        from_hf("user/model")


# -----------------------------------------------------------------------------
# Attention and loss


@pytest.mark.parametrize("attend", [manual_attention, flash_attention])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 5)])
def test_attention_is_the_textbook_sum(attend: Any, T: int, S: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (T, S, S))
    y = attend(q, k, v)
    for t in range(T):
        seen = S - T + t + 1
        scores = (q[:, :, t, None] * k[:, :, :seen]).sum(-1) / 2  # √hs = 2
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(y[:, :, t], (weights[..., None] * v[:, :, :seen]).sum(2))


@pytest.mark.parametrize("attend", [manual_attention, flash_attention])
def test_attention_mask_hides_keys_row_by_row(attend: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (1, 5, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])[:, None, None]
    y = attend(q, k, v, mask)
    torch.testing.assert_close(y[:1], attend(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(y[1:], attend(q[1:], k[1:, :, :2], v[1:, :, :2]))


def test_flash_equals_manual_forward_and_gradient() -> None:
    flash, manual = rough_model(attention="flash"), rough_model(attention="manual")
    assert flash.transformer.h[0].attn.attend is not manual.transformer.h[0].attn.attend
    idx, targets = random_ids(3, 16), random_ids(3, 16, seed=1)
    (logits, loss), (expected, loss_manual) = flash(idx, targets), manual(idx, targets)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # fp32, logits of order 1 to 10
    loss.backward()
    loss_manual.backward()
    for (name, p), q in zip(flash.named_parameters(), manual.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_position_sees_a_later_one(attention: str) -> None:
    """By gradient: of the logits at t, towards the embedding of every input position."""
    raw = rough_model(attention=attention)
    embedded = []
    raw.transformer.wte.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits, _ = raw(random_ids(2, 10))
    weights = torch.randn(2, logits.size(-1), generator=torch.Generator().manual_seed(1))
    for t in range(10):
        (grad,) = torch.autograd.grad((logits[:, t] * weights).sum(), embedded[0], retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all(), t
        assert (grad[:, : t + 1].abs().amax(-1) > 0).all(), t  # and it sees itself and all before it


def test_loss_is_the_mean_negative_log_likelihood_in_nats() -> None:
    raw = rough_model().double()
    idx, targets = random_ids(3, 7), random_ids(3, 7, seed=1)
    targets[0, :4] = targets[2, 6] = -100
    logits, loss = raw(idx, targets)
    nats = []
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist()):
        if target != -100:
            nats.append(math.log(math.fsum(map(math.exp, row))) - row[target])
    assert len(nats) == 16
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(math.fsum(nats) / 16, rel=1e-12)
    assert raw(idx, targets, reduction="sum")[1].item() == pytest.approx(math.fsum(nats), rel=1e-12)
    assert raw(idx)[1] is None

    loss.backward()
    assert raw.transformer.wpe.weight.grad[:7].abs().amax(-1).min() > 0
    everything_ignored = raw(idx, torch.full_like(targets, -100), reduction="sum")[1]
    assert everything_ignored == 0


def test_loss_of_bf16_logits_is_taken_in_float32() -> None:
    raw = rough_model()
    idx, targets = random_ids(3, 7), random_ids(3, 7, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = raw(idx, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # fp32's rounding; in bf16 it would be 1e-3
    half = copy.deepcopy(raw).bfloat16()(idx, targets)[1]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.03)
    # bf16 keeps 8 bits: against fp32 the loss moves by a percent or so, not by more
    assert loss.item() == pytest.approx(raw(idx, targets)[1].item(), rel=0.03)


def test_a_sequence_longer_than_block_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="17 tokens"):
        rough_model()(random_ids(1, 17))


# -----------------------------------------------------------------------------
# Initialisation and tying


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    raw = GPT(shape(n_layer=8, n_embd=64, n_head=4, block_size=64, vocab_size=512, n_tokens=500))
    stds = dict(wte=0.02, wpe=0.02, c_attn=0.02, c_fc=0.02, c_proj=0.02 / 4)  # 1 / √(2 · 8 layers) = 1/4
    seen = set()
    for name, p in raw.named_parameters():
        kind, what = name.split(".")[-2:]
        if what == "bias":
            assert (p == 0).all(), name
        elif kind.startswith("ln_"):
            assert (p == 1).all(), name
        else:
            n, std = p.numel(), stds[kind]
            seen.add(kind)
            # five standard errors of a sample's deviation and mean
            assert abs(p.std().item() - std) < 5 * std / math.sqrt(2 * n), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(n), name
    assert seen == stds.keys()


def test_same_seed_same_weights() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(GPT(shape()).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    drawn = [name for name, p in models[0].items() if p.dim() >= 2]
    assert not any(torch.equal(models[0][name], models[2][name]) for name in drawn)


def test_a_parameter_without_a_rule_is_refused() -> None:
    class Gated(GPT):
        def init_weights(self) -> None:
            self.gate = torch.nn.Parameter(torch.zeros(4))
            super().init_weights()

    with pytest.raises(AssertionError, match="gate"):
        Gated(shape())


def test_loss_at_the_start_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    V = 512
    raw = GPT(shape(n_layer=4, n_embd=64, n_head=4, vocab_size=V, n_tokens=V))
    _, loss = raw(random_ids(16, 16, below=V), random_ids(16, 16, seed=1, below=V))
    # logits of deviation s = 0.02 · √64 add about s²/2 = 0.013; 256 targets scatter by s / 16 = 0.01
    assert loss.item() == pytest.approx(math.log(V), abs=0.05)


def test_head_and_embedding_stay_one_tensor() -> None:
    raw = rough_model()
    editions = [
        raw,
        copy.deepcopy(raw),
        GPT.from_weights(raw.config, raw.state_dict()),
        GPT.from_weights(raw.config, copy.deepcopy(raw.state_dict())),
        GPT.from_weights(raw.config, {name: p.clone() for name, p in raw.state_dict().items()}),
        rough_model().to(torch.float64),
        rough_model().to("cpu", torch.bfloat16),
    ]
    for edition in editions:
        assert edition.lm_head.weight is edition.transformer.wte.weight
        assert edition.n_params() == raw.n_params()
        edition(random_ids(2, 5), random_ids(2, 5, seed=1))[1].backward()
        torch.optim.SGD(edition.parameters(), lr=1.0).step()
        assert torch.equal(edition.lm_head.weight, edition.transformer.wte.weight)


def test_from_weights_gives_the_same_model() -> None:
    raw = rough_model()
    again = GPT.from_weights(raw.config, copy.deepcopy(raw.state_dict()))
    idx = random_ids(2, 16)
    assert torch.equal(again(idx)[0], raw(idx)[0])
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())


def test_from_weights_refuses_what_does_not_fit() -> None:
    raw = rough_model()
    weights = raw.state_dict()
    name = "transformer.h.1.mlp.c_fc.weight"
    for bad in (
        weights | {name: weights[name].t()},
        weights | {name: weights[name][:-1]},
        {k: v for k, v in weights.items() if k != name},
    ):
        with pytest.raises(ValueError, match="h.1.mlp.c_fc.weight"):
            GPT.from_weights(raw.config, bad)
    with pytest.raises(ValueError, match="_orig_mod.x"):
        GPT.from_weights(raw.config, weights | {"_orig_mod.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="wpe"):
        GPT.from_weights(replace(raw.config, block_size=17), weights)


# -----------------------------------------------------------------------------
# Generation


def tokens_of(raw: GPT, prompts: Sequence[Sequence[int]], n: int, **controls: Any) -> list[list[int | None]]:
    """Each row's generated tokens."""
    return [list(row) for row in zip(*generate(raw, prompts, n, **controls))]


@torch.no_grad()
def uncached(raw: GPT, prompt: Sequence[int], n: int, seed: int = 0, **controls: Any) -> list[int]:
    """The loop that `generate` must equal: one row, a full forward over the whole window at every step."""
    T, n_tokens = raw.config.block_size, raw.config.n_tokens
    draws = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    window, out = list(prompt)[-T:], []
    for step in range(n):
        if len(window) > T:
            window = window[-max(1, T // 2) :]
        logits = raw(torch.tensor([window]))[0][:, -1, :n_tokens]
        if controls.get("temperature") == 0:
            token = int(logits.argmax())
        else:
            settings = dict(temperature=1.0, top_k=0, top_p=1.0) | controls
            token = pick_token(logits, draws[step : step + 1], **settings).item()
        window.append(token)
        out.append(token)
    return out


CONTROLS = [dict(temperature=0), dict(), dict(temperature=0.7, top_k=9), dict(temperature=1.3, top_p=0.8)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_cached_equals_uncached_token_for_token(controls: dict, attention: str) -> None:
    """A ragged batch, prompts shorter and longer than the window, far past its end."""
    raw = rough_model(attention=attention)
    lengths = (1, 5, 15, 16, 17, 40)
    prompts = [random_ids(n, seed=n).tolist() for n in lengths]
    seeds = [11, 7, 5, 3, 2, 10**9]
    expected = [uncached(raw, p, 36, seed, **controls) for p, seed in zip(prompts, seeds)]
    assert tokens_of(raw, prompts, 36, seeds=seeds, **controls) == expected
    assert len({tuple(row) for row in expected}) >= 5  # rows do tell different stories


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [(4,), (4, 4), (1, 3)])
def test_cached_equals_uncached_in_small_windows(block_size: int, lengths: tuple[int, ...]) -> None:
    raw = rough_model(seed=1, block_size=block_size)
    prompts = [random_ids(n, seed=n).tolist() for n in lengths]
    expected = [uncached(raw, p, 20, seed) for seed, p in enumerate(prompts)]
    assert tokens_of(raw, prompts, 20) == expected


@pytest.mark.parametrize("chunk", [2, 3, 16])
@pytest.mark.parametrize("block_size", [3, 8, 16])
def test_tokens_read_in_chunks_are_the_same(
    chunk: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = rough_model(block_size=block_size)
    prompts = [random_ids(n, seed=n).tolist() for n in (1, 3, 14)]
    one_by_one = [tokens_of(raw, prompts, n) for n in (1, 2, 30)]
    stop = one_by_one[2][0][7]
    stopped = tokens_of(raw, prompts, 30, stop=stop)
    monkeypatch.setitem(sampling.CHUNK, "cpu", chunk)
    assert [tokens_of(raw, prompts, n) for n in (1, 2, 30)] == one_by_one
    assert tokens_of(raw, prompts, 30, stop=stop) == stopped


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", [(5, 5), (1, 9, 4)])
def test_a_static_cache_gives_the_same_logits(lengths: tuple[int, ...], attention: str) -> None:
    raw = rough_model(attention=attention).double()
    T = raw.config.block_size
    caches = [KVCache(raw.config.n_layer, T, static=static) for static in (False, True)]
    for filled in range(2):  # filled again, it has forgotten what it held
        windows = [random_ids(n, seed=n + filled).tolist() for n in lengths]
        with torch.no_grad():
            logits = [fill_cache(raw, windows, cache) for cache in caches]
            for step in range(T - max(lengths)):
                torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
                tokens = random_ids(len(lengths), seed=99 + step)
                windows = [[*window, int(token)] for window, token in zip(windows, tokens)]
                logits = [decode(raw, tokens, cache) for cache in caches]
        whole = torch.stack([raw(torch.tensor([window]))[0][0, -1] for window in windows])
        torch.testing.assert_close(logits[1], whole, rtol=0, atol=1e-12)


def test_a_static_token_is_the_same_graph_every_time() -> None:
    """What is compiled or recorded must not depend on a number that grows: one trace serves all tokens."""
    raw = rough_model()
    traces = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        traces.append(graph)
        return graph.forward

    cache = KVCache(raw.config.n_layer, 16, static=True)
    with torch.no_grad():
        fill_cache(raw, [[1, 2, 3], [4]], cache)
        step = torch.compile(lambda tokens: decode(raw, tokens, cache), backend=count, fullgraph=True)
        for token in range(8):
            step(torch.tensor([token, token + 1]))
    assert len(traces) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_out", [10, 16, 37])  # less than, as many as, and some more than the parts
@pytest.mark.parametrize("cpu", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (32,), (33,), (3, 5), (4, 1)], ids=str)
def test_a_few_rows_go_through_a_linear_map_in_another_way(
    rows: tuple[int, ...], cpu: str, n_out: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "CPU", cpu)
    linear = Linear(6, n_out, bias=bias).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 6, generator=generator, dtype=torch.float64)
    expected = x @ linear.weight.T + (linear.bias if bias else 0)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-14)
        transposed = x.transpose(0, -1).contiguous().transpose(0, -1)  # as it comes from such a map
        torch.testing.assert_close(linear(transposed), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-14)  # and where gradients are wanted
    assert linear(x).requires_grad


def test_linears_in_bf16_are_what_autocast_makes_of_them() -> None:
    raw = rough_model()
    idx = random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = raw(idx)[0]
        cast_linears(raw, torch.bfloat16)
        found = raw(idx)[0]
    assert raw.lm_head.weight is raw.transformer.wte.weight
    assert {p.dtype for m in raw.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()} == {
        torch.bfloat16
    }
    # the embedding, tied to the head, is rounded too: 2^-9 of values of order 1
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_a_row_depends_on_its_prompt_and_seed_alone() -> None:
    raw = rough_model()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 14, 9)]
    together = tokens_of(raw, prompts, 30, seeds=[5, 6, 7])
    for i, prompt in enumerate(prompts):
        assert tokens_of(raw, [prompt], 30, seeds=[5 + i]) == [together[i]]
    assert tokens_of(raw, prompts[::-1], 30, seeds=[7, 6, 5]) == together[::-1]


def test_seeds_are_reproducible_and_differ() -> None:
    raw = rough_model()
    prompts = [[1, 2, 3]] * 4
    torch.manual_seed(0)
    first = tokens_of(raw, prompts, 12, seeds=[5, 6, 5, 7])
    torch.manual_seed(1)
    assert tokens_of(raw, prompts, 12, seeds=[5, 6, 5, 7]) == first  # no global state
    assert first[0] == first[2]
    assert len({tuple(row) for row in first}) == 3
    assert tokens_of(raw, prompts, 12) == tokens_of(raw, prompts, 12, seeds=range(4))
    before = torch.get_rng_state()
    tokens_of(raw, prompts, 3)
    assert torch.equal(torch.get_rng_state(), before)  # nor does sampling disturb it


def test_a_prompt_longer_than_block_size_works_like_its_end() -> None:
    raw = rough_model()
    prompt = random_ids(50).tolist()
    assert tokens_of(raw, [prompt], 20) == tokens_of(raw, [prompt[-16:]], 20)
    assert tokens_of(raw, [prompt], 20) != tokens_of(raw, [prompt[-15:]], 20)
    assert tokens_of(raw, [tuple(prompt)], 20) == tokens_of(raw, [prompt], 20)
    assert prompt == random_ids(50).tolist()  # and the caller's list is as it was


def test_controls_that_leave_one_token_are_greedy() -> None:
    raw = rough_model()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 14)]
    greedy = tokens_of(raw, prompts, 25, temperature=0)
    assert tokens_of(raw, prompts, 25, top_k=1) == greedy
    assert tokens_of(raw, prompts, 25, top_p=1e-9) == greedy
    assert tokens_of(raw, prompts, 25, temperature=1e-5) == greedy
    assert tokens_of(raw, prompts, 25, temperature=0, top_k=5, top_p=0.5, seeds=[8, 9]) == greedy
    sampled = tokens_of(raw, prompts, 25)
    assert sampled != greedy
    for top_k in (0, 61, 62, 64, 10**6):  # all there are
        assert tokens_of(raw, prompts, 25, top_k=top_k) == sampled


@pytest.mark.parametrize("controls", [*CONTROLS, dict(top_k=10**6), dict(top_p=1e-9)], ids=str)
def test_padded_ids_are_never_yielded(controls: dict) -> None:
    raw = rough_model(n_tokens=50)
    with torch.no_grad():  # a direction that every hidden state shares, and the padded rows point to
        raw.transformer.ln_f.bias.fill_(1.0)
        raw.transformer.wte.weight[50:] = 10.0
    prompts = [random_ids(n, seed=n, below=50).tolist() for n in (3, 14)]
    assert (raw(torch.tensor([prompts[1]]))[0].argmax(-1) >= 50).all()
    rows = tokens_of(raw, prompts, 40, **controls)
    assert all(token < 50 for row in rows for token in row)


def test_stop_ends_a_row_once_and_the_generator_with_the_last() -> None:
    raw = rough_model()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 14, 9)]
    free = tokens_of(raw, prompts, 60)
    common = [token for token in free[0] if all(token in row for row in free)]
    # an id that all rows come to, each at a time of its own
    stop = next(token for token in common if len({row.index(token) for row in free}) == 3)
    ends = [row.index(stop) for row in free]
    steps = list(generate(raw, prompts, 60, stop=stop))
    assert len(steps) == max(ends) + 1 < 60
    for row, end, unstopped in zip(zip(*steps), ends, free):
        assert list(row) == unstopped[: end + 1] + [None] * (max(ends) - end)


def test_generate_yields_as_it_goes_and_no_more_than_asked() -> None:
    raw = rough_model()
    calls = []

    def note(module: torch.nn.Module, args: tuple[Tensor], x: Tensor) -> None:
        calls.append(x.shape[:2])
        assert not x.requires_grad  # a graph over all steps would fill the memory

    raw.transformer.ln_f.register_forward_hook(note)
    steps = generate(raw, [[1, 2, 3], [4]], 5)
    assert calls == []
    next(steps)
    assert calls == [(2, 3)]
    assert len(list(steps)) == 4
    assert calls == [(2, 3)] + [(2, 1)] * 4  # one token a step: the cache is used
    assert list(generate(raw, [[1]], 0)) == []


def test_only_the_last_position_goes_through_the_head() -> None:
    raw = rough_model()
    sizes = []
    raw.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    list(generate(raw, [[1, 2, 3, 4], [5, 6]], 3))
    assert sizes == [2 * 64] * 3


BAD_CALLS = [
    dict(prompts=[]),
    dict(prompts=[[1], []]),
    dict(prompts=[[1, 61]]),  # a padded id
    dict(prompts=[[-1]]),
    dict(seeds=[1, 2]),
    dict(temperature=-0.1),
    dict(temperature=float("nan")),
    dict(temperature=float("inf")),
    dict(top_k=-1),
    dict(top_p=0.0),
    dict(top_p=-0.5),
    dict(top_p=1.01),
    dict(top_p=float("nan")),
    dict(max_new_tokens=-1),
]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=str)
def test_generate_refuses_what_makes_no_sense(bad: dict) -> None:
    with pytest.raises(ValueError):
        list(generate(rough_model(), **(dict(prompts=[[1, 2]], max_new_tokens=3) | bad)))


def test_an_abandoned_generator_leaves_the_model_trainable() -> None:
    raw = rough_model()
    idx, targets = random_ids(2, 9), random_ids(2, 9, seed=1)
    raw(idx, targets)[1].backward()
    expected = [p.grad.clone() for p in raw.parameters()]
    raw.zero_grad()
    steps = generate(raw, [[1, 2, 3]], 30)
    next(steps)
    assert torch.is_grad_enabled()  # also between two tokens
    raw(idx, targets)[1].backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(raw.parameters(), expected))
    next(steps)
    steps.close()
    raw.zero_grad()
    raw(idx, targets)[1].backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(raw.parameters(), expected))
    assert raw.training


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_under_bf16_autocast(attention: str) -> None:
    raw = rough_model(attention=attention)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 14, 30)]
    with torch.autocast("cpu", torch.bfloat16):
        rows = tokens_of(raw, prompts, 40)
        logits = raw(torch.tensor([prompts[1]]))[0][0, -1]
        greedy = tokens_of(raw, prompts[1:2], 1, temperature=0)
    assert logits.dtype == torch.bfloat16
    assert greedy == [[int(logits[:61].argmax())]]
    assert [len(row) for row in rows] == [40] * 3
    assert all(0 <= token < 61 for row in rows for token in row)


def test_generate_samples_from_the_models_probabilities() -> None:
    """Frequencies of all pairs of two tokens over many seeds: the chain rule, end to end."""
    raw = rough_model(n_tokens=4, vocab_size=8)
    n, prompt = 6000, [0, 3, 1]
    pairs = torch.tensor(tokens_of(raw, [prompt] * n, 2, temperature=1.5))  # (n, 2)
    found = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16) / n
    with torch.no_grad():
        probs = raw(torch.tensor([prompt + [a] for a in range(4)]))[0][..., :4].div(1.5).softmax(-1)
    expected = (probs[0, -2][:, None] * probs[:, -1]).flatten()  # p(a) p(b | a)
    assert expected.max() < 0.5 and probs[:, -1].std(0).max() > 0.05  # the second does hang on the first
    error = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-3).all(), (found, expected)


# -----------------------------------------------------------------------------
# Choosing a token from logits

PROBS = torch.tensor([0.05, 0.5, 0.15, 0.3])  # not sorted: ids must be carried along


def frequencies(logits: Tensor, n: int = 10_000, temperature: float = 1.0, **controls: Any) -> Tensor:
    """How often each id is chosen when the draws cover [0, 1) evenly: its probability, to 1/n."""
    draws = (torch.arange(n) + 0.5) / n
    settings = dict(temperature=temperature, top_k=0, top_p=1.0) | controls
    ids = pick_token(logits.expand(n, -1), draws, **settings)
    return torch.bincount(ids, minlength=logits.numel()) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_pick_token_follows_the_softmax(temperature: float) -> None:
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    expected = (logits.double() / temperature).softmax(-1).float()
    # evenly spaced draws hit each interval to within one draw at either end
    torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=2e-4, rtol=0)
    n = 40_000
    draws = torch.rand(n, generator=torch.Generator().manual_seed(1))
    ids = pick_token(logits.expand(n, -1), draws, temperature, 0, 1.0)
    found = torch.bincount(ids, minlength=20) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-4).all()


CUTS = [
    (dict(top_k=2), [0, 5 / 8, 0, 3 / 8]),
    (dict(top_k=3), [0, 50 / 95, 15 / 95, 30 / 95]),
    (dict(top_k=4), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_k=99), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=1e-9), [0, 1, 0, 0]),
    (dict(top_p=0.45), [0, 1, 0, 0]),
    (dict(top_p=0.55), [0, 5 / 8, 0, 3 / 8]),  # the id that crosses the boundary stays
    (dict(top_p=0.75), [0, 5 / 8, 0, 3 / 8]),
    (dict(top_p=0.9), [0, 50 / 95, 15 / 95, 30 / 95]),
    (dict(top_p=0.96), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=1.0), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),  # top_p is a share of what top_k left: 5/8 is enough
]


@pytest.mark.parametrize("controls, expected", CUTS, ids=str)
def test_pick_token_cuts(controls: dict, expected: list[float]) -> None:
    found = frequencies(PROBS.log(), **controls)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=2e-4, rtol=0)  # two draws


def test_pick_token_applies_the_temperature_before_top_p() -> None:
    # at temperature 2 the probabilities go as their roots: .117 .371 .203 .287 -> two are below 0.6, not one
    assert (frequencies(PROBS.log(), temperature=2.0, top_p=0.55) > 0).tolist() == [False, True, False, True]
    assert (frequencies(PROBS.log(), temperature=2.0, top_p=0.7) > 0).tolist() == [False, True, True, True]


def test_pick_token_takes_each_row_by_itself() -> None:
    logits = torch.stack([PROBS.log(), PROBS.flip(0).log()])
    assert pick_token(logits, torch.tensor([0.49, 0.49]), 1.0, 0, 1.0).tolist() == [1, 2]
    assert pick_token(logits, torch.tensor([0.99, 0.01]), 1.0, 0, 1.0).tolist() == [0, 2]
    assert pick_token(logits, torch.tensor([0.49, 0.99]), 0, 0, 1.0).tolist() == [1, 2]


def test_pick_token_gives_each_id_a_half_open_share_of_the_draws() -> None:
    ids = pick_token(torch.zeros(4, 4), torch.tensor([0.0, 0.25, 0.5, 0.75]), 1.0, 0, 1.0)
    assert sorted(ids.tolist()) == [0, 1, 2, 3]


def test_pick_token_at_the_ends_of_the_draw_and_of_float() -> None:
    most = 1 - 2.0**-24  # the largest float32 below 1, and more than torch.rand gives
    logits = 3 * torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = float("-inf")
    for draw in (0.0, most):
        for controls in (dict(), dict(top_k=90), dict(top_p=0.99), dict(top_k=70, top_p=0.3)):
            settings = dict(temperature=1.0, top_k=0, top_p=1.0) | controls
            ids = pick_token(logits, torch.full((300,), draw), **settings)
            assert torch.isfinite(logits.gather(1, ids[:, None])).all()
    for temperature in (1e-3, 1e-20, 1e-45, 1e-300):  # the likeliest, whatever over- or underflows
        ids = pick_token(logits, torch.full((300,), 0.5), temperature, 0, 1.0)
        if temperature < 1e-3:
            assert torch.equal(ids, logits.argmax(-1))
    even = pick_token(torch.tensor([[1.0, 2.0]]).expand(2, 2), torch.tensor([0.4, 0.6]), 1e30, 0, 1.0)
    assert even.tolist() == [1, 0]


# -----------------------------------------------------------------------------
# On a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_flash_equals_manual_in_bf16_on_cuda() -> None:
    sizes = dict(n_embd=128, n_head=2, block_size=256)
    logits = []
    torch.manual_seed(0)
    weights = GPT(shape(**sizes)).state_dict()
    idx = random_ids(2, 256).cuda()
    for attention in ATTENTIONS:
        raw = GPT.from_weights(shape(**sizes, attention=attention), weights).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits.append(raw(idx)[0].float())
    assert logits[0].std() > 0.1
    # bf16 keeps 8 bits: 2^-8 of logits that are of order 1, a few times over
    torch.testing.assert_close(logits[0], logits[1], atol=0.03, rtol=0.03)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_on_cuda_equals_the_cpu(attention: str) -> None:
    raw = rough_model(attention=attention)
    prompts = [random_ids(n, seed=n).tolist() for n in (1, 5, 16, 40)]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would round to 10 bits
    try:
        for controls in (dict(temperature=0), dict(temperature=0.9, top_k=20)):
            expected = tokens_of(raw.cpu(), prompts, 40, **controls)
            assert tokens_of(raw.cuda(), prompts, 40, **controls) == expected
    finally:
        torch.set_float32_matmul_precision(precision)
