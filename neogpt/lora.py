"""LoRA (arXiv:2106.09685): low-rank adapters on every weight matrix of the blocks, also in PEFT's file format."""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import files, model

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) · B A x, with trainable A (rank, in) and B (out, rank)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))  # so the output starts as W x
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(raw: model.GPT, rank: int, alpha: float) -> None:
    """Add an adapter to every weight matrix of the blocks, and freeze all other parameters."""
    raw.requires_grad_(False)
    for name, linear in raw.weight_matrices().items():
        parent, _, last = name.rpartition(".")
        setattr(raw.get_submodule(parent), last, LoRALinear(linear, rank, alpha))
    assert lora_weights(raw), "no adapters were added"


def lora_weights(raw: model.GPT) -> dict[str, Tensor]:
    """The matrices A and B by parameter name; {} for a model without adapters."""
    return {name: p.detach() for name, p in raw.named_parameters() if "lora_" in name}


def load_lora(raw: model.GPT, weights: dict[str, Tensor]) -> None:
    """Copy these matrices into a model with adapters. Raises ValueError if a name or a shape does not match."""
    own = lora_weights(raw)
    shapes = [{name: tuple(w.shape) for name, w in side.items()} for side in (weights, own)]
    if wrong := dict(shapes[0].items() ^ shapes[1].items()):
        name = min(wrong)
        raise ValueError(f"adapter {name}: shape {shapes[0].get(name)}, the model needs {shapes[1].get(name)}")
    for name, p in own.items():
        p.copy_(weights[name])


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and bits."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


@torch.no_grad()
def merged_weights(raw: model.GPT) -> dict[str, Tensor]:
    """The state dict of the equivalent model without adapters: W + (alpha / rank) · B A."""
    weights = raw.state_dict()
    for name, module in raw.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.weight + module.scale * module.lora_B @ module.lora_A
    return {name: tensor for name, tensor in weights.items() if "lora_" not in name}


def save_adapter(folder: Path, raw: model.GPT, base: str, base_fingerprint: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does.

    base: the model that the adapters belong to: a hub name, a folder, or a checkpoint of ours. base_fingerprint: the
    `fingerprint` of its weights, because a folder may hold other weights later.
    """
    from safetensors.torch import save_file

    first = raw.transformer.h[0].attn.c_attn
    rank = first.lora_A.size(0)
    target_modules = list(dict.fromkeys(name.split(".", 1)[1] for name in raw.transformer.h[0].weight_matrices()))
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=rank)
    config |= dict(lora_alpha=first.scale * rank, lora_dropout=0.0, bias="none", inference_mode=True)
    # Hugging Face's GPT-2 stores its matrices as (in, out)
    config |= dict(target_modules=target_modules, fan_in_fan_out=True)
    weights = {f"{PEFT_PREFIX}{n}.weight": w.cpu().contiguous() for n, w in lora_weights(raw).items()}
    files.make_folder(folder)
    with files.atomic_write(folder / "adapter_model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt", "base": base_fingerprint})
    with files.atomic_write(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json with r, lora_alpha and base_model_name_or_path. Raises ValueError for other adapters."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds no LoRA adapter in PEFT's format")
    r, alpha, base = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not isinstance(base, str):
        raise ValueError(f"adapter_config.json has r={r!r}, lora_alpha={alpha!r}, base_model_name_or_path={base!r}")
    required = dict(use_rslora=False, use_dora=False, bias="none", rank_pattern={}, alpha_pattern={})
    for key, value in required.items():
        if config.get(key, value) != value:
            raise ValueError(f"the adapter in {folder} has {key}={config[key]!r}: only {value!r} is supported")
    return config


def apply_adapter(raw: model.GPT, folder: Path) -> model.GPT:
    """The model with the adapter of a folder in PEFT's format merged into its weights.

    Raises ValueError if the adapter does not fit, or was trained by us on other weights than these.
    """
    from safetensors import safe_open

    config = read_adapter_config(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        base = (file.metadata() or {}).get("base")
    if base and base != fingerprint(raw.state_dict()):
        raise ValueError(
            f"{config['base_model_name_or_path']} no longer holds the weights that the adapter was trained on: set "
            "base_model_name_or_path in adapter_config.json to the checkpoint file that holds them"
        )
    ranks = {len(w) for name, w in weights.items() if name.endswith("lora_A.weight")}
    if ranks != {config["r"]}:  # checked before anything of that size is allocated
        raise ValueError(f"adapter_config.json has r={config['r']}, but the matrices have ranks {sorted(ranks)}")
    add_lora(raw, config["r"], config["lora_alpha"])
    load_lora(raw, {name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): w for name, w in weights.items()})
    return model.GPT.from_weights(raw.config, merged_weights(raw))
