"""What sft.py, dpo.py and grpo.py have in common: killed, resumed, on two ranks, reported and refused."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import harness
import pytest
from harness import losses, notes, tiny_model, write_rows

import dpo
import grpo
import sft
from neogpt import checkpoint, finetune

MAINS = {sft.Config: sft.main, dpo.Config: dpo.main, grpo.Config: grpo.main}
COMMON = dict(B=8, max_steps=12, max_lr=5e-3, val_frac=0.2, eval_every=4, save_every=3, n_eval_prompts=2)
COMMON |= dict(prompts=("What does Ada have?",), answer_tokens=6, device="cpu", precision="fp32")
STAGES = {
    "sft": sft.Config(**COMMON, rows_per_step=8),
    "dpo": dpo.Config(**COMMON, pairs_per_step=8, rpo_alpha=0.5),
    "grpo": grpo.Config(**COMMON, prompts_per_step=3, samples_per_prompt=4, n_eval_samples=2),
}
PER_STEP = dict(sft="rows_per_step", dpo="pairs_per_step", grpo="prompts_per_step")
LORA = dict(lora_rank=2, lora_alpha=8.0)


def make_rows(n: int) -> list[dict[str, str]]:
    """Rows for all stages, of different lengths, every other one with a context."""
    rng, rows = random.Random(0), []
    for i in range(n):
        name, thing = rng.choice(["Ada", "Leo", "Rosa", "Jasper"]), rng.choice(["hat", "nut", "soup", "coat"])
        response = f"The {thing}." if i % 3 else f"\n{name} has the {thing}, and then {name} sleeps."
        context = f"{name} has a {thing}." if i % 2 else ""
        row = dict(prompt=f"What does {name} have {i}?", context=context, response=response)
        rows.append(row | dict(chosen=response, rejected=f"The jug {i}."))
    return rows


def write_start(folder: Path, stage: str = "sft", **shape: Any) -> str:
    """A checkpoint of a random model with sequences of up to 96 tokens; its folder."""
    raw = tiny_model(**dict(n_layer=1, block_size=96, scale=0.05) | shape)
    return str(harness.write_model(folder, raw, stage))


def configure(stage: str, folder: Path) -> Any:
    """A configuration of a stage that trains in a second: 32 rows to train on, 8 held out."""
    paths = dict(checkpoint=write_start(folder / "start"), data=write_rows(folder / "rows.jsonl", make_rows(40)))
    cfg = replace(STAGES[stage], **paths, out_dir=str(folder / "out"))
    if stage == "grpo":
        (folder / "own.py").write_text("def score(answer):\n    return float(answer.ids[0] % 4 == 0)\n")
        cfg = replace(cfg, reward=f"{folder}/own.py:score + 0.1*ends")
    return cfg


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    """Every stage, unless a test selects it."""
    return request.param


@pytest.fixture
def cfg(stage: str, tmp_path: Path) -> Any:
    return configure(stage, tmp_path)


def tune(cfg: Any, **changed: Any) -> Path:
    """Run the script of a configuration; return its out_dir."""
    return harness.train(MAINS[type(cfg)], cfg, **changed)


def refused(cfg: Any, *words: object, **changed: Any) -> None:
    """Check that the script of a configuration refuses it."""
    harness.refused(MAINS[type(cfg)], cfg, *words, **changed)


# -----------------------------------------------------------------------------
# Killed and resumed; two ranks

OPTIONS = dict(sft=LORA | dict(packing=True), dpo=LORA | dict(loss="ipo", max_lr=5e-4))
OPTIONS |= dict(grpo=LORA | dict(kl_beta=0.1, clip=0.2, updates_per_rollout=2))
KILLED = [("sft", dict(max_steps=60)), ("dpo", OPTIONS["dpo"] | dict(max_steps=60)), ("grpo", OPTIONS["grpo"])]


@pytest.mark.parametrize("stage, options", KILLED, ids=STAGES)
def test_killed_and_resumed_run_equals_uninterrupted_run(
    stage: str, options: dict, cfg: Any, server: harness.ForkServer
) -> None:
    cfg = replace(cfg, **dict(max_steps=30, eval_every=7) | options)
    folder = harness.kill_and_resume(server, stage, replace(cfg, out_dir=cfg.out_dir + "-killed"), [4, 0, 9])
    whole = tune(cfg)
    harness.assert_same_run(folder, whole)
    a, b = (checkpoint.read(each / "best.pt") for each in (folder, whole))
    assert harness.bits([a.step, a.model]) == harness.bits([b.step, b.model])
    assert (folder / "adapter").exists() == (cfg.lora_rank > 0)


@pytest.mark.parametrize("n", [5, 1])
def test_two_ranks_equal_one(n: int, stage: str, cfg: Any, server: harness.ForkServer) -> None:
    """5: one rank has a row less, and an empty sequence; 1: fewer rows than ranks."""
    options = dict(max_steps=6, eval_every=3, keep_last=9, n_eval_prompts=n) | (OPTIONS[stage] if n > 1 else {})
    cfg = replace(cfg, **options, **{PER_STEP[stage]: n})
    one, two = tune(cfg, B=7), Path(cfg.out_dir + "-two")
    server.run(stage, harness.command_line(replace(cfg, B=2, out_dir=str(two))), n_ranks=2)
    assert notes(two).count("world_size=2") == 1  # only rank 0 writes
    assert harness.n_losses(two) == harness.n_losses(one)
    names = {name for _, name in harness.read_log(one) if name != "gap"}
    harness.assert_close_runs(two, one, names, abs=1e-4)
    a, b = (checkpoint.read(folder / "best.pt").model for folder in (one, two))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3  # AdamW divides by tiny roots


# -----------------------------------------------------------------------------
# Changed and refused runs


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_changed_batch_size_continues_the_order(stage: str, cfg: Any, tmp_path: Path) -> None:
    """Weights are frozen: a step's loss is the mean of the losses of its rows. The rollouts of GRPO do not show it."""
    texts = [f"{i * i % 89:02d}" for i in range(20)]  # two letters and end-of-text: equally many targets
    rows = [dict(prompt=f"What is {i}?", response=text, chosen=text, rejected="x") for i, text in enumerate(texts)]
    path, sizes = write_rows(tmp_path / "equal.jsonl", rows), [4] * 5 + [6] * 3 + [1] * 2
    cfg = replace(cfg, data=path, max_lr=0.0, eval_every=100, save_every=5, B=1)
    single = tune(cfg, out_dir=str(tmp_path / "single"), max_steps=sum(sizes), **{PER_STEP[stage]: 1})
    one_by_one = list(losses(single).values())
    for max_steps, n in ((5, 4), (8, 6), (10, 1)):
        folder = tune(cfg, max_steps=max_steps, **{PER_STEP[stage]: n})
    ends = [sum(sizes[: step + 1]) for step in range(len(sizes))]
    means = [sum(one_by_one[end - n : end]) / n for end, n in zip(ends, sizes)]
    assert len({round(mean, 4) for mean in means}) > 5  # the rows differ
    assert list(losses(folder).values()) == pytest.approx(means, rel=1e-5)  # fp32 rounding


