"""lora.py: what adapters compute, which parameters they train, and files that PEFT reads and writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import edit_json, tiny_model, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from neogpt import checkpoint, hf, lora, model


def make_model(**shape: Any) -> model.GPT:
    """A small model whose parameters all affect the result."""
    return tiny_model(scale=0.1, **shape)


def adapted_model(rank: int = 4, alpha: float = 6.0, **shape: Any) -> model.GPT:
    """The same model with adapters that are not zero."""
    raw = make_model(**shape)
    lora.add_lora(raw, rank, alpha)
    for p in lora.lora_weights(raw).values():
        p.add_(0.1 * torch.randn_like(p))
    return raw


@pytest.fixture
def idx() -> Tensor:
    """Token ids, (3, 20)."""
    return torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))


def logits_of(raw: model.GPT, idx: Tensor) -> Tensor:
    """The logits of all ids of the tokenizer."""
    with torch.no_grad():
        return raw(idx)[..., :257]


@pytest.mark.parametrize("shape", [dict(), dict(mlp="ndlinear", mlp_width=24, mlp_modes=3)], ids=["dense", "ndlinear"])
def test_merged_model_equals_model_with_adapters(shape: dict, idx: Tensor, tmp_path: Path) -> None:
    raw = adapted_model(**shape)
    before = {name: p.clone() for name, p in raw.state_dict().items()}
    merged = model.GPT.from_weights(raw.config, lora.merged_weights(raw))
    torch.testing.assert_close(logits_of(merged, idx), logits_of(raw, idx), rtol=0, atol=1e-5)
    assert (logits_of(merged, idx) - logits_of(make_model(**shape), idx)).abs().max() > 0.1
    assert all(torch.equal(p, before[name]) for name, p in raw.state_dict().items())  # training can continue
    assert len(lora.lora_weights(raw)) == 2 * 4 * 2  # layers, matrices per block, A and B
    lora.save_adapter(tmp_path, raw, "base", "")
    mlp = ["c_fc.modes.0", "c_proj.modes.0"] if shape else ["c_fc"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_proj", *mlp]


def test_initial_adapters_are_those_of_peft() -> None:
    """A is uniform over ±1/√in."""
    A = lora.LoRALinear(torch.nn.Linear(64, 16), 4, 8.0).lora_A
    assert 0.9 / 8 < A.abs().max() <= 1 / 8


def test_fingerprint_depends_on_names_shapes_dtypes_and_bits() -> None:
    w = torch.arange(6.0)
    variants = [{"w": w}, {"v": w}, {"w": w.view(2, 3)}, {"w": w.view(torch.int32)}, {"w": w + 1e-7}]
    assert len({lora.fingerprint(weights) for weights in variants}) == len(variants)
    assert lora.fingerprint({"a": w, "b": w.view(2, 3).t()}) == lora.fingerprint({"b": w.view(2, 3).t(), "a": w + 0})


# -----------------------------------------------------------------------------
# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an adapter for the checkpoint in tmp_path / "base"."""
    base = write_model(tmp_path / "base", make_model())
    lora.save_adapter(tmp_path / "adapter", adapted_model(), str(base), lora.fingerprint(make_model().state_dict()))
    return tmp_path / "adapter"


