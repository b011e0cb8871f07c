"""grpo.py: one step against float64 and TRL, samples by number, and whole runs. See test_finetune.py too."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import ALONE, BYTES, losses, read_log, write_rows
from test_dpo import EOT, tiny
from test_finetune import configure

import grpo
from neogpt import checkpoint, finetune, generate, hf, model, rewards, training
from neogpt.chat import Example, Row

train = partial(harness.train, grpo.main)


# -----------------------------------------------------------------------------
# One step

N_PROMPT, N_PROMPTS, N_SAMPLES, N_TOKENS = 5, 3, 4, 7  # tokens of a prompt, prompts, answers to each, longest answer


def random_answers() -> tuple[list[Example], np.ndarray]:
    """Answers of 2 to N_TOKENS tokens, half of them with end-of-text, and their rewards (N_PROMPTS, N_SAMPLES)."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(N_PROMPTS):
        prompt = rng.integers(0, 256, N_PROMPT)
        for i in range(N_SAMPLES):
            answer = rng.integers(0, 256, N_TOKENS if i % 2 else rng.integers(1, N_TOKENS))
            examples.append(Example(np.array([*prompt, *answer, *[EOT] * (1 - i % 2)]), N_PROMPT))
    totals = rng.normal(size=(N_PROMPTS, N_SAMPLES))
    totals[1] = 0.3  # without signal
    return examples, totals


def update(
    cfg: grpo.Config, raw: model.GPT, reference: model.GPT, examples: list[Example], totals: np.ndarray
) -> list[tuple[training.StepResult, dict[str, torch.Tensor]]]:
    """The results and the gradients of updates_per_rollout steps of SGD with a learning rate of 0.3."""
    gradients, results = {}, []
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.3, fused=True)  # honors found_inf
    keep = lambda *_: gradients.update({name: p.grad.clone() for name, p in raw.named_parameters()})  # noqa: E731
    optimizer.register_step_pre_hook(keep)
    parts = grpo.make_batch(SimpleNamespace(cfg=cfg, rt=ALONE), examples, totals).micro_batches
    loss_fn = partial(grpo.grpo_loss, cfg=cfg, n_ids=257, reference=reference if cfg.kl_beta else None)
    for _ in range(cfg.updates_per_rollout):
        read = training.train_step(raw, [optimizer], parts, loss_fn, lr=0.3, grad_clip=0.0, rt=ALONE)
        results.append((read(), dict(gradients)))
    return results


