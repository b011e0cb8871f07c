"""GPT-2 in Hugging Face's format, as transformers reads and writes it: `save(load("gpt2"), "my-gpt2")`."""

import json
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import tiktoken
import torch

from neogpt import files, model

HF_GELU = {"tanh": "gelu_new", "erf": "gelu"}  # config.gelu -> activation_function in config.json

# Hugging Face stores GPT-2's matrices as (in, out), the transpose of nn.Linear's (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def find_file(name: str, file: str) -> Path:
    """The local path of `file` in a model folder, or in a model on the hub (downloaded once, then cached)."""
    if Path(name).is_dir():
        return Path(name) / file
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"no {file} in {name} on the Hugging Face hub, or no connection to it") from error


def read_config(name: str) -> model.GPTConfig:
    """The configuration in config.json. Raises ValueError if the model is not a GPT-2 that `model.GPT` computes."""
    hf = json.loads(find_file(name, "config.json").read_bytes())
    gelu = next((ours for ours, theirs in HF_GELU.items() if theirs == hf.get("activation_function", "gelu_new")), None)
    allowed = dict(model_type=["gpt2"], layer_norm_epsilon=[1e-5], n_inner=[None, 4 * hf.get("n_embd", 0)])
    allowed |= dict(scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False], tie_word_embeddings=[True])
    allowed |= dict(reorder_and_upcast_attn=[False], activation_function=[*HF_GELU.values()])
    for key, values in allowed.items():  # the first value is the default
        if hf.get(key, values[0]) not in values:
            raise ValueError(f"{name} has {key}={hf[key]!r} in config.json: supported are {values}")
    shape = dict(n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"], block_size=hf["n_positions"])
    rows = hf["vocab_size"]  # some models extend GPT-2's 50,257: the added rows are kept, and never sampled
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
    for key, tied in (("lm_head.weight", "transformer.wte.weight"), ("transformer.wte.weight", "lm_head.weight")):
        if tied in weights:  # some files hold only one of them
            weights.setdefault(key, weights[tied])
    if "lm_head.weight" in weights and not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ValueError(f"{name} has a head (lm_head) that differs from its embedding (wte): they must be tied")
    return model.GPT.from_weights(config, weights)


def read_weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, of its parts, or of pytorch_model.bin."""
    with suppress(FileNotFoundError):
        return safetensors.torch.load_file(find_file(name, "model.safetensors"))
    with suppress(FileNotFoundError):
        return torch.load(find_file(name, "pytorch_model.bin"), "cpu", weights_only=True)
    index = json.loads(find_file(name, "model.safetensors.index.json").read_bytes())  # of a large model
    weights = {}
    for part in sorted(set(index["weight_map"].values())):
        weights |= safetensors.torch.load_file(find_file(name, part))
    return weights


def read_origin(name: str) -> tuple[str, int]:
    """The stage and the step of a model that export.py wrote; ("", 0) for other models."""
    origin = json.loads(find_file(name, "config.json").read_bytes()).get("neogpt", {})
    return str(origin.get("stage", "")), int(origin.get("step", 0))


def gpt2_weights(raw: model.GPT) -> dict[str, torch.Tensor]:
    """The weights without the tied head and padded rows, so that every id has a token. Raises ValueError."""
    if raw.config.mlp != "dense":
        raise ValueError(f"mlp={raw.config.mlp!r} cannot be exported: GPT-2 elsewhere has only dense MLPs")
    weights = {name: tensor for name, tensor in raw.state_dict().items() if name != "lm_head.weight"}
    return weights | {"transformer.wte.weight": weights["transformer.wte.weight"][: raw.config.n_tokens]}


def save(raw: model.GPT, folder: str | Path, dtype: torch.dtype = torch.float32, **origin: str | int) -> None:
    """Write config.json, generation_config.json and model.safetensors for transformers. origin: for `read_origin`."""
    config, weights = raw.config, gpt2_weights(raw)
    for name, tensor in weights.items():
        weights[name] = (tensor.t() if name.endswith(CONV1D) else tensor).to("cpu", dtype).contiguous()
    eot = config.n_tokens - 1  # end-of-text is the last id of both tokenizers
    ends = dict(bos_token_id=eot, eos_token_id=eot)
    hf = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function=HF_GELU[config.gelu])
    hf |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size)
    hf |= dict(vocab_size=config.n_tokens, n_ctx=config.block_size, torch_dtype=str(dtype).removeprefix("torch."))
    hf |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # transformers' default for training is 0.1
    hf |= dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True, **ends, neogpt=origin)
    folder = files.make_folder(folder)
    (folder / "config.json").unlink(missing_ok=True)  # without it, loaders refuse a folder that is half replaced
    files.write_json(folder / "generation_config.json", ends | dict(pad_token_id=eot))
    with files.atomic_write(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
        temporary.chmod((folder / "generation_config.json").stat().st_mode)  # safetensors lets only the owner read
    files.write_json(folder / "config.json", hf)


def vocabulary(tokenizer: tiktoken.Encoding) -> tuple[list[str], list[str]]:
    """The tokens by id, and the merges in order, with GPT-2's printable character for each byte. tiktoken stores only
    ranks: a token is the merge of the two parts that remain when its bytes are merged into tokens of lower rank.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token)]
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(letters[byte] for byte in part) for part in parts))
    return ["".join(letters[byte] for byte in token) for token in tokens] + [tokenizer.decode([len(tokens)])], merges


def save_tokenizer(tokenizer: tiktoken.Encoding, folder: Path, block_size: int, template: str = "") -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt. template: for chats, in Jinja."""
    tokens, merges = vocabulary(tokenizer)
    vocab = {token: i for i, token in enumerate(tokens)}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=tokenizer.eot_token, content=tokens[-1], **special)]  # the chat template spells it out
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)  # GPT-2's pattern
    whole = dict(version="1.0", added_tokens=added, model=dict(type="BPE", vocab=vocab, merges=merges))
    settings = dict(tokenizer_class="GPT2Tokenizer", model_max_length=block_size, add_prefix_space=False)
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokens[-1])
    settings |= dict(clean_up_tokenization_spaces=False) | (dict(chat_template=template) if template else {})
    files.write_json(folder / "tokenizer.json", whole | dict(pre_tokenizer=level, post_processor=level, decoder=level))
    files.write_json(folder / "tokenizer_config.json", settings)
    files.write_json(folder / "vocab.json", vocab)
    with files.atomic_write(folder / "merges.txt") as temporary:
        temporary.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