def test_what_changes_the_curve_is_reported(stage: str, cfg: Any, tmp_path: Path) -> None:
    held_out, own = write_rows(tmp_path / "held_out.jsonl", make_rows(5)), tmp_path / "own.py"
    changes = {"seed 1337 -> 5": dict(seed=5), "T 80 -> 70": dict(T=70), PER_STEP[stage]: {PER_STEP[stage]: 2}}
    changes |= {"training_data": lambda: write_rows(Path(cfg.data), make_rows(39))}
    changes |= {"validation_data": lambda: write_rows(Path(held_out), make_rows(5)[1:])}
    if stage == "grpo":
        changes |= {"clip 0.0 -> 0.2": dict(clip=0.2), "reward_code": lambda: own.write_text(own.read_text() + "#")}
    cfg = replace(cfg, val_data=held_out, T=80)
    harness.check_changes_are_reported(MAINS[type(cfg)], cfg, changes)


@pytest.mark.parametrize("options", [{}, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("stage", ["sft"])
def test_other_weights_and_adapters_are_refused_on_resume(options: dict, cfg: Any, tmp_path: Path) -> None:
    other = write_start(tmp_path / "other", seed=1)
    folder = tune(cfg, max_steps=3, **options)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    refused(cfg, other, "weights", **options, checkpoint=other)
    for name, value in (dict(lora_rank=4, lora_alpha=4.0) if options else dict(lora_rank=4)).items():
        refused(cfg, f"{name} {options.get(name, getattr(cfg, name))} -> {value}", "LoRA", **options | {name: value})
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before


def test_unusable_checkpoints_and_folders_are_refused(stage: str, cfg: Any, tmp_path: Path) -> None:
    start, wrong = Path(cfg.checkpoint), "dpo" if stage == "sft" else "pretraining"
    refused(cfg, f"--out_dir={start}", out_dir=str(start))
    assert [path.name for path in start.iterdir()] == ["ckpt_000007.pt"]
    refused(cfg, f"stage {wrong}", "sft", checkpoint=write_start(tmp_path / "wrong", wrong))
    refused(cfg, "nowhere", checkpoint=str(tmp_path / "nowhere"))
    raw = tiny_model(n_layer=1)
    raw.transformer.h[0].mlp.c_fc.weight.data[::2] = 0  # merged adapters would fill the zeros of a pruned model
    refused(cfg, "--lora_rank=2", checkpoint=str(harness.write_model(tmp_path / "pruned", raw, "sft")), lora_rank=2)
    assert not Path(cfg.out_dir).exists()
    # a run is not continued from checkpoints of another stage
    refused(cfg, "elsewhere", stage, out_dir=write_start(tmp_path / "elsewhere", "pretraining"))


def test_unusable_data_is_refused(stage: str, cfg: Any, tmp_path: Path) -> None:
    good = dict(prompt="a", response="b", chosen="b", rejected="c")
    for rows, words in (
        ([good | dict(response=" \n", chosen=" \n")] * 3, ["3 with a blank"]),
        ([good | dict(prompt=letter * 100) for letter in "xyz"], ["96 tokens" if stage != "grpo" else "90 tokens"]),
        ([good] * 3, ["3 rows have the same prompt", "--val_data"]),
    ):
        refused(cfg, *words, data=write_rows(tmp_path / "bad.jsonl", rows))
    for name in ("data", "val_data"):
        refused(cfg, "none.jsonl", **{name: str(tmp_path / "none.jsonl")})
    assert not checkpoint.list_checkpoints(cfg.out_dir)


BAD = dict(T=97, B=0, max_steps=0, epochs=0.0, eval_every=0, save_every=0, keep_last=0, n_eval_prompts=-1)
BAD |= dict(lora_rank=-1, seed=-1, val_frac=1.0, warmup_frac=1.5, device="gpu", max_lr=math.nan)
BAD_OF_STAGE = dict(sft=[dict(rows_per_step=0)], dpo=[dict(beta=0.0), dict(rpo_alpha=-1.0), dict(pairs_per_step=0)])
BAD_OF_STAGE["dpo"] += [dict(label_smoothing=0.1, loss=loss) for loss in ("hinge", "ipo")] + [dict(label_smoothing=0.5)]
BAD_OF_STAGE["grpo"] = [dict(reward="exakt"), dict(prompts_per_step=0), dict(samples_per_prompt=1), dict(clip=1.0)]
BAD_OF_STAGE["grpo"] += [dict(clip=0.0, updates_per_rollout=2), dict(kl_beta=-1.0), dict(answer_tokens=49)]
BAD_OF_STAGE["grpo"] += [dict(n_eval_prompts=0), dict(n_eval_samples=0)]


def test_options_out_of_range_are_named(stage: str, cfg: Any) -> None:
    for changed in [{name: value} for name, value in BAD.items()] + BAD_OF_STAGE[stage]:
        name, value = next(iter(changed.items()))
        refused(cfg, f"--{name}={value}", **changed)


def test_the_time_of_answers_is_not_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    order, run = [], Mock(step=1, scores={}, cfg=Mock(prompts=()))
    run.record.side_effect = lambda **_: order.append("record")  # starts the clock of the next step
    monkeypatch.setattr(finetune, "answer", lambda *_: order.append("answer") or [])
    assert finetune.report(run, dict(val=1.0)) and run.scores == dict(best=1.0)
    assert order == ["answer", "record"]