def refused(folder: Path, message: str) -> None:
    """Check that loading the folder raises one line that names the folder."""
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_model(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_files_equal_those_of_peft(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    known = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=6, fan_in_fan_out=True, bias="none")
    known |= dict(target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0, inference_mode=True)
    known |= dict(base_model_name_or_path=str(folder.parent / "base"))
    assert json.loads((folder / "adapter_config.json").read_text()) == known
    shapes = {name: tuple(w.shape) for name, w in load_file(folder / "adapter_model.safetensors").items()}
    sizes = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
    names = {f"base_model.model.transformer.h.{layer}.{name}.lora_": sizes[name] for layer in (0, 1) for name in sizes}
    expected = {f"{name}A.weight": (4, n_in) for name, (n_in, _) in names.items()}
    assert shapes == expected | {f"{name}B.weight": (n_out, 4) for name, (_, n_out) in names.items()}


BAD = [dict(peft_type="IA3"), dict(r=0), dict(r="four"), dict(r=None), dict(lora_alpha="x"), dict(r=2), dict(r=10**13)]
BAD += [dict(use_dora=True), dict(use_rslora=True), dict(rank_pattern={"c_fc": 2}), dict(bias="all")]
BAD += [dict(base_model_name_or_path=None), dict(init_lora_weights="pissa_niter_16")]


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_adapters_of_other_kinds_are_refused(changes: dict, folder: Path) -> None:
    edit_json(folder / "adapter_config.json", **changes)
    ((name, value),) = changes.items()
    refused(folder, f"{name}={value!r}")


def test_damaged_adapters_are_refused(folder: Path) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    saved, name = load_file(weights), "transformer.h.0.mlp.c_fc.lora_"
    for kept, added, message in (
        ("lora_B", {}, "r=4"),
        ("lora_A", {}, r"lora_B.*None.*\(48, 4\)"),
        ("", {f"base_model.model.{name}B.weight": torch.zeros(65, 4)}, rf"{name}B.*\(65, 4\).*\(64, 4\)"),
        ("", {"other": torch.zeros(1)}, r"other.*\(1,\).*None"),
    ):
        save_file({key: w for key, w in saved.items() if kept in key} | added, weights)
        refused(folder, message)
    weights.write_bytes(weights.read_bytes()[:100])
    refused(folder, "adapter")
    weights.unlink()
    refused(folder, "adapter_model.safetensors")
    for text in ("[]", "{", '"LORA"'):
        config.write_text(text)
        refused(folder, "adapter")


@pytest.mark.parametrize("matrices", ["c_attn", "mlp"])
def test_adapters_of_some_matrices(matrices: str, folder: Path, idx: Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if matrices in name}
    torch.save(weights, folder / "adapter_model.bin")
    reference = adapted_model()
    both = checkpoint.load_model(str(folder)).raw  # safetensors come first, as in PEFT
    torch.testing.assert_close(logits_of(both, idx), logits_of(reference, idx))
    path.unlink()
    with torch.no_grad():
        for name, p in lora.lora_weights(reference).items():
            p.mul_(matrices in name)
    found = logits_of(checkpoint.load_model(str(folder)).raw, idx)
    torch.testing.assert_close(found, logits_of(reference, idx), rtol=0, atol=1e-5)
    assert (found - logits_of(make_model(), idx)).abs().max() > 1e-3


def test_other_base_models_are_refused(folder: Path) -> None:
    base, changed = folder.parent / "base", make_model()
    changed.transformer.ln_f.bias.data[3] += 1
    write_model(base, changed)
    refused(folder, str(base))
    (base / "ckpt_000007.pt").unlink()
    refused(folder, str(base))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    refused(folder, "own base")


@pytest.mark.parametrize("writer", ["we", "PEFT"])
def test_peft_computes_the_same(writer: str, tmp_path: Path, idx: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft compares with PEFT")
    from transformers import GPT2LMHeadModel

    hf.save(make_model(), tmp_path / "base")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    if writer == "we":
        lora.save_adapter(tmp_path / "adapter", adapted_model(), str(tmp_path / "base"), "")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    else:
        settings = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, r=4, lora_alpha=6)
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.data.copy_(0.1 * torch.randn_like(p))
        theirs.save_pretrained(tmp_path / "adapter")
    raw = checkpoint.load_model(str(tmp_path / "adapter")).raw
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, logits_of(raw, idx), rtol=0, atol=1e-4)
        assert (theirs(idx).logits - logits_of(make_model(), idx)).abs().max() > 0.1
        torch.testing.assert_close(theirs.merge_and_unload()(idx).logits, logits_of(raw, idx), rtol=0, atol=1e-4)
