"""Low-rank adapters (LoRA, arXiv:2106.09685): two thin matrices beside every matrix of the blocks."""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files import make_folder, written_whole
from model import GPT, Linear, matrices

PEFT_PREFIX = "base_model.model."


class LoRALinear(Linear):
    """y = W x + b + (alpha / rank) · B A x, of which only A (rank, in) and B (out, rank) are trained."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))  # so it starts as W
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(raw: GPT, rank: int, alpha: float) -> None:
    """Give every matrix of the blocks an adapter, and freeze everything else."""
    raw.requires_grad_(False)
    for block in raw.transformer.h:
        for name, linear in matrices(block).items():
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, LoRALinear(linear, rank, alpha))
        n_adapters = sum(isinstance(module, LoRALinear) for module in block.modules())
        assert n_adapters == 4, f"{n_adapters} adapters in a block"


def lora_weights(raw: GPT) -> dict[str, Tensor]:
    """The adapters' matrices by name."""
    return {name: p.detach() for name, p in raw.named_parameters() if "lora_" in name}


def load_lora(raw: GPT, weights: dict[str, Tensor]) -> None:
    """Give a model with adapters these matrices; ValueError if a name or shape is not the model's."""
    own = lora_weights(raw)
    for name in sorted(own.keys() | weights.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (weights, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the adapter's {name} has shape {shapes[0]} where the model has {shapes[1]}")
    for name, p in own.items():
        p.copy_(weights[name])


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A hash of names, shapes and bits."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


@torch.no_grad()
def merged_weights(raw: GPT) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same: W + (alpha / rank) · B A."""
    weights = raw.state_dict()
    for name, module in raw.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.weight + module.scale * module.lora_B @ module.lora_A
    return {name: tensor for name, tensor in weights.items() if "lora_" not in name}


def merged(raw: GPT) -> GPT:
    """The model without adapters that computes the same."""
    return GPT.from_weights(raw.config, merged_weights(raw))


def save_adapter(folder: Path, raw: GPT, base: str, weights_of_base: str = "") -> None:
    """Write the adapters as PEFT does: adapter_config.json and adapter_model.safetensors. Needs safetensors.

    base: the model they belong to, a name on the Hugging Face hub, a folder, or a checkpoint of ours.
    weights_of_base: its `fingerprint`, for a folder may hold other weights later; "" is not checked.
    """
    from safetensors.torch import save_file

    first = raw.transformer.h[0].attn.c_attn
    rank = first.lora_A.size(0)
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=first.scale * rank,
        lora_dropout=0.0,
        target_modules=list(dict.fromkeys(name.split(".", 1)[1] for name in matrices(raw.transformer.h[0]))),
        fan_in_fan_out=True,  # Hugging Face's GPT-2 keeps its matrices as (in, out)
        bias="none",
        inference_mode=True,
    )
    weights = {}
    for name, tensor in lora_weights(raw).items():
        weights[f"{PEFT_PREFIX}{name}.weight"] = tensor.cpu().contiguous()
    make_folder(folder)
    with written_whole(folder / "adapter_model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt", "base": weights_of_base})
    with written_whole(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json, with at least r, lora_alpha and base_model_name_or_path; else a ValueError."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds no LoRA adapter as PEFT writes it")
    kinds = dict(r=int, lora_alpha=(int, float), base_model_name_or_path=str)
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind) or key == "r" and config[key] < 1:
            raise ValueError(f"adapter_config.json has {key}={config.get(key)!r}")
    unlike = dict(use_rslora=False, use_dora=False, bias="none", rank_pattern={}, alpha_pattern={})
    for key, value in unlike.items():
        if config.get(key, value) != value:
            raise ValueError(f"the adapter in {folder} has {key}={config[key]!r}, which we do not have")
    return config


def apply_adapter(raw: GPT, folder: Path) -> GPT:
    """The model with the adapter of a folder in PEFT's format merged into its weights; ValueError if they are
    not the weights that an adapter of ours was trained on.
    """
    from safetensors import safe_open

    config = read_adapter_config(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        base = (file.metadata() or {}).get("base")
    if base and base != fingerprint(raw.state_dict()):
        raise ValueError(
            f"{config['base_model_name_or_path']} has other weights now than those it was trained on; give "
            "the checkpoint file that has them as base_model_name_or_path in adapter_config.json"
        )
    found = {tuple(w.shape[:1]) for name, w in weights.items() if name.endswith("lora_A.weight")}
    if found != {(config["r"],)}:  # before anything of that size is allocated
        raise ValueError(f"adapter_config.json has r={config['r']}, which is not the size of its matrices")
    add_lora(raw, config["r"], config["lora_alpha"])
    load_lora(raw, {name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): w for name, w in weights.items()})
    return merged(raw)
