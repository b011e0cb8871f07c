"""hf.py with transformers as the reference: logits, gradients, and files in both directions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import edit_json
from safetensors.torch import load_file, save_file

from neogpt import hf, model

# layers, heads, width, context, vocabulary, batch, tokens
SHAPES = [(1, 1, 8, 8, 11, 1, 1), (2, 2, 16, 32, 61, 3, 32), (3, 4, 32, 20, 97, 2, 13)]


def reference(shape: tuple[int, ...]) -> Any:
    """Hugging Face's GPT2LMHeadModel with large random weights, biases and norms. Seeds PyTorch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    L, nh, C, T, V = shape[:5]
    ends = dict(bos_token_id=V - 1, eos_token_id=V - 1)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=L, n_head=nh, n_embd=C, n_positions=T, vocab_size=V, **ends))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(0.25 * torch.randn(p.shape) + (".ln_" in name and "weight" in name))
    return theirs.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder written by `save_pretrained`, of the second shape."""
    reference(SHAPES[1]).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape: tuple[int, ...], attention: str, tmp_path: Path) -> None:
    theirs = reference(shape)
    theirs.save_pretrained(tmp_path)
    raw = hf.load(str(tmp_path))
    raw = model.GPT.from_weights(replace(raw.config, attention=attention), raw.state_dict())
    assert raw.transformer.h[0].attn.attend.__name__ == f"{attention}_attention"
    V, B, T = shape[4:]
    idx, targets = torch.randint(V, (2, B, T))
    logits, expected = raw(idx), theirs(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # fp32; logits are between 1 and 10
    raw(idx, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for name, p in raw.named_parameters():
        grad = theirs.get_parameter(name).grad
        grad = grad if p.dim() < 2 or "wte" in name or "wpe" in name else grad.t()  # Conv1D is (in, out)
        torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("edition", ["several parts", "hub", "fp16", "head"])
def test_editions(edition: str, folder: Path, tmp_path: Path) -> None:
    """Several files; OpenAI's names without a prefix and with mask buffers; fp16; the tied head stored again."""
    theirs, idx, weights = reference(SHAPES[1]), torch.randint(61, (2, 9)), load_file(folder / "model.safetensors")
    if edition == "several parts":
        theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
        assert len(list(tmp_path.glob("parts/model-*.safetensors"))) > 2
    elif edition == "fp16":
        theirs = theirs.half().float()
        weights = {name: tensor.half() for name, tensor in weights.items()}
    elif edition == "head":
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    else:
        # the default in numbers, and a key that n_positions replaced
        edit_json(folder / "config.json", n_inner=4 * 16, n_ctx=64)
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors")
    raw = hf.load(str(tmp_path / "parts" if edition == "several parts" else folder))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in raw.parameters())
    assert raw.lm_head.weight is raw.transformer.wte.weight and raw.config.block_size == 32
    torch.testing.assert_close(raw(idx), theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows, n_tokens", [(257, 257), (259, 257), (300, 300), (50257, 50257), (50304, 50257)])
def test_added_rows_of_the_vocabulary_are_kept(rows: int, n_tokens: int, tmp_path: Path) -> None:
    raw = harness.tiny_model(n_layer=1, n_tokens=rows, vocab_size=rows)
    hf.save(raw, tmp_path)
    again = hf.load(str(tmp_path))
    assert (again.config.n_tokens, again.config.vocab_size) == (n_tokens, rows)
    assert torch.equal(again.lm_head.weight, raw.lm_head.weight)


def test_one_file_of_the_tied_matrices_and_pickled_weights(folder: Path) -> None:
    weights, idx = load_file(folder / "model.safetensors"), torch.randint(61, (2, 9))
    expected = hf.load(str(folder))(idx)
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(hf.load(str(folder))(idx), expected)
    torch.save(weights | {"transformer.wte.weight": weights["lm_head.weight"] + 1}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lm_head.*wte"):
        hf.load(str(folder))


FOREIGN = dict(model_type="gptj", activation_function="relu", layer_norm_epsilon=1e-6, n_inner=100)
FOREIGN |= dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)
FOREIGN |= dict(tie_word_embeddings=False)


@pytest.mark.parametrize("key", FOREIGN)
def test_models_that_are_not_gpt2_are_refused(key: str, folder: Path) -> None:
    edit_json(folder / "config.json", **{key: FOREIGN[key]})
    with pytest.raises(ValueError, match=f"{key}.*{FOREIGN[key]}"):
        hf.load(str(folder))


def test_models_that_do_not_fit_and_missing_files_are_named(folder: Path) -> None:
    edit_json(folder / "config.json", n_layer=3)
    with pytest.raises(ValueError, match=r"h\.2\."):
        hf.load(str(folder))
    edit_json(folder / "config.json", n_layer=2)
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.wte.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head|wte"):
        hf.load(str(folder))
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            hf.load(str(folder))
    with pytest.raises(ValueError, match="ndlinear"):
        hf.save(harness.tiny_model(mlp="ndlinear"), folder)


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    requests = []

    def download(name: str, file: str) -> str:
        requests.append((name, file))
        if name == "user/unreachable":
            raise errors.LocalEntryNotFoundError("no connection")
        if not (folder / file).exists():
            raise errors.EntryNotFoundError("404")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hf.load("user/model")
    assert requests == [("user/model", "config.json"), ("user/model", "model.safetensors")]
    with pytest.raises(FileNotFoundError, match="user/unreachable.*connection"):
        hf.load("user/unreachable")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors.*user/model"):
        hf.load("user/model")
