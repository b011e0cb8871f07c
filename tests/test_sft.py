"""sft.py: whole runs, parity with transformers, killed, resumed, on two ranks, with adapters, and refused."""

import math
import random
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import ForkServer, losses, notes, tiny_model, write_rows
from safetensors.torch import load_file
from torch import Tensor, nn

import sft
from neogpt import chat, checkpoint, data, hf, runtime, training
from sft import Config

BYTES = data.get_tokenizer("bytes")
NAMES = ["Ada", "Leo", "Rosa", "Mona", "Jasper", "Cora", "Otto", "Ida"]
THINGS = ["hat", "nut", "jug", "pen", "soup", "coat"]
LORA = dict(lora_rank=2, lora_alpha=8.0)
KINDS = {"plain": {}, "adapters and packing": LORA | dict(packing=True)}
tune, refused = partial(harness.train, sft.main), partial(harness.refused, sft.main)


def make_rows(n: int) -> list[dict[str, str]]:
    """Rows of different lengths, every other one with a context."""
    rng, rows = random.Random(0), []
    for i in range(n):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        response = f"The {thing}." if i % 3 else f"\n{name} has the {thing}, and then {name} sleeps."
        context = f"{name} has a {thing}." if i % 2 else ""
        rows.append(dict(instruction=f"What does {name} have {i}?", context=context, response=response))
    return rows


def write_base(folder: Path, stage: str = "pretraining", **shape: Any) -> str:
    """A checkpoint of a random model with sequences of up to 96 tokens; its folder."""
    return str(harness.write_model(folder, tiny_model(**dict(n_layer=1, block_size=96) | shape), stage))


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A configuration that trains in a second: 32 rows to train on, 8 held out."""
    paths = dict(checkpoint=write_base(tmp_path / "base"), data=write_rows(tmp_path / "rows.jsonl", make_rows(40)))
    steps = dict(val_frac=0.2, rows_per_step=8, B=3, max_steps=12, max_lr=5e-3, eval_every=4, save_every=3)
    answers = dict(prompts=("What does Ada have?",), answer_tokens=6)
    return Config(out_dir=str(tmp_path / "out"), device="cpu", precision="fp32", **paths, **steps, **answers)


# -----------------------------------------------------------------------------
# A run


def test_rows_are_memorized_and_files_written(cfg: Config, tmp_path: Path) -> None:
    rows = [dict(prompt=f"{name}?", response=f"A {thing}.") for name, thing in zip(NAMES, THINGS)]
    path = write_rows(tmp_path / "few.jsonl", rows)
    few = dict(data=path, val_data=path, rows_per_step=6, n_eval_prompts=6, prompts=("Leo?",), answer_tokens=12)
    folder = tune(cfg, **few, max_steps=120, eval_every=60, save_every=50, max_lr=2e-2)
    scores = {name: losses(folder, name) for name in ("val", "exact", "ended", "accuracy")}
    assert all(values.keys() == {0, 60, 120} for values in scores.values()) and losses(folder).keys() == set(range(120))
    assert scores["val"][0] > 5 and scores["exact"][0] == 0
    assert scores["val"][120] < 0.05 and scores["exact"][120] == scores["ended"][120] == scores["accuracy"][120] == 1
    assert "6 rows to train on, 6 held out" in notes(folder) and notes(folder).count("> Leo? -> ") == 3
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
            prompt = f"{row['instruction']}\n{context}Response:\n".encode()
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
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(folder / "ckpt_000056.pt", resumed)
    tune(cfg, out_dir=str(resumed))
    assert not (resumed / "best.pt").exists()


def test_seed_determines_training_and_evaluations_do_not_change_it(cfg: Config) -> None:
    often = tune(cfg, eval_every=1, save_every=1, n_eval_prompts=4)
    never = tune(cfg, eval_every=100, save_every=100, prompts=(), out_dir=cfg.out_dir + "2")
    other = tune(cfg, seed=1, max_steps=2, out_dir=cfg.out_dir + "3")
    for name in ("train", "norm", "lr"):
        assert losses(often, name) == losses(never, name) and len(losses(often, name)) == 12
    for name in ("train", "val"):  # another order, and another split
        assert losses(often, name)[0] != losses(other, name)[0]


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_do_not_count_padding(cfg: Config, tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture) -> None:
    """One long row and many short ones: most of an unpacked batch is padding."""
    rows = [dict(prompt=f"{name}?", response="x" * 60 * (name == "Leo") + "yes") for name in NAMES]
    n_tokens = sum(len(chat.prompt_text(row["prompt"]) + row["response"]) for row in rows)  # bytes
    path = write_rows(tmp_path / "uneven.jsonl", rows)
    cfg = replace(cfg, data=path, val_data=path, eval_every=1, B=8, packing=packing)
    folder = tune(cfg, rows_per_step=8, max_steps=2)
    assert losses(folder, "tokens") == {step: step * n_tokens for step in range(3)}
    speeds = re.findall(r"([\d.]+) ms \| +([\d,]+) tok/s", capsys.readouterr().out)
    assert [float(ms) / 1e3 * float(v.replace(",", "")) for ms, v in speeds] == pytest.approx([n_tokens] * 2, rel=0.1)
    # resumed with other batch sizes, an epoch still has every row once
    for rows_per_step, max_steps in ((2, 2), (1, 3), (3, 4)):
        folder = tune(cfg, rows_per_step=rows_per_step, max_steps=max_steps, out_dir=cfg.out_dir + "2")
    assert checkpoint.read(folder / "ckpt_000004.pt").n_sequences == 8
    assert losses(folder, "tokens")[4] == n_tokens


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_step_with_packing_has_one_shape(cfg: Config, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that does nothing."""
    asked, shapes, backward = [], set(), training.backward
    reference = tune(cfg, packing=packing, compile=False)
    monkeypatch.setattr(torch, "compile", lambda raw, **options: asked.append(options) or raw)
    monkeypatch.setattr(runtime, "require_compiler", lambda device: None)
    monkeypatch.setattr(training, "backward", lambda *args: shapes.add(args[1]["x"].shape) or backward(*args))
    folder = tune(cfg, packing=packing, compile=True, out_dir=cfg.out_dir + "2")
    assert asked == [dict(fullgraph=packing, dynamic=not packing)]
    assert shapes == {(3, 96)} if packing else len(shapes) > 1
    harness.assert_close_runs(folder, reference)


