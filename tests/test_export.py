"""export.py with transformers and the gguf package as references: ids, logits, continuations, chat prompts, files."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import tiktoken
import torch

import export
from neogpt import chat, checkpoint, data, generate, hf

EOT = "<|endoftext|>"


def run_export(source: Path, out_dir: Path, **constants: Any) -> Path:
    """Export a model in this process; return the folder."""
    return harness.train(export.main, export.Config(str(source), str(out_dir)), **constants)


@pytest.fixture(params=["bytes", "gpt2"])
def tokenizers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[tiktoken.Encoding, Any]:
    """A tokenizer, and transformers' tokenizer that reads its files."""
    from transformers import AutoTokenizer

    tokenizer = harness.get_tokenizer(request.param)
    hf.save_tokenizer(tokenizer, tmp_path, 2**20, chat.TEMPLATE)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tokenizer, AutoTokenizer.from_pretrained(tmp_path)


def test_transformers_gives_the_ids_of_tiktoken(tokenizers: tuple[tiktoken.Encoding, Any]) -> None:
    pieces = ["Hello", " world", "'ll", " 1234", "  ", " " * 17, "\n", "\n\n", "\t\t", "\r\n", "é", "ß"]
    pieces += ["for i in range(10):\n    x[i] += 1", "\u2028", "\u00a0", "\u3000", "\x00", "\x7f", "\xad"]
    pieces += ["😀", "👩‍👩‍👧", "漢字", EOT, "<|endof", "text|>"]
    (tokenizer, theirs), text = tokenizers, "".join(random.Random(0).choices(pieces, k=20_000))
    assert theirs(text).input_ids == tokenizer.encode(text, allowed_special="all")
    assert theirs(text, split_special_tokens=True).input_ids == tokenizer.encode_ordinary(text)
    assert theirs.decode(theirs(text).input_ids) == text
    assert len(theirs) == tokenizer.n_vocab and theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_token


def test_merges_are_recovered_from_ranks() -> None:
    """A byte pair encoding trained by another package, with tokens of up to 16 bytes."""
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([(harness.ROOT / "input.txt").read_text()[:100_000]], 900, show_progress=False)
    vocab, merges = (json.loads(theirs.to_str())["model"][key] for key in ("vocab", "merges"))
    letters = hf.vocabulary(data.get_tokenizer("bytes"))[0]
    # tiktoken's ranks: the 256 bytes first, in any order, then the merges
    ranks = {bytes(letters.index(letter) for letter in token): i for token, i in vocab.items()}
    ours = tiktoken.Encoding("t", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={EOT: 900})
    tokens, found = hf.vocabulary(ours)
    assert tokens == [*sorted(vocab, key=vocab.get), EOT]
    assert found == [" ".join(pair) for pair in merges]


def test_chat_template_gives_the_ids_of_the_prompt_template(tokenizers: tuple[tiktoken.Encoding, Any]) -> None:
    tokenizer, theirs = tokenizers

    def ids(turns: list[dict], **options: bool) -> list[int]:
        return theirs.apply_chat_template(turns, return_dict=False, **options)

    row = chat.Row("Who lives here?", "Ada lives\n\nhere.", "")
    expected = chat.encode_prompt(row, 999, tokenizer)
    message = dict(role="user", content=f" {row.instruction}\n")
    assert ids([message | dict(context=row.context)], add_generation_prompt=True) == expected
    message["content"] = f"{row.instruction}\nContext:\n{row.context}"
    assert ids([message], add_generation_prompt=True) == expected

    said = [("system", " Be kind. "), ("user", "Where is the lamp?\nAnd the spoon?"), ("assistant", "In the garden. ")]
    said += [("user", "  Why?  "), ("assistant", "I put it there.\n\nYes."), ("user", "When?")]
    turns = [dict(role=role, content=text) for role, text in said]
    answer = dict(role="assistant", content="Now.")
    row = chat.parse_turns([*turns, answer])
    prompt = chat.encode_prompt(row, 999, tokenizer)
    assert ids(turns, add_generation_prompt=True) == prompt
    example = chat.make_example(prompt, row.response, 999, tokenizer)
    assert ids([*turns, answer]) == example.ids.tolist()  # as in training


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_folder_in_transformers_and_here(gelu: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    raw = harness.tiny_model(scale=0.3, gelu=gelu)
    with torch.no_grad():  # pruned
        raw.transformer.h[0].mlp.c_fc.weight[:, ::2] = 0
    scores, constants = dict(val=1.25), dict(data="/home/me/book.txt", checkpoint="gpt2")
    source = harness.write_model(tmp_path / "run", raw, "sft", scores=scores, config=constants)
    folder = run_export(source, tmp_path / "my")
    again, theirs = checkpoint.load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert again[2:] == ("sft", 7) and again.raw.config == replace(raw.config, vocab_size=257)
    idx = torch.randint(257, (3, 64))
    assert torch.equal(again.raw(idx), raw(idx)[..., :257])
    torch.testing.assert_close(theirs(idx).logits, raw(idx)[..., :257], atol=1e-4, rtol=0)  # fp32, logits up to 10
    assert not again.raw.transformer.h[0].mlp.c_fc.weight[:, ::2].any()
    config = theirs.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)  # their default is 0.1
    assert (config.n_ctx, config.n_positions, config.vocab_size) == (64, 64, 257) and theirs.dtype == torch.float32
    assert config.bos_token_id == config.eos_token_id == 256  # end-of-text of the tokenizer "bytes"

    ids = AutoTokenizer.from_pretrained(folder)("A cat").input_ids
    ours = [step[0] for step in generate.generate(raw, [ids], 20, temperature=0, stop=256)]
    settings = dict(max_new_tokens=20, do_sample=False, return_tensors=True)
    [found] = pipeline("text-generation", str(folder))("A cat", **settings)
    assert found["generated_token_ids"] == ids + ours
    card = (folder / "README.md").read_text()
    assert "1.25" in card and "book.txt" in card and "/home" not in card and ("llama.cpp" in card) == (gelu == "erf")
    assert "| steps | 7 |" in card and "| tokens |" not in card  # the checkpoint does not know the tokens


