"""GPT-2 in Hugging Face's format, as transformers reads and writes it: `save(load("gpt2"), "my-gpt2")`."""

import json
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch

from neogpt import files, model

HF_GELU = {"tanh": "gelu_new", "erf": "gelu"}  # config.gelu -> activation_function in config.json

# Hugging Face stores GPT-2's matrices as (in, out), the transpose of nn.Linear's (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def find_file(name: str, file: str) -> Path:
    """The local path of `file` in a model folder, or in a model on the hub (downloaded once, then cached)."""
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise FileNotFoundError(f"no {file} in {name}")
        return Path(name) / file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"no file or folder {name}, and the Hugging Face hub is unreachable") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"no {file} in {name} on the Hugging Face hub") from error


def read_config(name: str) -> model.GPTConfig:
    """The configuration in config.json. Raises ValueError if the model is not a GPT-2 that `model.GPT` computes."""
    hf = json.loads(find_file(name, "config.json").read_text())
    gelu = next((ours for ours, theirs in HF_GELU.items() if theirs == hf.get("activation_function", "gelu_new")), None)
    allowed = dict(model_type=["gpt2"], layer_norm_epsilon=[1e-5], n_inner=[None, 4 * hf.get("n_embd", 0)])
    allowed |= dict(scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False], tie_word_embeddings=[True])
    allowed |= dict(reorder_and_upcast_attn=[False], activation_function=[*HF_GELU.values()])
    for key, values in allowed.items():  # the first value is the default
        if hf.get(key, values[0]) not in values:
            raise ValueError(f"{name} has {key}={hf[key]!r} in config.json: supported are {values}")
    shape = dict(n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"], block_size=hf["n_positions"])
    rows = hf["vocab_size"]  # people add rows to GPT-2's 50,257: they are kept, and never sampled
    n_tokens = next((n for n in (50257, 257) if n <= rows <= 1.01 * n), rows)
    return model.GPTConfig(**shape, n_tokens=n_tokens, vocab_size=rows, gelu=gelu)


def load(name: str) -> model.GPT:
    """GPT-2 from the hub ("gpt2", "user/model") or a folder, in fp32 on the CPU. Raises ValueError or OSError."""
    config = read_config(name)
    weights = {}
    for key, tensor in read_weights(name).items():
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            tensor = tensor.t().contiguous() if key.endswith(CONV1D) else tensor
            prefix = "" if key.startswith(("transformer.", "lm_head.")) else "transformer."
            weights[prefix + key] = tensor.float()
    for ours, other in (("lm_head.weight", "transformer.wte.weight"), ("transformer.wte.weight", "lm_head.weight")):
        if other in weights:  # tied: some files hold only one of them
            weights.setdefault(ours, weights[other])
    if "lm_head.weight" in weights and not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ValueError(f"{name} has a head (lm_head) that differs from its embedding (wte): they must be tied")
    return model.GPT.from_weights(config, weights)


def read_weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, of its parts, or of pytorch_model.bin."""
    with suppress(FileNotFoundError):
        return safetensors.torch.load_file(find_file(name, "model.safetensors"))
    with suppress(FileNotFoundError):
        return torch.load(find_file(name, "pytorch_model.bin"), "cpu", weights_only=True)
    index = json.loads(find_file(name, "model.safetensors.index.json").read_text())  # of a large model
    weights = {}
    for part in sorted(set(index["weight_map"].values())):
        weights |= safetensors.torch.load_file(find_file(name, part))
    return weights


def save(raw: model.GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors for transformers' GPT2LMHeadModel, without padded vocabulary rows."""
    config, weights = raw.config, raw.state_dict()
    if config.mlp != "dense":
        raise ValueError(f"Hugging Face's GPT-2 has no mlp={config.mlp!r}")
    del weights["lm_head.weight"]  # tied: stored once
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: config.n_tokens]
    for name, tensor in weights.items():
        weights[name] = (tensor.t() if name.endswith(CONV1D) else tensor).cpu().contiguous()
    eot = config.n_tokens - 1  # end-of-text is the last id of both tokenizers
    hf = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function=HF_GELU[config.gelu])
    hf |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size)
    hf |= dict(vocab_size=config.n_tokens, bos_token_id=eot, eos_token_id=eot)
    hf |= dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True)
    folder = files.make_folder(folder)
    with files.atomic_write(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
    files.write_json(folder / "config.json", hf)