# -----------------------------------------------------------------------------
# Killed and resumed; two ranks


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_run_equals_uninterrupted_run(cfg: Config, kind: str, server: ForkServer) -> None:
    cfg = replace(cfg, max_steps=120, eval_every=11, save_every=5, n_eval_prompts=2, **KINDS[kind])
    whole = tune(cfg)
    killed = replace(cfg, out_dir=cfg.out_dir + "-killed")
    harness.kill_and_resume(server, "sft", killed, moments=[8, 0, 13, 9], seed=len(kind))
    harness.assert_same_run(Path(killed.out_dir), whole)
    a, b = (checkpoint.read(Path(folder) / "best.pt") for folder in (killed.out_dir, whole))
    assert harness.bits([a.step, a.model]) == harness.bits([b.step, b.model])


@pytest.mark.parametrize("kind", [*KINDS, "fewer rows than ranks"])
def test_two_ranks_equal_one(cfg: Config, kind: str, server: ForkServer) -> None:
    odd = dict(rows_per_step=7, n_eval_prompts=3)  # one rank has a row less, and an empty sequence
    few = dict(rows_per_step=1, n_eval_prompts=1, val_frac=0.001)  # one row per step, one held out
    settings = odd | KINDS[kind] if kind in KINDS else few
    cfg = replace(cfg, **settings, max_steps=6, eval_every=3, keep_last=9)
    one, two = tune(cfg, B=7), Path(cfg.out_dir + "-two")
    server.run("sft", harness.command_line(replace(cfg, B=2, out_dir=str(two))), n_ranks=2)
    assert notes(two).count("world_size=2") == 1 and harness.n_losses(two) == 6  # only rank 0 writes
    harness.assert_close_runs(two, one, ("train", "val", "accuracy", "exact", "ended", "tokens"))
    a, b = (checkpoint.read(folder / "best.pt").model for folder in (one, two))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3  # AdamW divides by tiny roots


