"""prune.py against the paper's formula written out, on models whose weights are made by hand."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prune as pruning
from checkpoints import load_model, open_checkpoint, write_checkpoint
from hf import to_hf
from lora import add_lora, save_adapter
from model import GPT, GPTConfig
from optimizers import keep_zeros, make_optimizers, zero_masks
from prune import Config, drop_smallest, main, make_mask, prune, read_pattern
from training import autocast

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, n_tokens=257, vocab_size=320)
ND = TINY | dict(mlp="ndlinear", mlp_width=24, mlp_modes=3)
FP32 = autocast("fp32", torch.device("cpu"))


def make_model(shape: dict[str, Any] = TINY, seed: int = 0) -> GPT:
    """A model of large random weights, biases and gains too, so that every term counts."""
    torch.manual_seed(seed)
    raw = GPT(GPTConfig(**shape))
    with torch.no_grad():
        for name, p in raw.named_parameters():
            p.normal_(mean=float("ln_" in name and name.endswith("weight")), std=0.2)
    return raw


def reference(raw: GPT, idx: Tensor, ratio: float, n_m: tuple[int, int] | None) -> dict[str, Tensor]:
    """Wanda for a dense GPT-2, row by row and weight by weight, in float64, from the paper's formula."""
    w = {name: p.detach().double().clone() for name, p in raw.named_parameters()}
    C, nh = raw.config.n_embd, raw.config.n_head
    masks = {}
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]  # (n, T, C)

    def run(x: Tensor, h: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The block's output, and the inputs of its four matrices."""
        inputs = {}

        def linear(name: str, y: Tensor) -> Tensor:
            inputs[f"{h}.{name}.weight"] = y.reshape(-1, y.size(-1))
            return y @ w[f"{h}.{name}.weight"].T + w[f"{h}.{name}.bias"]

        def norm(name: str, y: Tensor) -> Tensor:
            return F.layer_norm(y, (C,), w[f"{h}.{name}.weight"], w[f"{h}.{name}.bias"])

        n, T, _ = x.shape
        q, k, v = linear("attn.c_attn", norm("ln_1", x)).split(C, dim=2)
        q, k, v = (t.view(n, T, nh, C // nh).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) / (C // nh) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, T, C)
        x = x + linear("attn.c_proj", y)
        y = F.gelu(linear("mlp.c_fc", norm("ln_2", x)), approximate="tanh")
        return x + linear("mlp.c_proj", y), inputs

    for layer in range(raw.config.n_layer):
        _, inputs = run(x, f"transformer.h.{layer}")
        for name, seen in inputs.items():
            score = w[name].abs() * seen.norm(dim=0)
            mask = torch.ones_like(score, dtype=torch.bool)
            size = n_m[1] if n_m else score.size(1)
            for row in range(score.size(0)):
                for start in range(0, score.size(1), size):
                    group = score[row, start : start + size].tolist()
                    n_drop = n_m[1] - n_m[0] if n_m else int(ratio * len(group))
                    for at in sorted(range(len(group)), key=lambda i: group[i])[:n_drop]:
                        mask[row, start + at] = False
            masks[name] = mask
        for name in inputs:
            w[name] *= masks[name]
        x, _ = run(x, f"transformer.h.{layer}")
    return masks


@pytest.mark.parametrize("shape", [TINY, TINY | dict(attention="manual")], ids=["flash", "manual"])
@pytest.mark.parametrize(
    "ratio, pattern", [(0.5, ""), (0.3, ""), (0.0, ""), (0.5, "2:4"), (0.5, "4:8"), (0.5, "1:4")]
)
def test_masks_are_the_papers(ratio: float, pattern: str, shape: dict[str, Any]) -> None:
    raw = make_model(shape)
    idx = torch.randint(257, (5, 32), generator=torch.Generator().manual_seed(1))
    expected = reference(raw, idx, ratio, read_pattern(pattern))
    before = {name: p.detach().clone() for name, p in raw.named_parameters()}
    masks = prune(raw, idx, Config(ratio=ratio, pattern=pattern, B=2), FP32)
    assert masks.keys() == expected.keys() and len(masks) == 8
    for name in masks:
        assert torch.equal(masks[name], expected[name]), name
    for name, p in raw.named_parameters():
        kept = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(p, kept), name  # nothing else has changed


def test_every_group_of_two_in_four_has_two_zeros() -> None:
    raw = make_model()
    prune(raw, torch.randint(257, (3, 16)), Config(pattern="2:4"), FP32)
    for block in raw.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            assert ((linear.weight.view(-1, 4) == 0).sum(1) == 2).all()


def test_magnitude_takes_the_smallest_of_the_matrix() -> None:
    weight = torch.tensor([[0.1, -0.2, 3.0, 4.0], [5.0, -6.0, 0.05, 8.0]])
    mask = make_mask(weight, None, Config(method="magnitude", ratio=0.5))
    assert mask.tolist() == [[False, False, True, True], [True, True, False, True]] or mask.sum() == 4
    assert (~mask & (weight.abs() > 4)).sum() == 0 and int((~mask).sum()) == 4


def test_wanda_weighs_the_inputs() -> None:
    weight, norm = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0, 1.0, 1.0, 0.1])
    assert make_mask(weight, norm, Config(ratio=0.5)).tolist() == [[True, False, True, False]]
    assert make_mask(weight, norm, Config(pattern="1:2")).tolist() == [[True, False, True, False]]


def test_of_equals_the_first_goes_first_and_rounding_is_down() -> None:
    assert drop_smallest(torch.ones(1, 4), 2).tolist() == [[False, False, True, True]]
    assert int((~make_mask(torch.rand(3, 10), torch.ones(10), Config(ratio=0.39))).sum()) == 3 * 3


def test_ndlinear_prunes_its_large_factors_only() -> None:
    raw = make_model(ND)
    masks = prune(raw, torch.randint(257, (3, 16)), Config(ratio=0.5), FP32)
    assert len(masks) == 8 and all(".modes.1." not in name for name in masks)
    assert all((raw.get_parameter(name) == 0).float().mean() == 0.5 for name in masks)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [TINY, ND], ids=["dense", "ndlinear"])
