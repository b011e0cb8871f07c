"""Checkpoints that are written, damaged, foreign and resumed, and models from every kind of source."""

import os
import random
import resource
import shutil
import threading
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import bits, tiny_model, write_model

from neogpt import checkpoint, hf, runtime
from neogpt.checkpoint import Checkpoint


def make_checkpoint(step: int, n: int = 5000) -> Checkpoint:
    """A small checkpoint with every kind of value."""
    rng = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(n, generator=rng), "b": torch.randn(7, generator=rng).double()}
    weights["tied"] = weights["w"].detach()  # another tensor of the same memory, as in a state dict
    moments = [{0: dict(step=torch.tensor(3.0), exp_avg=torch.randn(n, generator=rng))}]
    config = dict(B=None, max_lr=6e-4, names=["a", "b"], on=True)
    settings = dict(config=config, optimizers=moments, adapters={"a": torch.ones(2)}, scores=dict(val=-float("inf")))
    return Checkpoint("sft", step, weights, dict(n_layer=2, attention="flash"), "bytes", **settings, base="x", B=8)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return bits(vars(a)) == bits(vars(b))


def save(folder: Path, *steps: int, keep_last: int = 100) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for step in steps:
        checkpoint.save(folder, make_checkpoint(step), keep_last)
    return [folder / f"ckpt_{step:06d}.pt" for step in steps]


def test_checkpoint_written_in_the_background_is_of_its_moment(tmp_path: Path) -> None:
    ckpt, release = make_checkpoint(500), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait)
        writing = checkpoint.save_async(pool, tmp_path, ckpt, keep_last=1, best=True)
        for tensor in (ckpt.model["w"], ckpt.model["b"], ckpt.optimizers[0][0]["exp_avg"]):
            tensor.add_(1)  # the steps that follow
        assert not checkpoint.list_checkpoints(tmp_path)
        release.set()
        writing.result()
        with pytest.raises(OSError, match="ckpt_000500.pt"):
            checkpoint.save_async(pool, tmp_path / "missing", ckpt, keep_last=1, best=False).result()
    for found in (checkpoint.read_newest(tmp_path), checkpoint.read(tmp_path / "ckpt_000500.pt", verify=False)):
        assert same(found, make_checkpoint(500))
        assert found.model["tied"].data_ptr() == found.model["w"].data_ptr()  # tied weights are stored once
    assert same(checkpoint.read(tmp_path / "best.pt"), replace(make_checkpoint(500), optimizers=None, adapters={}))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "ckpt_000500.pt"]