def loss_in_float64(
    cfg: grpo.Config, raw: model.GPT, old: model.GPT, reference: model.GPT, examples: list[Example], totals: np.ndarray
) -> torch.Tensor:
    """The loss, answer by answer, from the formulas of the papers."""
    total, lengths = 0, [len(e.ids) - e.n_prompt for e in examples]
    for i, example in enumerate(examples):
        ids, group = torch.from_numpy(example.ids), torch.from_numpy(totals[i // N_SAMPLES])
        advantage = group[i % N_SAMPLES] - group.mean()
        if cfg.scale_by_std:
            advantage = advantage / (group.std() + 1e-4)
        logps = []
        for net in (raw, old, reference):
            probs = net(ids[None, :-1])[0, :, :257].softmax(-1)
            logps.append(probs[torch.arange(len(ids) - 1), ids[1:]].log()[N_PROMPT - 1 :])
        new, before, ref = logps[0], logps[1].detach(), logps[2].detach()
        ratio = (new - before).exp()
        gain = ratio * advantage
        if cfg.clip:
            gain = torch.min(gain, ratio.clip(1 - cfg.clip, 1 + cfg.clip) * advantage)
        kl = ref.exp() / new.exp() - (ref - new) - 1
        of_answer = (cfg.kl_beta * kl - gain).sum()
        n = dict(dapo=sum(lengths), grpo=lengths[i] * len(examples), dr_grpo=len(examples) * cfg.answer_tokens)
        total = total + of_answer / n[cfg.loss]
    return total


STEPS = [dict(loss=loss) for loss in ("dapo", "grpo", "dr_grpo")]
STEPS += [dict(scale_by_std=True), dict(kl_beta=0.3, loss="grpo"), dict(kl_beta=0.3, clip=0.02, updates_per_rollout=3)]


def make(changed: dict[str, Any]) -> tuple[grpo.Config, model.GPT, model.GPT]:
    """A configuration, a policy and another reference."""
    sizes = dict(answer_tokens=N_TOKENS, samples_per_prompt=N_SAMPLES, prompts_per_step=N_PROMPTS)
    return grpo.Config(**sizes, **changed), tiny(), tiny(1)


@pytest.mark.parametrize("changed", STEPS, ids=str)
def test_steps_equal_float64(changed: dict[str, Any]) -> None:
    """Loss, gradients and metrics. 1e-5 is rounding to fp32; the gradients are up to 1."""
    cfg, raw, reference = make(changed)
    examples, totals = random_answers()
    old, current = tiny().double(), tiny().double()
    for result, gradients in update(cfg, raw, reference, examples, totals):
        current.zero_grad()
        expected = loss_in_float64(cfg, current, old, reference.double(), examples, totals)
        expected.backward()
        assert result.loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
        for name, p in current.named_parameters():
            torch.testing.assert_close(gradients[name].double(), p.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in current.parameters():
                p -= 0.3 * p.grad
    for ours, theirs in zip(raw.parameters(), current.parameters()):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=3e-5)
    if cfg.clip:
        assert 0 < result.metrics["clipped"] < 1
    assert ("kl" in result.metrics) == (cfg.kl_beta > 0) and 0 < result.metrics["entropy"] < math.log(257)


@pytest.mark.parametrize("changed", STEPS[:4] + [dict(kl_beta=0.3, clip=0.02, updates_per_rollout=2)], ids=str)
def test_steps_equal_trl(changed: dict[str, Any], tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import tokenizers
    import transformers

    cfg, raw, _ = make(changed)
    examples, totals = random_answers()
    hf.save(raw, tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(257)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w256", pad_token="w256")
    answers = [e.ids[N_PROMPT:].tolist() for e in examples]
    prompts = [e.ids[:N_PROMPT].tolist() for e in examples]
    asked = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]
    score = dict(zip(map(str, answers), totals.flatten().tolist()))

    def rollout_func(texts: list[str], trainer: Any) -> dict[str, Any]:
        assert texts == asked  # each prompt N_SAMPLES times, in order
        return dict(prompt_ids=prompts, completion_ids=answers, logprobs=None)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [score[str(ids)] for ids in completion_ids]

    n_steps = cfg.updates_per_rollout
    settings = dict(per_device_train_batch_size=N_SAMPLES, gradient_accumulation_steps=N_PROMPTS)
    settings |= dict(num_generations=N_SAMPLES, max_completion_length=N_TOKENS, num_iterations=n_steps)
    settings |= dict(max_steps=n_steps, learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=1e9)
    settings |= dict(loss_type=cfg.loss, epsilon=cfg.clip or 0.2, beta=cfg.kl_beta, disable_dropout=True)
    settings |= dict(scale_rewards="group" if cfg.scale_by_std else "none")
    settings |= dict(use_bias_correction_kl=False)  # as in arXiv:2402.03300
    settings |= dict(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False)
    settings |= dict(shuffle_dataset=False, logging_steps=1, report_to=[], save_strategy="no")
    functions = dict(reward_funcs=reward, rollout_func=rollout_func, processing_class=fast)
    functions |= dict(optimizers=(torch.optim.SGD(theirs.parameters(), lr=0.3), None))
    rows = datasets.Dataset.from_list([dict(prompt=text) for text in asked[::N_SAMPLES]])
    trainer = trl.GRPOTrainer(model=theirs, args=trl.GRPOConfig(**settings), train_dataset=rows, **functions)
    trainer.train()
    logged = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
    for values, (result, _) in zip(logged, update(cfg, raw, tiny(), examples, totals), strict=True):
        assert values == pytest.approx([result.loss, result.grad_norm], abs=1e-5)
    theirs.save_pretrained(tmp_path / "after")
    before = tiny().state_dict()
    for name, p in hf.load(str(tmp_path / "after")).named_parameters():
        ours = raw.get_parameter(name)[: len(p)]
        torch.testing.assert_close(ours, p, rtol=0, atol=1e-5)
        assert (ours - before[name][: len(p)]).abs().max() > 1e-4 or "c_attn.bias" in name, name


# -----------------------------------------------------------------------------
# Samples


def sample(raw: model.GPT, prompts: list[str], first: int, n: int, **changed: int) -> list[list[int]]:
    """The ids of n answers to each prompt."""
    cfg = grpo.Config(**dict(answer_tokens=12, seed=1) | changed)
    run = SimpleNamespace(cfg=cfg, rt=ALONE, raw=raw, full_model=lambda: raw, tokenizer=BYTES)
    rows = [(Row(p, "", "x"), BYTES.encode_ordinary(p)) for p in prompts]
    answers, values, totals = grpo.sample_answers(run, rows, first, n, rewards.parse("exact + ends"))
    assert values.shape == (len(prompts) * n, 2) and totals.shape == (len(prompts), n)
    assert totals.flatten().tolist() == values.sum(axis=1).tolist()
    return [answer.ids for answer in answers]


def test_samples_depend_on_seed_and_number_only() -> None:
    raw = tiny()
    both = sample(raw, ["one", "three"], 5, 4)
    assert both == sample(raw, ["one"], 5, 4) + sample(raw, ["three"], 6, 4)
    assert both[:2] == sample(raw, ["one"], 5, 2)
    assert len({tuple(ids) for ids in both}) == 8
    assert sample(raw, ["one"], 6, 4) != both[:4] != sample(raw, ["one"], 5, 4, seed=2)
    assert sample(raw, ["one"], grpo.FIRST_HELD_OUT, 4) != sample(raw, ["one"], 0, 4)


def test_samples_follow_the_distribution_of_the_loss() -> None:
    """The mean of the first token's log-probability is minus its entropy. 3 standard errors of 4,096 samples."""
    raw = tiny(scale=0.1)
    ids = [answer[0] for answer in sample(raw, ["one"], 0, 4096, answer_tokens=1)]
    with torch.no_grad():
        logps = raw(torch.tensor([BYTES.encode_ordinary("one")]))[0, -1, :257].log_softmax(-1)
    found, expected = logps[ids].mean().item(), (logps.exp() * logps).sum().item()
    deviation = ((logps.exp() * logps**2).sum() - expected**2).sqrt().item()
    assert abs(found - expected) < 3 * deviation / 64


def test_a_reward_that_fails_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 computes the rewards and sends the error to the others."""
    sent = []

    def broadcast(result: list) -> None:
        sent.append(result[0])
        result[0] = sent[0]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(finetune, "answer", lambda *_: [rewards.Answer("a", "b", "c", [7], True)])
    terms = dict(own=rewards.Term(1.0, lambda answer: 1 / 0, (), ""))
    for rank in (0, 1):
        run = SimpleNamespace(cfg=grpo.Config(), rt=ALONE._replace(rank=rank, world_size=2))
        with pytest.raises(ValueError, match="own.*ZeroDivisionError"):
            grpo.sample_answers(run, [(Row("a", "", "b"), [7])], 0, 1, terms)
    assert len(sent) == 2 and sent[1] is None


def test_gap_is_rounding_and_sees_another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(rt=ALONE, full_model=partial(tiny, n_layer=2))
    examples = random_answers()[0][:N_SAMPLES]
    assert 0 < grpo.rollout_gap(run, examples) < 1e-4
    advance = generate.KVCache.advance
    monkeypatch.setattr(generate.KVCache, "advance", lambda self, longest: advance(self, longest - 1))
    assert grpo.rollout_gap(run, examples) > 1e-2


# -----------------------------------------------------------------------------
# Runs


@pytest.fixture
def cfg(tmp_path: Path) -> grpo.Config:
    """A configuration that trains in a second. One answer in four passes at first."""
    path = write_rows(tmp_path / "short.jsonl", [dict(prompt=f"{i}?", response=str(i)) for i in range(20)])
    return replace(configure("grpo", tmp_path), data=path, prompts_per_step=4, samples_per_prompt=8, answer_tokens=8)


def test_reward_rises_and_files_are_those_of_a_run(cfg: grpo.Config, tmp_path: Path) -> None:
    folder = train(cfg, max_steps=40, eval_every=20, n_eval_samples=16, max_lr=3e-2)
    passed, own = losses(folder, "pass@1"), f"reward/{tmp_path}/own.py:score"
    assert passed.keys() == {0, 20, 40} and losses(folder, "val")[40] < -0.5
    assert passed[40] > passed[0] + 0.25 and losses(folder, own)[39] > losses(folder, own)[0] + 0.25
    log = {name: float(value) for (step, name), value in read_log(folder).items() if step == 5}
    assert log["reward"] == pytest.approx(log[own] + 0.1 * log["reward/ends"])
    assert log["reward/ends"] == pytest.approx(1 - log["cut_off"]) and 0 <= log["no_signal"] <= 1
    assert 0 < log["gap"] < 1e-4 and log["entropy"] > 0 and losses(folder, "pass@16")[40] >= passed[40]
    text = (folder / "log.txt").read_text()
    assert "\n5 rollout_speed " in text and "\n5 training_speed " in text and text.count("\\n  > ") == 40
    ckpt = checkpoint.read_newest(folder)
    assert (ckpt.stage, ckpt.step, ckpt.n_sequences) == ("grpo", 40, 160)
    assert checkpoint.load_model(str(folder)).stage == "grpo" and (folder / "best.pt").is_file()


def test_a_constant_reward_ends_in_one_line(cfg: grpo.Config) -> None:
    """The mean of three rewards of 0.1 is rounded."""
    changed = dict(reward='0.1*format(".*")', samples_per_prompt=3, max_steps=30)
    harness.refused(grpo.main, cfg, "--reward", 20, "mean reward 0.1", **changed)
    folder = Path(cfg.out_dir)
    assert set(losses(folder).values()) == {0.0} and set(losses(folder, "norm").values()) == {0.0}
    assert set(losses(folder, "no_signal").values()) == {1.0}
    assert checkpoint.read_newest(folder).step == 19  # nothing is lost


def test_prompts_that_do_not_fit_are_counted(printed: pytest.LogCaptureFixture) -> None:
    rows = [Row("x" * n, "", "y") for n in (10, 29, 30)]  # and 11 bytes of the template
    run = SimpleNamespace(tokenizer=BYTES)
    assert [len(ids) for _, ids in finetune.encode_prompts(run, rows, 40, "here")] == [21, 40]
    assert "here: 1 rows dropped: they do not fit into 40 tokens" in printed.messages[0]