def test_zeros_stay_zero_in_training(shape: dict[str, Any], optimizer: str) -> None:
    raw = make_model(shape)
    assert zero_masks(raw) == {}
    masks = prune(raw, torch.randint(257, (3, 16)), Config(ratio=0.5), FP32)
    assert {name: mask.tolist() for name, mask in zero_masks(raw).items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    optimizers = make_optimizers(raw, optimizer=optimizer, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    keep_zeros(optimizers, raw, zero_masks(raw))
    before = {name: p.detach().clone() for name, p in raw.named_parameters()}
    for _ in range(3):
        idx = torch.randint(257, (2, 17))
        raw(idx[:, :-1], idx[:, 1:])[1].backward()
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = 1e-2
            each.step()
            each.zero_grad()
    for name, mask in masks.items():
        p = raw.get_parameter(name)
        moved = p[mask] != before[name][mask]  # one in thousands may come back to where it was, by chance
        assert not p[~mask].any() and moved.float().mean() > 0.98, name


# -----------------------------------------------------------------------------
# The script


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A tiny model, and text to calibrate it on."""
    raw = make_model()
    state = dict(stage="pretraining", step=7, tokenizer="bytes", model=raw.state_dict())
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run" / "ckpt_000007.pt", state | dict(model_config=asdict(raw.config)))
    text = "\n<|endoftext|>\n".join(f"This is document {i}, and it says so {i} times." for i in range(60))
    (tmp_path / "text.txt").write_text(text)
    rows = [
        dict(ind=i, activity_label="a", ctx=f"The number {i}", endings=list("abcd"), label=i % 4)
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        checkpoint=str(tmp_path / "run"),
        out_dir=str(tmp_path / "pruned"),
        data=str(tmp_path / "text.txt"),
        hella_data=str(tmp_path / "rows.jsonl"),
        n_sequences=8,
        val_tokens=64,
        device="cpu",
    )


def test_the_script_writes_an_ordinary_checkpoint(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    main(cfg)
    printed = capsys.readouterr().out
    assert "wanda 50%" in printed and "h.1.mlp.c_proj  50.0% zeros" in printed
    report = json.loads((Path(cfg.out_dir) / "report.json").read_text())
    assert report["before"]["sparsity"] == 0 and report["after"]["sparsity"] == 0.5
    zeros = 2 * 12 * 16 * 16 // 2
    assert report["before"]["parameters_left"] - report["after"]["parameters_left"] == zeros
    assert {"loss", "perplexity", "hella", "hella_norm", "by_matrix"} <= report["after"].keys()
    raw, tokenizer = load_model(cfg.out_dir, "")
    assert tokenizer.name == "bytes" and len(zero_masks(raw)) == 8
    state = open_checkpoint(cfg.out_dir)
    assert state["stage"] == "pretraining" and state["step"] == 7


def test_pruning_again_keeps_the_zeros(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    main(cfg)
    again = replace(cfg, checkpoint=cfg.out_dir, out_dir=cfg.out_dir + "2", ratio=0.25)
    main(again)
    assert "already pruned: 50.0%" in capsys.readouterr().out
    assert json.loads((Path(again.out_dir) / "report.json").read_text())["after"]["sparsity"] == 0.5


def run(*args: str) -> subprocess.CompletedProcess:
    """Run a script of the repository."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_training_goes_on_from_a_pruned_checkpoint_with_its_zeros(cfg: Config, tmp_path: Path) -> None:
    import train_gpt2

    main(cfg)
    # the sizes of the table do not fit the tiny model, so one of its own
    train_gpt2.SIZES["tiny"] = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    try:
        settings = dict(
            model="tiny", T=32, total_batch_size=64, tokenizer="bytes", data=cfg.data, max_steps=3
        )
        settings |= dict(eval_every=3, val_tokens=64, n_samples=0, hella_every=0, plot=False, device="cpu")
        recovery = train_gpt2.Config(out_dir=str(tmp_path / "out"), init_from=cfg.out_dir, **settings)
        train_gpt2.main(recovery)
        pruned, trained = (open_checkpoint(folder)["model"] for folder in (cfg.out_dir, tmp_path / "out"))
        for name, mask in zero_masks(load_model(cfg.out_dir, "")[0]).items():
            assert torch.equal(trained[name] != 0, mask) and not torch.equal(trained[name], pruned[name])
        train_gpt2.main(replace(recovery, max_steps=5))  # continued: the zeros are still kept
        assert torch.equal(open_checkpoint(tmp_path / "out")["model"][name] != 0, mask)
        dense = replace(recovery, out_dir=str(tmp_path / "dense"), keep_masks=False)
        train_gpt2.main(dense)
        assert (open_checkpoint(tmp_path / "dense")["model"][name] != 0).all()
        with pytest.raises(SystemExit, match="another shape"):
            train_gpt2.main(replace(recovery, model="demo", out_dir=str(tmp_path / "other")))
    finally:
        del train_gpt2.SIZES["tiny"]


def test_an_adapter_is_pruned_with_its_base(cfg: Config, tmp_path: Path) -> None:
    raw, _ = load_model(cfg.checkpoint, "")
    add_lora(raw, 2, 4.0)
    save_adapter(tmp_path / "adapter", raw, cfg.checkpoint)
    main(replace(cfg, checkpoint=str(tmp_path / "adapter")))
    assert len(zero_masks(load_model(cfg.out_dir, "")[0])) == 8


def test_other_checkpoints_are_not_hidden_or_hiding(cfg: Config) -> None:
    main(cfg)
    main(replace(cfg, ratio=0.25))  # the same one again is replaced
    log = Path(cfg.out_dir) / "log.txt"
    log.write_text("# of a run that is at the same step\n")
    with pytest.raises(SystemExit, match="holds a run of its own"):
        main(cfg)
    log.unlink()
    (Path(cfg.out_dir) / "ckpt_000099.pt").write_bytes(b"of another run")
    with pytest.raises(SystemExit, match="ckpt_000099.pt"):
        main(cfg)


def test_training_goes_on_with_an_unpadded_vocabulary(cfg: Config, tmp_path: Path) -> None:
    import train_gpt2

    raw = make_model(TINY | dict(vocab_size=257))  # as OpenAI's: 50257 and not 50304
    to_hf(raw, tmp_path / "hf")
    main(replace(cfg, hf=str(tmp_path / "hf")))
    train_gpt2.SIZES["tiny"] = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    try:
        settings = dict(
            model="tiny", T=32, total_batch_size=64, tokenizer="bytes", data=cfg.data, max_steps=2
        )
        settings |= dict(eval_every=3, val_tokens=64, n_samples=0, hella_every=0, plot=False, device="cpu")
        recovery = train_gpt2.Config(out_dir=str(tmp_path / "out"), init_from=cfg.out_dir, **settings)
        train_gpt2.main(recovery)
        train_gpt2.main(replace(recovery, max_steps=3))  # and resumes
        assert open_checkpoint(tmp_path / "out")["model_config"]["vocab_size"] == 257
        with pytest.raises(SystemExit, match="step 3 already"):
            train_gpt2.main(replace(recovery, max_steps=1))
    finally:
        del train_gpt2.SIZES["tiny"]


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(ratio=1.0), "ratio=1.0"),
        (dict(ratio=-0.1), "ratio=-0.1"),
        (dict(ratio=float("nan")), "ratio=nan"),
        (dict(pattern="2:5"), "does not divide the 16 inputs"),
        (dict(pattern="4:4"), "expected N:M"),
        (dict(pattern="half"), "expected N:M"),
        (dict(n_sequences=10_000), "n_sequences=10000"),
        (dict(n_sequences=0), "n_sequences=0"),
        (dict(T=33), "block_size=32"),
        (dict(T=0), "T=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(data="nowhere"), "nowhere"),
        (dict(sparse_kernels=True), "--pattern=2:4"),
        (dict(sparse_kernels=True, pattern="2:4"), "CUDA"),
    ],
    ids=str,
)
def test_bad_input(cfg: Config, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(replace(cfg, **changed))
    assert not Path(cfg.out_dir).exists()


def test_the_folder_it_comes_from_is_not_overwritten(cfg: Config) -> None:
    with pytest.raises(SystemExit, match="another --out_dir"):
        main(replace(cfg, out_dir=cfg.checkpoint))


@pytest.mark.gpu
def test_sparse_kernels_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = dict(n_layer=2, n_head=4, n_embd=256, block_size=128, n_tokens=257, vocab_size=320)
    raw = make_model(shape).to("cuda")
    idx = torch.randint(257, (4, 128), device="cuda")
    prune(raw, idx, Config(pattern="2:4"), autocast("bf16", torch.device("cuda")))
    assert pruning.time_sparse_kernels(raw, idx)["sparse_ms"] > 0
