"""prune.py: masks against Wanda in float64 with transformers' GPT-2, its files, and training from them."""

import itertools
import json
import shutil
from pathlib import Path

import harness
import pytest
import torch
from torch import Tensor

import prune
import train_gpt2
from neogpt import checkpoint, data, hf, model, training

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
CALIBRATION = torch.randint(257, (5, 32), generator=torch.Generator().manual_seed(1))


def keep_largest(score: Tensor, n_kept: int) -> Tensor:
    """The mask of the n_kept largest scores of every row. Scores must differ."""
    return score >= score.sort(dim=1, descending=True).values[:, n_kept - 1, None]


@torch.no_grad()
def reference_masks(raw: model.GPT, idx: Tensor, ratio: float, pattern: str, folder: Path) -> dict[str, Tensor]:
    """The masks of Wanda (arXiv:2306.11695, Eq. 1 and algorithm 1) by parameter name, in float64."""
    from transformers import GPT2LMHeadModel

    hf.save(raw, folder)
    reference = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    norms, masks = {}, {}

    def record(linear: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        norms[linear] = inputs[0].flatten(0, 1).norm(dim=0)

    for layer, name in itertools.product(range(2), MATRICES):
        linear = reference.transformer.h[layer].get_submodule(name)
        linear.register_forward_pre_hook(record)
    for layer in range(2):
        reference(idx)  # the blocks before this one are pruned already
        for name in MATRICES:
            linear = reference.transformer.h[layer].get_submodule(name)
            score = linear.weight.T.abs() * norms[linear]  # (out, in); transformers stores (in, out)
            n_inputs = score.size(1)
            n, m = map(int, pattern.split(":")) if pattern else (n_inputs - int(ratio * n_inputs), n_inputs)
            mask = keep_largest(score.reshape(-1, m), n).view_as(score)
            linear.weight.mul_(mask.T)
            masks[f"transformer.h.{layer}.{name}.weight"] = mask
    return masks


@pytest.mark.parametrize("ratio, pattern", [(0.3, ""), (0.0, ""), (0.5, "2:4"), (0.5, "4:8"), (0.5, "1:4")])
def test_wanda_masks_equal_float64_reference(ratio: float, pattern: str, tmp_path: Path) -> None:
    raw = harness.tiny_model(scale=0.2)
    expected = reference_masks(raw, CALIBRATION, ratio, pattern, tmp_path)
    before = {name: p.detach().clone() for name, p in raw.named_parameters()}
    prune.prune_model(raw, CALIBRATION, prune.Config(ratio=ratio, pattern=pattern, B=2), harness.ALONE)
    assert len(expected) == 8
    for name, p in raw.named_parameters():
        assert torch.equal(p, before[name] * expected.get(name, 1)), name  # no other parameter changed


@pytest.mark.parametrize("pattern, size, n_kept", [("", None, 0.5), ("2:4", 4, 2), ("1:8", 8, 1)])
def test_magnitude_keeps_largest_weights(pattern: str, size: int | None, n_kept: float) -> None:
    raw = harness.tiny_model(scale=0.2)
    before = {name: p.detach().clone() for name, p in raw.named_parameters()}
    prune.prune_model(raw, CALIBRATION, prune.Config(method="magnitude", pattern=pattern), harness.ALONE)
    for layer, name in itertools.product(range(2), MATRICES):
        weight = before[f"transformer.h.{layer}.{name}.weight"]
        n = size or weight.numel()  # without a pattern, all weights of a matrix are compared
        mask = keep_largest(weight.abs().view(-1, n), int(n_kept if size else n_kept * n)).view_as(weight)
        assert torch.equal(raw.get_submodule(f"transformer.h.{layer}.{name}").weight, weight * mask)


def test_mask_of_equal_scores_and_a_rounded_number() -> None:
    ones = torch.ones(1, 10)
    assert prune.make_mask(ones, ones[0], prune.Config(ratio=0.39)).tolist() == [[False] * 3 + [True] * 7]


@pytest.fixture
def cfg(text_file: Path, tmp_path: Path) -> prune.Config:
    """A tiny model, text to calibrate it on, and questions."""
    harness.write_model(tmp_path / "run", harness.tiny_model(scale=0.2))
    row = dict(activity_label="a", ctx="The number", endings=list("abcd"), label=1)
    rows = harness.write_rows(tmp_path / "rows.jsonl", [row] * 8)
    paths = dict(checkpoint=str(tmp_path / "run"), out_dir=str(tmp_path / "pruned"), data=str(text_file))
    return prune.Config(**paths, hellaswag_data=rows, n_sequences=8, val_tokens=64, device="cpu")


def pruned_weights(folder: str | Path) -> dict[str, Tensor]:
    """The weights that have zeros, from the newest checkpoint of a folder."""
    return {name: w for name, w in checkpoint.read_newest(folder).model.items() if not w.all()}


def test_checkpoint_and_report(cfg: prune.Config, capsys: pytest.CaptureFixture) -> None:
    out_dir = harness.train(prune.main, cfg)
    before, after = (json.loads((out_dir / "report.json").read_text())[side] for side in ("before", "after"))
    assert (before["sparsity"], after["sparsity"]) == (0, 0.5)
    assert before["nonzero_parameters"] - after["nonzero_parameters"] == 2 * 12 * 16 * 16 // 2
    assert {"loss", "perplexity", "hellaswag", "hellaswag_norm"} <= before.keys() == after.keys()
    printed = capsys.readouterr().out
    assert "wanda 0.5" in printed and f"{after['nonzero_parameters']:,}" in printed
    ckpt = checkpoint.read_newest(out_dir)
    assert (ckpt.stage, ckpt.step, ckpt.tokenizer) == ("pretraining", 7, "bytes")
    assert ckpt.pruned["ratio"] == 0.5 and len(pruned_weights(out_dir)) == 8


def test_pruning_again_keeps_zeros(cfg: prune.Config, tmp_path: Path) -> None:
    first = harness.train(prune.main, cfg)
    again = harness.train(prune.main, cfg, checkpoint=str(first), out_dir=str(tmp_path / "again"), ratio=0.25)
    assert json.loads((again / "report.json").read_text())["after"]["sparsity"] == 0.5
    assert harness.bits(checkpoint.read_newest(again).model) == harness.bits(checkpoint.read_newest(first).model)


@pytest.mark.parametrize("mlp, optimizer", [({}, "adamw"), ({}, "muon"), (harness.ND, "muon")])
def test_training_from_pruned_weights_with_shorter_sequences_keeps_zeros(
    mlp: dict, optimizer: str, cfg: prune.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, start = harness.tiny_model(scale=0.2, **mlp), tmp_path / "start"
    harness.write_model(start, raw) if mlp else hf.save(raw, start)  # the latter's vocabulary is not padded
    pruned = pruned_weights(harness.train(prune.main, cfg, checkpoint=str(start)))
    assert len(pruned) == 8
    val = data.Windows(data.open_data(cfg.data, harness.BYTES)[1], 32)
    expected = training.validate(checkpoint.load_model(cfg.out_dir).raw, val, 64, 4, harness.ALONE)
    monkeypatch.setitem(model.SIZES, "tiny", dict(n_layer=2, n_head=2, n_embd=16) | mlp)
    start = dict(model="tiny", init_from=cfg.out_dir, out_dir=str(tmp_path / "recovered"), optimizer=optimizer)
    text = dict(tokenizer="bytes", data=cfg.data, T=32, total_batch_size=128, val_tokens=64, hellaswag_every=0)
    recovery = train_gpt2.Config(**start, **text, device="cpu", precision="fp32")
    for max_steps in (3, 5):  # the second run is resumed
        folder = harness.train(train_gpt2.main, recovery, max_steps=max_steps)
        trained = checkpoint.read_newest(folder)
        assert trained.step == max_steps
        shutil.rmtree(cfg.out_dir, ignore_errors=True)  # a resumed run needs only its own checkpoint
        for name, weight in pruned.items():
            assert torch.equal(trained.model[name] != 0, weight != 0), name
            assert not torch.equal(trained.model[name], weight), name
    assert trained.model["transformer.wpe.weight"].shape == (32, 16)  # of 64 positions
    assert trained.model["lm_head.weight"].shape == (320 if mlp else 257, 16)
    assert harness.losses(folder, "val")[0] == pytest.approx(expected, abs=1e-6)


def test_folder_of_another_run_is_refused(cfg: prune.Config) -> None:
    harness.refused(prune.main, cfg, cfg.checkpoint, out_dir=cfg.checkpoint)
    out_dir = harness.train(prune.main, cfg)
    harness.train(prune.main, cfg, ratio=0.25)  # the same checkpoint is replaced
    for name in ("log.txt", "ckpt_000099.pt"):
        (out_dir / name).write_bytes(b"of another run")
        harness.refused(prune.main, cfg, cfg.out_dir, name)
        (out_dir / name).unlink()


INVALID = dict(ratio=(1.0, -0.1, float("nan")), pattern=("2:5", "4:4", "0:4", "half"), n_sequences=(10_000, 0))
INVALID |= dict(B=(0,), seed=(-1,), hellaswag_rows=(-1,), data=("nowhere",))


def test_invalid_option_is_named_with_its_value(cfg: prune.Config) -> None:
    for name, values in INVALID.items():
        for value in values:
            harness.refused(prune.main, cfg, name, value, **{name: value})
