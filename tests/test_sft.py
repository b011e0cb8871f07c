"""sft.py: whole runs, parity with transformers, adapters, and rows that do not fit. See test_finetune.py too."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import harness
import pytest
import torch
from harness import BYTES, losses, notes, tiny_model, write_rows
from test_finetune import LORA, configure, make_rows
from torch import Tensor, nn

import sft
from neogpt import chat, checkpoint, hf, lora, runtime, training
from sft import Config

NAMES = ["Ada", "Leo", "Rosa", "Mona", "Jasper", "Cora"]
tune = partial(harness.train, sft.main)


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A configuration that trains in a second: 32 rows to train on, 8 held out."""
    return replace(configure("sft", tmp_path), B=3, n_eval_prompts=0)


# -----------------------------------------------------------------------------
# A run


def test_rows_are_memorized_and_files_written(cfg: Config, tmp_path: Path) -> None:
    things = ["hat", "nut", "jug", "pen", "soup", "coat"]
    rows = [dict(prompt=f"{name}?", response=f"A {thing}.") for name, thing in zip(NAMES, things)]
    path = write_rows(tmp_path / "few.jsonl", rows)
    unusual = "", "日本\n<|endoftext|>", "longer than the 96 tokens of the model " * 5
    few = dict(data=path, val_data=path, rows_per_step=6, n_eval_prompts=99, prompts=("Leo?", *unusual))
    folder = tune(cfg, **few, answer_tokens=12, max_steps=120, eval_every=60, save_every=50, max_lr=2e-2)
    scores = {name: losses(folder, name) for name in ("val", "exact", "ended", "accuracy")}
    assert all(values.keys() == {0, 60, 120} for values in scores.values()) and losses(folder).keys() == set(range(120))
    assert scores["val"][0] > 5 and scores["exact"][0] == 0
    assert scores["val"][120] < 0.05 and scores["exact"][120] == scores["ended"][120] == scores["accuracy"][120] == 1
    assert "6 rows to train on, 6 held out" in notes(folder)
    assert len(re.findall("^#   > ", notes(folder), re.M)) == 3 * 4
    assert notes(folder).rpartition("> Leo? -> ")[2].startswith("A nut.\n")
    assert {p.name for p in folder.iterdir()} == {"best.pt", "ckpt_000100.pt", "ckpt_000120.pt", "log.txt"}
    ckpt = checkpoint.read(folder / "ckpt_000120.pt")
    assert (ckpt.stage, ckpt.step, ckpt.n_sequences, ckpt.tokenizer) == ("sft", 120, 720, "bytes")
    assert ckpt.scores["val"] == pytest.approx(scores["val"][120])