# -----------------------------------------------------------------------------
# Adapters and other models


def test_adapters_are_saved_merged_and_in_a_folder(cfg: Config) -> None:
    folder = tune(cfg, **LORA)
    sources = (cfg.checkpoint, folder, folder / "adapter")
    base, merged, loaded = (checkpoint.load_model(str(source)).raw.state_dict() for source in sources)
    adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 4
    for name, p in base.items():
        prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
        if f"{prefix}A.weight" in adapters:  # otherwise the parameter does not change
            p = p + 8.0 / 2 * adapters[f"{prefix}B.weight"] @ adapters[f"{prefix}A.weight"]
            assert (p - base[name]).abs().max() > 1e-3
        for tuned in (merged, loaded):
            torch.testing.assert_close(tuned[name], p, rtol=0, atol=1e-6)
    assert losses(folder)[11] < losses(folder)[0]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_ndlinear_model_is_tuned(cfg: Config, tmp_path: Path, lora_rank: int) -> None:
    folder = tune(cfg, checkpoint=write_base(tmp_path / "nd", mlp="ndlinear"), lora_rank=lora_rank)
    assert losses(folder)[11] < losses(folder)[0]


def test_adapters_of_a_pruned_model_are_refused(cfg: Config, tmp_path: Path) -> None:
    """Merged, they would fill its zeros."""
    raw = tiny_model(n_layer=1, block_size=96)
    raw.transformer.h[0].mlp.c_fc.weight.data[::2] = 0
    refused(cfg, "--lora_rank=2", checkpoint=str(harness.write_model(tmp_path / "pruned", raw)), lora_rank=2)


# -----------------------------------------------------------------------------
# Truncated, dropped and unusable rows


def test_context_is_truncated_before_the_response(capsys: pytest.CaptureFixture) -> None:
    runtime.setup("cpu", "fp32")
    context, response = "".join(f"Ada met Leo {i} times. " for i in range(20)), "\nThey met often."
    for T in (60, 61, 200):
        (example,) = sft.make_examples([chat.Row("Who?", context, response)], T, BYTES, "rows")
        prompt, target = bytes(example.ids[: example.n_prompt].tolist()), example.ids[example.n_prompt :].tolist()
        n_kept = T - len(chat.prompt_text("Who?", "c") + response) + 1
        assert prompt.decode() == chat.prompt_text("Who?", context[:n_kept])
        assert target == [*response.encode(), BYTES.eot_token] and example.n_inputs == T
    assert not capsys.readouterr().out
    (example,) = sft.make_examples([chat.Row("Who?", context, response * 9)], 60, BYTES, "rows")
    prompt = chat.prompt_text("Who?").encode()
    assert bytes(example.ids.tolist()) == (prompt + response.encode() * 9)[:61] and example.n_prompt == len(prompt)
    assert "rows: 1 rows with a response truncated to fit into 60" in capsys.readouterr().out


def test_truncated_and_dropped_rows_are_counted(cfg: Config, tmp_path: Path) -> None:
    rows = [("x" * 200, "the prompt is too long"), ("a", ""), ("b", "the response is too long " * 9), ("c", "fine")]
    path = write_rows(tmp_path / "odd.jsonl", [dict(prompt=prompt, response=text) for prompt, text in rows])
    noted = notes(tune(cfg, data=path, val_data=cfg.data, T=90, max_steps=1))
    assert f"{path}: 1 of 4 rows dropped: 1 with a blank" in noted and f"{path}: 1 rows dropped" in noted
    assert f"{path}: 1 rows with a response truncated to fit into 90" in noted
    assert "2 rows to train on, 40 held out" in noted


def test_unusable_data_is_refused(cfg: Config, tmp_path: Path) -> None:
    blank, good = dict(prompt="a", response=" \n"), dict(prompt="b", response="c")
    refused(cfg, "bad.jsonl", "3 with a blank", data=write_rows(tmp_path / "bad.jsonl", [blank] * 3))
    long = [dict(prompt=letter * 100, response="c") for letter in "xyz"]
    refused(cfg, "bad.jsonl", "96 tokens", data=write_rows(tmp_path / "bad.jsonl", long))
    refused(cfg, "the same prompt", "--val_data", data=write_rows(tmp_path / "bad.jsonl", [good] * 3))
    for name in ("data", "val_data"):
        refused(cfg, "none.jsonl", **{name: str(tmp_path / "none.jsonl")})
    assert not checkpoint.list_checkpoints(cfg.out_dir)


