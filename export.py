"""Export a model: a folder for transformers, vLLM, lm-evaluation-harness and others, or a GGUF file for llama.cpp.

    python export.py demo                                        # after the demos of sft.py and dpo.py
    python export.py --checkpoint=out/sft --out_dir=my-gpt2      # transformers: from_pretrained("my-gpt2")
    python export.py --checkpoint=out/sft --out_dir=my-gpt2 --format=gguf --dtype=q8_0    # needs `pip install gguf`
    python sample.py --checkpoint=my-gpt2 --chat                 # every script reads the folder

Models of sft.py, dpo.py and grpo.py get a chat template that gives the ids of sample.py --chat. Pruned weights stay 0.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch

from neogpt import chat, checkpoint, config, files, hf, model, runtime

HF = {"fp32": torch.float32, "bf16": torch.bfloat16}  # dtype of the command line -> of the weights
GGUF = {"fp32": "F32", "fp16": "F16", "q8_0": "Q8_0"}
FILES = ("README.md", "merges.txt", "model.safetensors")  # of an export, besides .json and .gguf
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT-2 with {n_params:,} parameters: {n_layer} layers of width {n_embd}, {n_head} heads, {n_tokens:,} token ids, and a
context of {block_size:,} tokens. {gelu}

| training | (losses in nats) |
|---|---|
{facts}

    from transformers import pipeline
    print(pipeline("text-generation", "{name}")({prompt}, max_new_tokens=50))

The text `<|endoftext|>` becomes the end-of-text token; with `split_special_tokens=True` it stays ordinary text.
"""
CHAT = "\nThe chat template is plain text. A user message can have a `context` beside its `content`.\n"
GELU = {"tanh": "Its GELU is the tanh form.", "erf": "Its GELU is exact; llama.cpp computes the tanh form instead."}


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # out_dir, checkpoint file, adapter folder, Hugging Face folder or hub name
    out_dir: str = "my-gpt2"  # folder to write; with format=hf every script reads it as --checkpoint
    format: Literal["hf", "gguf"] = "hf"  # hf: Hugging Face's folder; gguf: the file model-<dtype>.gguf
    dtype: Literal["fp32", "bf16", "fp16", "q8_0"] = "fp32"  # of the weights. hf: fp32, bf16; gguf: fp32, fp16, q8_0


CONFIGS = {"gpt2": Config(), "demo": Config(checkpoint="out/demo-dpo", out_dir="out/demo-export")}


def write_card(path: Path, loaded: checkpoint.Loaded, source: Path, dtype: str) -> None:
    """Write the model card: sizes, data, losses, how to load. source: a checkpoint has the data and the losses."""
    facts = dict(stage=loaded.stage, steps=f"{loaded.step:,}", dtype=dtype)
    if source.is_file() or checkpoint.list_checkpoints(source):
        ckpt = checkpoint.read_newest(source)
        origin = {name: str(ckpt.config.get(name, "")) for name in ("checkpoint", "data")}
        facts |= {name: Path(value).name if Path(value).is_absolute() else value for name, value in origin.items()}
        facts |= dict(tokens=f"{ckpt.n_tokens:,}", pruned=ckpt.pruned.get("pattern") or ckpt.pruned.get("ratio", ""))
        facts |= {name: f"{value:.4f}" for name, value in ckpt.scores.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in ("", "0"))  # 0: unknown
    is_chat, shape = loaded.stage != "pretraining", loaded.raw.config
    prompt = '[{"role": "user", "content": "Hello"}]' if is_chat else '"Hello"'
    n_params = sum(tensor.numel() for tensor in hf.gpt2_weights(loaded.raw).values())
    words = vars(shape) | dict(name=path.parent.name, facts=rows, prompt=prompt, gelu=GELU[shape.gelu])
    with files.atomic_write(path) as temporary:
        temporary.write_text(CARD.format(n_params=n_params, **words) + CHAT * is_chat, encoding="utf-8")


def write_gguf(path: Path, raw: model.GPT, tokenizer: tiktoken.Encoding, dtype: str, template: str) -> None:
    """Write a GGUF file. Raises ValueError if the package gguf is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("--format=gguf needs the package gguf: pip install gguf") from error
    shape, weights, (tokens, merges) = raw.config, hf.gpt2_weights(raw), hf.vocabulary(tokenizer)
    kinds, names = gguf.GGMLQuantizationType, gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, shape.n_layer)
    with files.atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        writer.add_block_count(shape.n_layer)
        writer.add_context_length(shape.block_size)
        writer.add_embedding_length(shape.n_embd)
        writer.add_feed_forward_length(4 * shape.n_embd)
        writer.add_head_count(shape.n_head)
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * tokenizer.eot_token + [gguf.TokenType.CONTROL])
        writer.add_token_merges(merges or ["ÿ ÿ"])  # llama.cpp needs a merge; no UTF-8 text has the byte 255
        writer.add_bos_token_id(tokenizer.eot_token)
        writer.add_eos_token_id(tokenizer.eot_token)
        writer.add_add_bos_token(False)
        if template:
            writer.add_chat_template(template)
        for name, tensor in weights.items():
            kind = kinds[GGUF[dtype]] if tensor.dim() > 1 and "wpe" not in name else kinds.F32  # vectors, positions
            kind = kinds.F16 if kind == kinds.Q8_0 and tensor.size(-1) % 32 else kind  # Q8_0 has blocks of 32
            array = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main(cfg: Config) -> None:
    """Load the model and write the folder or the file."""
    runtime.setup("cpu")
    dtypes = HF if cfg.format == "hf" else GGUF
    if cfg.dtype not in dtypes:
        raise ValueError(f"--dtype={cfg.dtype} with --format={cfg.format}: expected {' or '.join(dtypes)}")
    checkpoint.refuse_own_folder(cfg.out_dir, cfg.checkpoint)
    loaded = raw, tokenizer, stage, step = checkpoint.load_model(cfg.checkpoint)
    hf.gpt2_weights(raw)  # refuses other models before anything is written
    out_dir = files.make_folder(cfg.out_dir)
    for path in sorted(out_dir.iterdir()):
        if path.name not in FILES and path.suffix not in (".json", ".gguf", ".tmp") and path.name[0] != ".":
            raise ValueError(f"--out_dir={out_dir} holds {path.name}, which no export writes: use another folder")
    files.require_space(out_dir, 4 * raw.n_params(), f"a model of {raw.n_params():,} parameters")
    template = "" if stage == "pretraining" else chat.TEMPLATE
    if cfg.format == "gguf":
        path = out_dir / f"model-{cfg.dtype}.gguf"
        write_gguf(path, raw, tokenizer, cfg.dtype, template)
        return runtime.print0(f"wrote {path}. {GELU[raw.config.gelu]} Try: llama-cli -m {path}")
    hf.save_tokenizer(tokenizer, out_dir, raw.config.block_size, template)
    hf.save(raw, out_dir, HF[cfg.dtype], stage=stage, step=step)
    write_card(out_dir / "README.md", loaded, Path(cfg.checkpoint), cfg.dtype)
    runtime.print0(f"wrote {out_dir}. Try: python sample.py --checkpoint={out_dir}{' --chat' * bool(template)}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
