"""grpo.py: one step against float64 and TRL, samples that depend on their number only, and whole runs."""

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
from harness import ALONE, ForkServer, losses, notes, read_log, write_rows

import grpo
from neogpt import checkpoint, data, finetune, generate, model, optim, rewards, training
from neogpt.chat import Example, Row

BYTES = data.get_tokenizer("bytes")
EOT = 256
train = partial(harness.train, grpo.main)


def tiny(seed: int = 0, scale: float = 0.3, **shape: Any) -> model.GPT:
    """A model of one layer whose predictions are far from uniform."""
    return harness.tiny_model(seed, scale, **dict(n_layer=1, block_size=48) | shape)


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
    advantages = grpo.advantages_of(totals, cfg.scale_by_std).flatten().tolist()
    n_targets = sum(len(e.ids) - e.n_prompt for e in examples)
    parts = grpo.micro_batches(examples, advantages, n_targets, cfg, ALONE)
    batch = training.Batch(parts, N_PROMPTS, 0)
    grpo.add_log_probs(SimpleNamespace(cfg=cfg, rt=ALONE, raw=raw), batch, reference if cfg.kl_beta else None)
    loss_fn = partial(grpo.grpo_loss, cfg=cfg, n_ids=257)
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
    return (
        grpo.Config(answer_tokens=N_TOKENS, samples_per_prompt=N_SAMPLES, prompts_per_step=N_PROMPTS, **changed),
        tiny(),
        tiny(1),
    )


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


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_no_split_changes_loss_or_gradient(loss: Any) -> None:
    found = []
    for B in (1, 5, 100):
        cfg, raw, reference = make(dict(loss=loss, B=B, kl_beta=0.1))
        ((result, gradients),) = update(cfg, raw, reference, *random_answers())
        found.append((result.loss, result.metrics["kl"], gradients["transformer.wte.weight"]))
    for loss, kl, gradient in found[1:]:
        assert (loss, kl) == (pytest.approx(found[0][0], abs=1e-6), pytest.approx(found[0][1], abs=1e-6))
        torch.testing.assert_close(gradient, found[0][2], rtol=1e-4, atol=1e-6)


def test_groups_without_signal_have_no_gradient() -> None:
    """Also where the mean of equal rewards is rounded."""
    totals = np.full((N_PROMPTS, N_SAMPLES), 0.1 + 0.2) / 3
    for scale_by_std in (False, True):
        assert not grpo.advantages_of(totals, scale_by_std).any()
    cfg, raw, reference = make({})
    ((result, gradients),) = update(cfg, raw, reference, random_answers()[0], totals)
    assert (result.loss, result.grad_norm, result.skipped) == (0, 0, False)
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("changed", STEPS[:4] + [dict(kl_beta=0.3, clip=0.02, updates_per_rollout=2)], ids=str)
def test_one_step_equals_trl(changed: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    import tokenizers
    import transformers

    from neogpt import hf

    cfg, raw, _ = make(changed)
    examples, totals = random_answers()
    hf.save(raw, tmp_path / "hf")
    start = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(257)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w256", pad_token="w256")
    answers = [e.ids[N_PROMPT:].tolist() for e in examples]
    prompts = [e.ids[:N_PROMPT].tolist() for e in examples]
    score = dict(zip(map(str, answers), totals.flatten().tolist()))

    def rollout_func(texts: list[str], trainer: Any) -> dict[str, Any]:
        asked = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]
        assert texts == asked  # each prompt N_SAMPLES times, in order
        return dict(prompt_ids=prompts, completion_ids=answers, logprobs=None)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [score[str(ids)] for ids in completion_ids]

    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=N_SAMPLES,
        gradient_accumulation_steps=N_PROMPTS,
        num_generations=N_SAMPLES,
        max_completion_length=cfg.answer_tokens,
        num_iterations=cfg.updates_per_rollout,
        max_steps=cfg.updates_per_rollout,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        loss_type=cfg.loss,
        epsilon=cfg.clip or 0.2,
        beta=cfg.kl_beta,
        scale_rewards="group" if cfg.scale_by_std else "none",
        shuffle_dataset=False,
        disable_dropout=True,
        use_bias_correction_kl=False,  # as in arXiv:2402.03300
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    import datasets

    rows = [dict(prompt=" ".join(f"w{i}" for i in prompt)) for prompt in prompts[::N_SAMPLES]]
    trainer = trl.GRPOTrainer(
        model=start,
        reward_funcs=reward,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=fast,
        rollout_func=rollout_func,
        optimizers=(torch.optim.SGD(start.parameters(), lr=0.3), None),
    )
    trainer.train()
    ours = update(cfg, raw, tiny(), examples, totals)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    gaps = [abs(entry["loss"] - result.loss) for entry, (result, _) in zip(logged, ours, strict=True)]
    norms = [abs(entry["grad_norm"] - result.grad_norm) for entry, (result, _) in zip(logged, ours, strict=True)]
    start.save_pretrained(tmp_path / "after")
    theirs = hf.load(str(tmp_path / "after"))
    start_weights = dict(tiny().named_parameters())
    weights = 0.0
    for name, p in theirs.named_parameters():
        mine = raw.get_parameter(name)[: len(p)]
        weights = max(weights, (mine - p).abs().max().item())
        assert (mine - start_weights[name][: len(p)]).abs().max() > 1e-4 or "c_attn.bias" in name, name
    print(
        f"TRL {trl.__version__} {changed}: loss {max(gaps):.1e}, gradient norm {max(norms):.1e}, weights {weights:.1e}"
    )
    assert max(gaps) < 1e-5 and max(norms) < 1e-5 and weights < 1e-5