def test_bf16_is_rounded_and_exported_again(tmp_path: Path) -> None:
    raw = harness.tiny_model(scale=0.3)
    folder = run_export(harness.write_model(tmp_path / "run", raw), tmp_path / "my", dtype="bf16")
    for _ in range(2):
        weights, config = hf.load(str(folder)).state_dict(), json.loads((folder / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16"
        for name, p in raw.state_dict().items():
            assert torch.equal(weights[name], p[: len(weights[name])].bfloat16().float()), name
        run_export(folder, tmp_path / "again", dtype="bf16")
        folder = run_export(tmp_path / "again", tmp_path / "my", dtype="bf16")  # replaces the files
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match="pretraining.*sft.py"):  # as its checkpoint
        checkpoint.load_model(str(folder), ("sft",))


@pytest.mark.parametrize("dtype, bound", [("fp32", 0), ("fp16", 1e-3), ("q8_0", 1e-2)])
def test_gguf(dtype: str, bound: float, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    raw = harness.tiny_model(scale=0.3, n_embd=32)
    source = harness.write_model(tmp_path / "run", raw, "dpo")
    folder = run_export(source, tmp_path / "my", format="gguf", dtype=dtype)
    kind = {"fp32": "F32", "fp16": "F16", "q8_0": "Q8_0"}[dtype]
    reader = gguf.GGUFReader(folder / f"model-{dtype}.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    sizes = ("block_count", 2), ("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 128)
    assert all(fields[f"gpt2.{key}"] == value for key, value in sizes)
    assert fields["gpt2.attention.head_count"] == 2 and fields["tokenizer.chat_template"] == chat.TEMPLATE
    assert len(fields["tokenizer.ggml.tokens"]) == 257 and fields["tokenizer.ggml.eos_token_id"] == 256
    assert fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.CONTROL
    found = {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    for ours, name in (("wte", "token_embd"), ("wpe", "position_embd"), ("ln_f", "output_norm")):
        expected = raw.transformer.get_parameter(f"{ours}.weight").detach().numpy()[:257]
        np.testing.assert_allclose(found[f"{name}.weight"][1], expected, atol=bound * abs(expected).max())
    assert found["position_embd.weight"][0] == "F32" and found["token_embd.weight"][0] == kind
    names = dict(ln_1="attn_norm", ln_2="ffn_norm") | {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    for ours, name in (names | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}).items():
        for part in ("weight", "bias"):
            expected = raw.transformer.h[1].get_parameter(f"{ours}.{part}").detach().numpy()
            stored, values = found[f"blk.1.{name}.{part}"]
            np.testing.assert_allclose(values, expected, atol=bound * abs(expected).max(), err_msg=name)
            assert stored == (kind if expected.ndim == 2 else "F32")
    assert len(found) == 4 + 2 * 12


def test_refusals_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, new = harness.write_model(tmp_path / "run", harness.tiny_model()), tmp_path / "new"
    cfg = export.Config(str(source), str(new))
    harness.refused(export.main, cfg, "fp16", "hf", "bf16", dtype="fp16")
    harness.refused(export.main, cfg, "bf16", "gguf", dtype="bf16", format="gguf")
    harness.refused(export.main, cfg, str(source), out_dir=str(source))
    nd = harness.write_model(tmp_path / "nd", harness.tiny_model(mlp="ndlinear"))
    harness.refused(export.main, cfg, "ndlinear", checkpoint=str(nd))
    assert not new.exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    harness.refused(export.main, cfg, "pip install gguf", format="gguf")
    assert not list(new.iterdir())
    other = harness.write_model(tmp_path / "other", harness.tiny_model())
    before = sorted(other.iterdir())
    harness.refused(export.main, cfg, str(other), before[0].name, out_dir=str(other))
    assert sorted(other.iterdir()) == before