def test_unusual_prompts_are_answered(cfg: Config) -> None:
    prompts = ("", "日本\n<|endoftext|>", "longer than the 96 tokens of the model " * 5)
    folder = tune(cfg, max_steps=1, prompts=prompts, n_eval_prompts=99)
    assert len(re.findall(r"^#   > ", notes(folder), re.M)) == 2 * 3


# -----------------------------------------------------------------------------
# Refused runs


def test_what_changes_the_curve_is_reported(cfg: Config, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", make_rows(5))
    changes = {"seed 1337 -> 5": dict(seed=5), "packing False -> True": dict(packing=True), "T 80 -> 70": dict(T=70)}
    changes |= {"rows_per_step": dict(rows_per_step=2)}
    changes |= {"training_data": lambda: write_rows(Path(cfg.data), make_rows(39))}
    changes |= {"validation_data": lambda: write_rows(Path(held_out), make_rows(4))}
    harness.check_changes_are_reported(sft.main, replace(cfg, val_data=held_out, T=80, rows_per_step=4), changes)


def test_changed_batch_size_continues_the_order(cfg: Config, tmp_path: Path) -> None:
    rows = [dict(prompt=f"What is {i}?", response=f"{i * i % 89:02d}") for i in range(20)]  # two letters, end-of-text
    cfg = replace(cfg, data=write_rows(tmp_path / "equal.jsonl", rows))
    harness.check_changed_batch_size(sft.main, cfg, "rows_per_step", 1)


def test_other_weights_and_adapters_are_refused_on_resume(cfg: Config, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=1)
    for kind in ({}, LORA):
        out = dict(out_dir=f"{cfg.out_dir}-{len(kind)}", max_steps=3)
        folder = tune(cfg, **out, **kind)
        before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
        refused(cfg, other, "weights", **out, **kind, checkpoint=other)
        assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before
    for changed in (dict(lora_rank=4), dict(lora_alpha=4.0), dict(lora_rank=0)):
        ((name, value),) = changed.items()
        refused(cfg, f"{name} {LORA[name]} -> {value}", **out, **LORA | changed)


def test_unusable_checkpoints_and_folders_are_refused(cfg: Config, tmp_path: Path) -> None:
    base = cfg.checkpoint
    refused(cfg, f"--out_dir={base}", out_dir=base)
    assert [path.name for path in Path(base).iterdir()] == ["ckpt_000007.pt"]
    refused(cfg, "stage dpo", "pretraining", "sft", checkpoint=write_base(tmp_path / "dpo", "dpo"))
    refused(cfg, "nowhere", "train_gpt2.py", checkpoint=str(tmp_path / "nowhere"))
    assert not Path(cfg.out_dir).exists()
    # a run is not continued from checkpoints of another stage
    refused(cfg, "elsewhere", "sft", out_dir=write_base(tmp_path / "elsewhere"))
    assert losses(tune(cfg, checkpoint=write_base(tmp_path / "sft", "sft"))).keys() == set(range(12))


BAD = [dict(T=0), dict(T=97), dict(B=0), dict(rows_per_step=0), dict(max_steps=0), dict(epochs=0.0)]
BAD += [dict(eval_every=0), dict(save_every=0), dict(keep_last=0), dict(n_eval_prompts=-1), dict(lora_rank=-1)]
BAD += [dict(seed=-1), dict(val_frac=1.0), dict(warmup_frac=1.5), dict(max_lr=float("nan")), dict(device="gpu")]


@pytest.mark.parametrize("changed", BAD, ids=str)
def test_option_out_of_range_is_named(cfg: Config, changed: dict[str, Any]) -> None:
    ((name, value),) = changed.items()
    refused(cfg, f"--{name}={value} ", **changed)