def test_the_highest_steps_are_kept(tmp_path: Path) -> None:
    others = ["best.pt", "ckpt_best.pt", "ckpt_000001.pt.tmp", "ckpt_000002.pt.bak", "log.txt", "my_ckpt_000003.pt"]
    for name in others:
        (tmp_path / name).write_text("not a checkpoint of a step")
    save(tmp_path, 9000, 12000, 999_999)
    save(tmp_path, 1_000_000, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == sorted(["ckpt_1000000.pt", "ckpt_999999.pt", *others])
    assert checkpoint.read_newest(tmp_path).step == 1_000_000
    (tmp_path / "ckpt_1000000.pt").write_bytes(b"half")
    assert checkpoint.read_newest(tmp_path).step == 999_999
    save(tmp_path, 999_999, keep_last=1)  # a resumed run does not count the unreadable file of a later step
    assert sorted(os.listdir(tmp_path)) == sorted(["ckpt_1000000.pt", "ckpt_999999.pt", *others])


@pytest.mark.parametrize("limit", [100, 300_000, 800_500], ids=["at once", "in a tensor", "at the end"])
def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1, 2)
    ckpt = make_checkpoint(3, 100_000)  # two tensors of 400 kB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OSError, match="ckpt_000003.pt"):
            checkpoint.save(tmp_path, ckpt, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["ckpt_000001.pt", "ckpt_000002.pt"]
    assert same(checkpoint.read_newest(tmp_path), make_checkpoint(2))


def test_required_space_counts_existing_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, n_bytes in ((1, 70), (2, 50), (3, 40)):
        (tmp_path / f"ckpt_{step:06d}.pt").write_bytes(bytes(n_bytes))
    (tmp_path / "best.pt").write_bytes(bytes(30))
    needed = 3 * 120 - 50 - 40 + 45 - 30  # two checkpoints and best.pt are replaced, and one is being written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(needed))
    checkpoint.require_space(tmp_path, 120, keep_last=2, n_bytes_best=45)
    with pytest.raises(OSError, match="--keep_last=2"):
        checkpoint.require_space(tmp_path, 120, keep_last=2, n_bytes_best=46)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


def flip_tensor_bit(path: Path) -> None:
    content, weights = path.read_bytes(), make_checkpoint(int(path.stem[5:])).model["w"].numpy().tobytes()
    path.write_bytes(flip(content, content.index(weights) + len(weights) // 2))


def test_damaged_checkpoint_falls_back(tmp_path: Path, printed: pytest.LogCaptureFixture) -> None:
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    flip_tensor_bit(paths[4])
    for path, part in zip(paths[1:4], (0, 0.5, 0.9999)):  # empty, half, without the last bytes
        os.truncate(path, int(part * path.stat().st_size))
    assert same(checkpoint.read_newest(tmp_path), make_checkpoint(1))
    assert all(str(path) in line for path, line in zip(paths[:0:-1], printed.messages, strict=True))
    with pytest.raises(ValueError, match="ckpt_000005.pt"):
        checkpoint.read_newest(paths[4])  # given by name: no other is used
    flip_tensor_bit(paths[0])
    with pytest.raises(ValueError, match="ckpt_000001.pt"):
        checkpoint.read_newest(tmp_path)


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(150):
        path.write_bytes(flip(good, rng.randrange(len(good))))
        try:
            assert same(checkpoint.read(path), make_checkpoint(1))
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("is_zip", [True, False])
def test_objects_are_refused_and_not_run(tmp_path: Path, is_zip: bool) -> None:
    created, path = tmp_path / "created", tmp_path / "ckpt_000009.pt"
    creates = type("Creates", (), {"__reduce__": lambda self: (os.mkdir, (str(created),))})  # a stand-in for worse
    state = vars(make_checkpoint(9)) | {"scores": creates()}
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)  # not: a pickle, as of old versions
    with pytest.raises(ValueError, match="ckpt_000009.pt"):
        checkpoint.read_newest(tmp_path)
    assert not created.exists()
    torch.load(path, weights_only=False)
    assert created.exists()  # unpickling it does run its function


WRONG = [dict(step=-1), dict(step=2.0), dict(step=2**63), dict(stage="x"), dict(model=[]), dict(model={"w": 3})]
WRONG += [dict(model={5: torch.ones(2)}), dict(optimizers={}), dict(optimizers=[{0: {"step": 3}}])]
WRONG += [dict(scores={"val": "x"}), dict(facts={"code": 3}), dict(model_config={3: 4})]


def test_foreign_files_and_values_of_another_type_or_range(tmp_path: Path) -> None:
    path = tmp_path / "ckpt_000001.pt"
    state = vars(make_checkpoint(1))
    no_format = {key: value for key, value in state.items() if key != "format"}
    foreign = [no_format, {"format": 2, "model": {}}, {"format": 1, "model": {}}, [1, 2], state | {"format": 3}]
    torch.save(state, path)
    checkpoint.read(path)
    for content in [*foreign, *(state | change for change in WRONG)]:
        torch.save(content, path)
        with pytest.raises(ValueError, match="ckpt_000001.pt"):
            checkpoint.read(path)


def test_compressed_entries_are_not_unpacked(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(10**6))
    os.replace(tmp_path / "new", path)
    with pytest.raises(ValueError, match="ckpt_000001.pt.*compressed"):
        checkpoint.read(path)


def resume_on_rank(folder: Path, rt: runtime.Runtime) -> list[Any]:
    """What `find_resume` gives a rank for a shared folder, an empty one and a branch; it refuses a folder per rank."""
    shared, empty = (checkpoint.find_resume(folder / name, rt) for name in ("shared", "empty"))
    start = str(folder / "own1" / "ckpt_000004.pt")
    branch = checkpoint.find_resume(folder / "empty", rt, start), checkpoint.find_resume(folder / "own0", rt, start)
    with harness.error("ckpt_000003.pt"):
        checkpoint.find_resume(folder / f"own{rt.rank}", rt)
    return [vars(shared), empty, [ckpt.step for ckpt in branch]]


def test_all_ranks_resume_from_the_same_checkpoint(tmp_path: Path) -> None:
    flip_tensor_bit(save(tmp_path / "shared", 7, 8)[1])  # only rank 0 verifies
    for name in ("ckpt_000011.pt.tmp", "best.pt.tmp", "notes.tmp"):  # killed while it was written; not ours
        (tmp_path / "shared" / name).write_text("half")
    save(tmp_path / "own0", 3)
    save(tmp_path / "own1", 4)
    for shared, empty, branch in harness.on_ranks(tmp_path, partial(resume_on_rank, tmp_path)):
        assert same(Checkpoint(**shared), make_checkpoint(7)) and empty is None
        assert branch == [4, 3]  # a folder's own checkpoint comes first
    assert sorted(os.listdir(tmp_path / "shared")) == ["ckpt_000007.pt", "ckpt_000008.pt", "notes.tmp"]


# some keys of format 1, in which sft.py and dpo.py stored no position and prune.py no configuration; then
# n_sequences and n_tokens after 7 steps
FORMAT_1 = [
    (dict(tokens=7 * 512, config=dict(total_batch_size=512, T=64), seconds=2.5, B=4), (7 * 8, 7 * 512)),
    (dict(stage="sft", config=dict(rows_per_step=6, T=64, hf=""), base="x"), (7 * 6, 0)),
    (dict(stage="dpo", config=dict(pairs_per_step=5, T=None), scores=dict(best=(0.01, 0.5, 12))), (7 * 5, 0)),
    (dict(stage="pretraining", pruned=dict(ratio=0.5), optimizers=None), (0, 0)),
]


@pytest.mark.parametrize("keys, position", FORMAT_1, ids=["pretraining", "sft", "dpo", "pruned"])
def test_format_1_is_upgraded(tmp_path: Path, keys: dict[str, Any], position: tuple[int, int]) -> None:
    raw, moments = tiny_model(), [{0: dict(momentum=torch.ones(2))}]
    keys = dict(stage="pretraining", step=7, tokenizer="bytes", scores=dict(val=2.0), optimizers=moments) | keys
    model_config = asdict(raw.config) | dict(mlp_width=0)  # 0 meant 4 · n_embd
    state = dict(format=1, model=raw.state_dict(), model_config=model_config)
    torch.save(keys | state, tmp_path / "ckpt_000007.pt")
    found = vars(checkpoint.read_newest(tmp_path))
    assert (found["n_sequences"], found["n_tokens"]) == position
    keys |= dict(scores=dict(best=0.01)) if keys["stage"] == "dpo" else {}  # dpo.py stored loss, margin and step
    assert {name for name in keys if bits(found.get(name)) != bits(keys[name])} <= {"tokens"}
    loaded = checkpoint.load_model(str(tmp_path)).raw
    assert loaded.config == raw.config and bits(loaded.state_dict()) == bits(raw.state_dict())


@pytest.mark.parametrize("kind", ["out_dir", "file", "hf", "hub"])  # adapters: test_lora.py
def test_load_model(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny_model(scale=0.1)
    folder = write_model(tmp_path / "run", raw, stage="dpo")
    hf.save(raw, tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / "hf" / file))
    sources = {"out_dir": folder, "file": folder / "ckpt_000007.pt", "hf": tmp_path / "hf", "hub": "owner/name"}
    loaded, idx = checkpoint.load_model(str(sources[kind])), torch.arange(20).view(2, 10)
    found, expected = (x(idx)[..., :257] for x in (loaded.raw, raw))  # Hugging Face's has no padded ids
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert loaded.tokenizer.name == "bytes" and all(p.requires_grad for p in loaded.raw.parameters())
    assert (loaded.stage, loaded.step) == ("dpo", 7) or kind not in ("out_dir", "file")


def not_loaded(source: object, *words: str, stages: tuple[str, ...] = ()) -> None:
    with harness.error(source, *words):
        checkpoint.load_model(str(source), stages)


def test_sources_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("no-such-model", "nobody/nothing", "out/nothing", tmp_path / "nothing", tmp_path, "nothing.pt"):
        not_loaded(source)
    not_loaded("out/nothing", "sft.py", stages=("sft", "dpo"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    not_loaded(tmp_path, "llama")
    folder = write_model(tmp_path / "run", tiny_model(), stage="sft")
    not_loaded(folder, "sft", "dpo", stages=("dpo",))
    loaded = checkpoint.load_model(str(write_model(folder, tiny_model().half(), "sft")), ("pretraining", "sft"))
    assert loaded.stage == "sft" and {p.dtype for p in loaded.raw.parameters()} == {torch.float32}


def test_inconsistent_checkpoints(tmp_path: Path) -> None:
    raw = tiny_model()
    ckpt = Checkpoint("sft", 7, raw.state_dict(), asdict(raw.config), "bytes")
    changes = {
        "300": dict(model_config=ckpt.model_config | dict(n_tokens=300)),  # bytes has 257
        "wte.weight": dict(model={}),
        "n_layer": dict(model_config=ckpt.model_config | dict(n_layer=10**9)),
        "n_wings": dict(model_config=ckpt.model_config | dict(n_wings=2)),
        "wpe.weight": dict(model=ckpt.model | {"transformer.wpe.weight": torch.ones(1, 1).expand(64, 16)}),
    }
    for word, change in changes.items():
        checkpoint.write(tmp_path / "ckpt_000007.pt", replace(ckpt, **change))
        not_loaded(tmp_path, word)
