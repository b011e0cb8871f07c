"""Hugging Face's GPT-2 as the reference: logits, gradients, greedy text, and weights in and out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_model import ATTENTIONS, random_ids, rough_model, shape  # noqa: F401

from data import get_tokenizer
from hf import from_hf, to_hf
from model import GPT
from sampling import generate

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


@pytest.mark.parametrize("edition", ["sharded", "hub", "half", "head"])
def test_from_hf_reads_every_edition(edition: str, exported: Path, tmp_path: Path) -> None:
    """In several parts; as OpenAI's on the hub, bare names and mask buffers; in fp16; with the tied head."""
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
        elif edition == "head":
            weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
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


def test_to_hf_names_the_end_of_text(tmp_path: Path) -> None:
    to_hf(rough_model(n_tokens=257, vocab_size=320), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == get_tokenizer("bytes").eot_token == 256


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


def test_from_hf_takes_the_context_from_n_positions(exported: Path) -> None:
    edit_config(exported, n_ctx=64)
    assert from_hf(str(exported)).config.block_size == 32


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
