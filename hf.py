"""Weights of Hugging Face's GPT-2 in and out: OpenAI's from the hub, or folders in that format.

`to_hf(from_hf("gpt2"), "my-gpt2")` fetches OpenAI's and leaves a folder that transformers reads.
"""

import json
from pathlib import Path

from files import make_folder, written_whole
from model import GPT, GPTConfig

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


def read_config(name: str) -> GPTConfig:
    """The shape that config.json of a model names; ValueError if it is not a GPT-2 as we build it."""
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
    return GPTConfig(
        gelu=next(ours for ours, theirs in HF_GELU.items() if theirs == activation),
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
        block_size=hf["n_positions"],
        n_tokens=hf["vocab_size"],
        vocab_size=hf["vocab_size"],
    )


def from_hf(name: str) -> GPT:
    """GPT-2 from the Hugging Face hub ("gpt2", "gpt2-xl", "user/model") or a local folder in its format.

    Needs config.json and model.safetensors (or the parts named in model.safetensors.index.json). fp32, CPU.
    """
    from safetensors.torch import load_file

    config = read_config(name)
    try:
        files = [hf_file(name, "model.safetensors")]
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
    return GPT.from_weights(config, weights)


def to_hf(raw: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors for Hugging Face's GPT2LMHeadModel, without padded ids."""
    from safetensors.torch import save_file

    folder = Path(folder)
    config, weights = raw.config, {}
    if config.mlp != "dense":
        raise ValueError(f"a GPT-2 of Hugging Face has no mlp={config.mlp!r}")
    make_folder(folder)
    for name, tensor in raw.state_dict().items():
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
    with written_whole(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with written_whole(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(hf, indent=2) + "\n")
