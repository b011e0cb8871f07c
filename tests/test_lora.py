"""Low-rank adapters: what they compute, what is trained, and files that PEFT can read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import load_model, save_checkpoint
from hf import from_hf, to_hf
from lora import add_lora, apply_adapter, fingerprint, load_lora, lora_weights, merged, save_adapter
from model import GPT, SIZES, GPTConfig
from optimizers import make_optimizers

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, n_tokens=257, vocab_size=320)


def tiny() -> GPT:
    """A small model with weights that are all at work."""
    torch.manual_seed(0)
    raw = GPT(GPTConfig(**TINY))
    with torch.no_grad():
        for p in raw.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return raw


def adapted(rank: int = 4, alpha: float = 6.0) -> GPT:
    """The same model with adapters that are no longer 0."""
    raw = tiny()
    add_lora(raw, rank, alpha)
    with torch.no_grad():
        for p in lora_weights(raw).values():
            p.add_(0.1 * torch.randn_like(p))
    return raw


@pytest.fixture
def idx() -> Tensor:
    """Some token ids, (3, 20)."""
    return torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))


def logits_of(raw: GPT, idx: Tensor) -> Tensor:
    """The logits of all ids that the tokenizer has."""
    with torch.no_grad():
        return raw(idx)[0][..., :257]


# -----------------------------------------------------------------------------
# What they compute and what is trained


def test_new_adapters_change_nothing(idx: Tensor) -> None:
    raw = tiny()
    before = logits_of(raw, idx)
    add_lora(raw, 4, 32.0)
    assert torch.equal(logits_of(raw, idx), before)
    assert torch.equal(logits_of(merged(raw), idx), before)
    assert all(p.abs().max() > 0 for name, p in lora_weights(raw).items() if "lora_A" in name)


def test_an_adapter_by_hand() -> None:
    """W x + b + alpha / rank · B A x, with float64 and nothing of lora.py."""
    raw = adapted(rank=4, alpha=6.0).double()
    layer = raw.transformer.h[1].mlp.c_proj
    x = torch.randn(5, 64, dtype=torch.float64)
    expected = x @ layer.weight.T + layer.bias + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 64), (16, 4))


def test_merged_equals_unmerged(idx: Tensor) -> None:
    raw = adapted()
    kept = {name: p.clone() for name, p in raw.state_dict().items()}
    one = merged(raw)
    torch.testing.assert_close(logits_of(one, idx), logits_of(raw, idx), rtol=0, atol=1e-5)
    assert (logits_of(one, idx) - logits_of(tiny(), idx)).abs().max() > 0.1
    assert one.state_dict().keys() == tiny().state_dict().keys()
    assert all(torch.equal(p, kept[name]) for name, p in raw.state_dict().items())  # training can go on


def test_only_the_adapters_are_trained(idx: Tensor) -> None:
    raw = adapted()
    before = {name: p.detach().clone() for name, p in raw.named_parameters()}
    optimizers = make_optimizers(raw, optimizer="adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    raw(idx, idx)[1].backward()
    trained = {name for name, p in raw.named_parameters() if p.grad is not None}
    assert trained == {name for name in before if "lora_" in name} and len(trained) == 2 * 4 * 2
    assert all(p.grad.abs().max() > 0 for name, p in raw.named_parameters() if name in trained)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    moved = {name for name, p in raw.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


def test_the_adapters_begin_as_the_seed_says() -> None:
    models = []
    for seed in (1, 1, 2):
        raw = tiny()
        torch.manual_seed(seed)
        add_lora(raw, 4, 8.0)
        models.append(raw.transformer.h[0].mlp.c_proj.lora_A)
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])
    # a uniform distribution over ±1/√in, PEFT's
    assert 0.9 / math.sqrt(64) < models[0].abs().max() <= 1 / math.sqrt(64)


def test_gpt2_has_1179648_parameters_in_adapters_of_rank_8() -> None:
    with torch.device("meta"):
        raw = GPT(GPTConfig(**SIZES["gpt2"]))
        n_params = raw.n_params()
        add_lora(raw, 8, 32.0)
    n = sum(p.numel() for p in raw.parameters() if p.requires_grad)
    # in + out of four matrices: 768 + 2304, 768 + 768, 768 + 3072, 3072 + 768
    assert n == 12 * 8 * (3072 + 1536 + 3840 + 3840) == 1_179_648
    assert raw.n_params() == n_params + n


def test_ndlinear_adapts_its_large_factors(tmp_path: Path) -> None:
    raw = GPT(GPTConfig(**TINY, mlp="ndlinear", mlp_width=24, mlp_modes=3))
    base = GPT.from_weights(raw.config, {name: p.clone() for name, p in raw.state_dict().items()})
    add_lora(raw, 4, 8.0)
    assert len(lora_weights(raw)) == 2 * 4 * raw.config.n_layer
    for p in lora_weights(raw).values():
        torch.nn.init.normal_(p, std=0.1)
    for name, p in raw.named_parameters():
        if name.endswith("modes.0.bias"):
            torch.nn.init.normal_(p)  # the cheap order counts it apart
    idx = torch.randint(257, (2, 8))
    torch.testing.assert_close(merged(raw)(idx)[0], raw(idx)[0], rtol=0, atol=1e-5)
    assert not torch.allclose(base(idx)[0], raw(idx)[0])
    save_adapter(tmp_path, raw, "somewhere")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_proj", "c_fc.modes.0", "c_proj.modes.0"]


def test_loading_checks_names_and_shapes() -> None:
    raw, weights = adapted(), lora_weights(adapted())
    before = {name: p.clone() for name, p in lora_weights(raw).items()}
    name = "transformer.h.0.mlp.c_fc.lora_A"
    for wrong, message in [
        ({k: w for k, w in weights.items() if k != name}, f"{name} has shape None .* \\(4, 16\\)"),
        (weights | {name: torch.zeros(4, 17)}, f"{name} has shape \\(4, 17\\) .* \\(4, 16\\)"),
        (weights | {"other": torch.zeros(1)}, "other has shape \\(1,\\) .* None"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_lora(raw, wrong)
        assert all(torch.equal(p, before[k]) for k, p in lora_weights(raw).items())
    fresh = tiny()
    add_lora(fresh, 4, 6.0)
    load_lora(fresh, weights)
    assert all(torch.equal(p, weights[k]) for k, p in lora_weights(fresh).items())


# -----------------------------------------------------------------------------
# Files


def write_base(folder: Path) -> str:
    """The tiny model as a checkpoint of pretraining; its folder."""
    raw = tiny()
    folder.mkdir()
    state = dict(stage="pretraining", step=3, model=raw.state_dict(), tokenizer="bytes")
    save_checkpoint(folder, state | dict(model_config=raw.config.__dict__), keep=1)
    return str(folder)


def test_the_files_are_those_of_peft(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", adapted(rank=4, alpha=6.0), "some/base")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    known = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=6, fan_in_fan_out=True, bias="none")
    known |= dict(
        base_model_name_or_path="some/base", target_modules=list(("c_attn", "c_proj", "c_fc")), lora_dropout=0
    )
    assert {key: config[key] for key in known} == known and config["inference_mode"] is True
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 4 * 2
    shapes = {
        "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight": (4, 16),
        "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight": (48, 4),
        "base_model.model.transformer.h.0.mlp.c_proj.lora_A.weight": (4, 64),
        "base_model.model.transformer.h.0.mlp.c_proj.lora_B.weight": (16, 4),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("kind", ["folder", "file", "hf"])
def test_an_adapter_loads_with_its_base(tmp_path: Path, idx: Tensor, kind: str) -> None:
    base = write_base(tmp_path / "base")
    if kind == "file":
        base += "/ckpt_000003.pt"
    elif kind == "hf":
        base = str(tmp_path / "hf")
        to_hf(tiny(), base)
    raw = adapted()
    weights = from_hf(base).state_dict() if kind == "hf" else tiny().state_dict()
    save_adapter(tmp_path / "adapter", raw, base, fingerprint(weights))
    noted: list[str] = []
    loaded, tokenizer = load_model(str(tmp_path / "adapter"), "", noted.append)
    torch.testing.assert_close(logits_of(loaded, idx), logits_of(raw, idx), rtol=0, atol=1e-5)
    assert tokenizer.name == "bytes" and f"an adapter for {base}" in noted[-1]


def refused(folder: Path, message: str) -> None:
    """Check that loading the folder ends with a message of one line that names it."""
    with pytest.raises(SystemExit, match=message) as error:
        load_model(str(folder), "", print)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(peft_type="IA3"), "holds no LoRA adapter as PEFT writes it"),
        (dict(r=0), "has r=0"),
        (dict(r="four"), "has r='four'"),
        (dict(r=None), "has r=None"),
        (dict(lora_alpha="x"), "has lora_alpha='x'"),
        (dict(base_model_name_or_path=None), "has base_model_name_or_path=None"),
        (dict(r=2), "has r=2, which is not the size of its matrices"),
        (dict(use_dora=True), "has use_dora=True, which we do not have"),
        (dict(use_rslora=True), "has use_rslora=True"),
        (dict(rank_pattern={"c_fc": 2}), "has rank_pattern="),
        (dict(bias="all"), "has bias='all'"),
    ],
    ids=str,
)
def test_adapters_that_we_do_not_have(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    save_adapter(tmp_path / "adapter", adapted(), write_base(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    refused(tmp_path / "adapter", f"cannot use the adapter .*{message}")


def test_damaged_and_foreign_adapters(tmp_path: Path) -> None:
    folder, base = tmp_path / "adapter", write_base(tmp_path / "base")
    save_adapter(folder, adapted(), base)
    config, weights = (folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    good = load_file(weights)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    save_file(good | {name: torch.zeros(48, 5)}, weights)
    refused(folder, r"c_attn.lora_B has shape \(48, 5\) where the model has \(48, 4\)")
    save_file({k: v for k, v in good.items() if "c_attn" in k}, weights)  # PEFT's default for GPT-2
    refused(folder, r"attn.c_proj.lora_A has shape None where the model has \(4, 16\)")
    weights.write_bytes(weights.read_bytes()[:100])
    refused(folder, "cannot use the adapter")
    weights.unlink()
    refused(folder, "cannot use the adapter")
    for text in ("[]", "{", '"LORA"'):
        config.write_text(text)
        refused(folder, "cannot use the adapter")


def test_the_base_of_an_adapter_has_changed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    weights = tiny().state_dict()
    weights["transformer.ln_f.bias"][3] += 1
    save_adapter(tmp_path / "adapter", adapted(), base, fingerprint(weights))
    refused(tmp_path / "adapter", f"{base} has other weights now .* adapter_config.json")


def test_an_adapter_asks_for_more_than_it_has_or_for_itself(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, adapted(), write_base(tmp_path / "base"))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for r in (10**13, 10**30):
        path.write_text(json.dumps(config | dict(r=r)))
        refused(folder, f"has r={r}, which is not the size")
    path.write_text(json.dumps(config | dict(base_model_name_or_path=str(folder))))
    refused(folder, "is its own base")


def test_the_base_of_an_adapter_is_missing(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_adapter(tmp_path / "adapter", adapted(), str(tmp_path / "base"))
    with pytest.raises(SystemExit, match=f"{tmp_path / 'base'}.*config.json"):
        load_model(str(tmp_path / "adapter"), "", print)


# -----------------------------------------------------------------------------
# PEFT itself


def test_peft_computes_the_same_from_our_files(tmp_path: Path, idx: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft compares with PEFT")
    from transformers import GPT2LMHeadModel

    raw = adapted()
    to_hf(tiny(), tmp_path / "base")
    save_adapter(tmp_path / "adapter", raw, str(tmp_path / "base"))
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        torch.testing.assert_close(base(idx).logits, logits_of(tiny(), idx), rtol=0, atol=1e-4)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(model(idx).logits, logits_of(raw, idx), rtol=0, atol=1e-4)
        assert (model(idx).logits - logits_of(tiny(), idx)).abs().max() > 0.1
        one = model.merge_and_unload()
        torch.testing.assert_close(one(idx).logits, logits_of(merged(raw), idx), rtol=0, atol=1e-4)


def test_we_compute_the_same_from_files_of_peft(tmp_path: Path, idx: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft compares with PEFT")
    from transformers import GPT2LMHeadModel

    to_hf(tiny(), tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=list(("c_attn", "c_proj", "c_fc")),
        fan_in_fan_out=True,
    )
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / "adapter")
        raw = apply_adapter(from_hf(str(tmp_path / "base")), tmp_path / "adapter")
        torch.testing.assert_close(logits_of(raw, idx), model(idx).logits, rtol=0, atol=1e-4)
    loaded, _ = load_model(str(tmp_path / "adapter"), "", print)  # the base is found by its name
    assert torch.equal(logits_of(loaded, idx), logits_of(raw, idx))