@pytest.mark.parametrize("B, packing", [(1, False), (5, False), (12, False), (2, True)])
def test_run_equals_plain_loop_with_transformers(cfg: Config, tmp_path: Path, B: int, packing: bool) -> None:
    """From the same Hugging Face folder. Every step reads all rows, so their order does not matter."""
    transformers = pytest.importorskip("transformers")
    hf.save(tiny_model(n_layer=1, block_size=128, scale=0.05), tmp_path / "hf")
    rows, val_rows = make_rows(17)[:12], make_rows(17)[12:]
    paths = dict(data=write_rows(tmp_path / "a.jsonl", rows), val_data=write_rows(tmp_path / "b.jsonl", val_rows))
    steps = dict(rows_per_step=12, max_steps=6, warmup_frac=1 / 3, eval_every=1)
    folder = tune(cfg, checkpoint=str(tmp_path / "hf"), B=B, packing=packing, **paths, **steps)

    net = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()  # without dropout
    adamw = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def loss_of(rows: list[dict[str, str]]) -> Tensor:
        total, n = torch.zeros(()), 0
        for row in rows:
            context = f"Context:\n{row['context']}\n" if row["context"] else ""
            prompt = f"{row['prompt']}\n{context}Response:\n".encode()
            target = [*row["response"].encode(), BYTES.eot_token]
            labels = torch.tensor([[-100] * len(prompt) + target])
            mean = net(torch.tensor([[*prompt, *target]]), labels=labels).loss
            total, n = total + mean * len(target), n + len(target)
        return total / n

    expected = []
    for step in range(6):
        val, loss = loss_of(val_rows), loss_of(rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rate = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
        adamw.param_groups[0]["lr"] = cfg.max_lr * rate
        adamw.step()
        adamw.zero_grad()
        expected.append([val.item(), loss.item(), norm.item()])
    for name, values in zip(("val", "train", "norm"), zip(*expected)):
        assert list(losses(folder, name).values())[:6] == pytest.approx(values, rel=1e-4), name
    n_tokens = sum(len(chat.prompt_text(row["prompt"], row["context"]) + row["response"]) for row in rows)  # bytes
    assert losses(folder, "tokens") == {step: step * n_tokens for step in range(7)}  # padding is not counted


def test_best_checkpoint_has_the_lowest_held_out_loss(cfg: Config, tmp_path: Path) -> None:
    """Memorizing four rows makes other rows worse, so the best step is not the last."""
    others = [dict(prompt=f"What does {name} have 1?", response="The zebra runs.") for name in NAMES]
    few, others = write_rows(tmp_path / "few.jsonl", make_rows(4)), write_rows(tmp_path / "others.jsonl", others)
    cfg = replace(cfg, data=few, val_data=others, max_steps=60, eval_every=5, save_every=7, keep_last=99, max_lr=1e-2)
    folder = tune(cfg)
    val = losses(folder, "val")
    lowest = min(list(val)[1:], key=val.get)  # step 0 is the model to start from
    assert 0 < lowest < 56 and val[lowest] < val[60] - 0.1 and not (folder / "ckpt_000000.pt").exists()
    best = checkpoint.read(folder / "best.pt")
    assert best.step == lowest and best.scores["val"] == pytest.approx(val[lowest]) and best.optimizers is None
    assert harness.bits(best.model) == harness.bits(checkpoint.read(folder / f"ckpt_{lowest:06d}.pt").model)
    assert checkpoint.read(folder / "ckpt_000060.pt").scores["best"] == pytest.approx(val[lowest])
    # resumed after the best step, the run still knows the lowest loss
    resumed = harness.resume(tmp_path / "resumed", folder, 56)
    tune(cfg, out_dir=str(resumed))
    assert not (resumed / "best.pt").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_step_with_packing_has_one_shape(cfg: Config, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shapes, backward = [], set(), training.backward
    reference = tune(cfg, packing=packing, compile=False)
    monkeypatch.setattr(torch, "compile", lambda raw, **options: asked.append(options) or raw)
    monkeypatch.setattr(runtime, "require_compiler", lambda device: None)
    monkeypatch.setattr(training, "backward", lambda *args: shapes.add(args[1]["x"].shape) or backward(*args))
    folder = tune(cfg, packing=packing, compile=True, out_dir=cfg.out_dir + "2")
    assert asked == [dict(fullgraph=packing, dynamic=not packing)]
    assert shapes == {(3, 96)} if packing else len(shapes) > 1
    harness.assert_close_runs(folder, reference)


def test_adapters_are_saved_merged_and_in_a_folder(cfg: Config) -> None:
    folder = tune(cfg, **LORA)
    sources = (cfg.checkpoint, folder, folder / "adapter")
    base, merged, loaded = (checkpoint.load_model(str(source)).raw.state_dict() for source in sources)
    assert lora.read_adapter_config(folder / "adapter") == (cfg.checkpoint, 2, 8)
    for name, p in base.items():
        torch.testing.assert_close(merged[name], loaded[name], rtol=0, atol=1e-6)
        is_matrix = name.startswith("transformer.h.") and p.dim() == 2
        assert ((merged[name] - p).abs().max() > 1e-3) if is_matrix else torch.equal(merged[name], p)
    assert losses(folder)[11] < losses(folder)[0]


def test_context_is_truncated_before_the_response(printed: pytest.LogCaptureFixture) -> None:
    context, response = "Ada met Leo. " * 20, "\nThey met often."
    (example,) = sft.make_examples([chat.Row("Who?", context, response)], 60, BYTES, "rows")
    text = chat.prompt_text("Who?", context[: 60 - len(chat.prompt_text("Who?", "c") + response) + 1]) + response
    assert example.ids.tolist() == [*text.encode(), BYTES.eot_token] and example.n_inputs == 60
    assert not printed.messages
    rows = [chat.Row("Who?", context, response * 9), chat.Row("x" * 61, "", "the prompt is too long")]
    (example,) = sft.make_examples(rows, 60, BYTES, "rows")
    prompt = chat.prompt_text("Who?").encode()
    assert bytes(example.ids.tolist()) == (prompt + response.encode() * 9)[:61] and example.n_prompt == len(prompt)
    for message in ("rows: 1 rows with a response truncated to fit into 60", "rows: 1 rows dropped"):
        assert message in printed.text
