"""LoRA (arXiv:2106.09685): low-rank adapters on every weight matrix of the blocks, also in PEFT's file format."""

import hashlib
import json
import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import files, model

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) · B A x, with trainable A (rank, in) and B (out, rank)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        bound = 1 / math.sqrt(self.in_features)
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, self.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))  # so the output starts as W x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(raw: model.GPT, rank: int, alpha: float) -> None:
    """Add an adapter to every weight matrix of the blocks, and freeze all other parameters."""
    raw.requires_grad_(False)
    for name, linear in model.weight_matrices(raw).items():
        raw.set_submodule(name, LoRALinear(linear, rank, alpha))


def lora_weights(raw: model.GPT) -> dict[str, Tensor]:
    """The matrices A and B by parameter name; {} for a model without adapters."""
    return {name: p.detach() for name, p in raw.named_parameters() if "lora_" in name}


def load_lora(raw: model.GPT, weights: dict[str, Tensor]) -> None:
    """Copy these matrices into a model with adapters. Raises ValueError if a name or a shape does not match."""
    own = lora_weights(raw)
    for name in sorted(own.keys() | weights.keys()):
        found, needed = (tuple(side[name].shape) if name in side else None for side in (weights, own))
        if found != needed:
            raise ValueError(f"adapter {name}: shape {found}, the model needs {needed}")
    raw.load_state_dict(weights, strict=False)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and bits."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


@torch.no_grad()
def merged_weights(raw: model.GPT) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same as `raw`: W + (alpha / rank) · B A."""
    weights = {name: tensor for name, tensor in raw.state_dict().items() if "lora_" not in name}
    for name, linear in model.weight_matrices(raw).items():
        weights[f"{name}.weight"] = linear.weight + linear.scale * linear.lora_B @ linear.lora_A
    return weights


def save_adapter(folder: Path, raw: model.GPT, base: str, base_fingerprint: str) -> None:
    """Write adapters as PEFT does. base: the source of their model. base_fingerprint: `fingerprint` of its weights."""
    matrices = model.weight_matrices(raw.transformer.h[0])
    r, scale = len(matrices["attn.c_attn"].lora_A), matrices["attn.c_attn"].scale
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=r, lora_alpha=scale * r)
    config |= dict(target_modules=list(dict.fromkeys(name.split(".", 1)[1] for name in matrices)), lora_dropout=0.0)
    # fan_in_fan_out: Hugging Face's GPT-2 stores its matrices as (in, out)
    config |= dict(bias="none", inference_mode=True, fan_in_fan_out=True)
    weights = {f"{PEFT_PREFIX}{n}.weight": w.cpu().contiguous() for n, w in lora_weights(raw).items()}
    files.make_folder(folder)
    with files.atomic_write(folder / "adapter_model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt", "base": base_fingerprint})
    files.write_json(folder / "adapter_config.json", config)


def read_adapter_config(folder: Path) -> tuple[str, int, float]:
    """The base model, rank and alpha in adapter_config.json. Raises ValueError for adapters of other kinds."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    allowed = dict(peft_type=["LORA"], use_rslora=[False], use_dora=[False], bias=["none"], rank_pattern=[{}])
    allowed |= dict(alpha_pattern=[{}], init_lora_weights=[True, False, "gaussian", "eva", "orthogonal"])
    for key, values in allowed.items():  # the first value is the default; other initializations change the base
        if config.get(key, values[0]) not in values:
            raise ValueError(f"adapter_config.json has {key}={config[key]!r}: supported are {values}")
    r, alpha, base = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not isinstance(base, str):
        raise ValueError(f"adapter_config.json has r={r!r}, lora_alpha={alpha!r}, base_model_name_or_path={base!r}")
    return base, r, alpha


def apply_adapter(raw: model.GPT, folder: Path) -> model.GPT:
    """The model with an adapter in PEFT's format merged into its weights. Raises ValueError if it does not fit them."""
    base, r, alpha = read_adapter_config(folder)
    path, trained_on = folder / "adapter_model.safetensors", None  # None: unknown for an adapter of PEFT
    if not path.is_file() and path.with_suffix(".bin").is_file():  # PEFT prefers safetensors too
        weights = torch.load(path.with_suffix(".bin"), "cpu", weights_only=True)
    else:
        with safetensors.safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            trained_on = (file.metadata() or {}).get("base")
    if trained_on and trained_on != fingerprint(raw.state_dict()):
        raise ValueError(f"{base} has changed since training: correct base_model_name_or_path in adapter_config.json")
    if {len(w) for name, w in weights.items() if "lora_A" in name} != {r}:  # before anything of size r is allocated
        raise ValueError(f"adapter_config.json has r={r}, which is not the rank of the matrices")
    add_lora(raw, r, alpha)
    weights = {name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): w for name, w in weights.items()}
    adapted = {name.rpartition(".")[0] for name in weights}  # PEFT's default for GPT-2 is c_attn alone
    others = {name: w for name, w in lora_weights(raw).items() if name.rpartition(".")[0] not in adapted}  # B is 0
    load_lora(raw, weights | others)
    return model.GPT.from_weights(raw.config, merged_weights(raw))
