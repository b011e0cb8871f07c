"""fineweb.py: the shards equal a reference, for any number of workers, shard size and interruption."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import harness
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
import neogpt.config
import train_gpt2
from fineweb import Config, main
from neogpt import data

refused = partial(harness.refused, main)
RUN = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method(sys.argv.pop(1))
runpy.run_path("fineweb.py", run_name="__main__")
"""


def make_documents(n: int, seed: int = 0) -> list[str | None]:
    """Documents of very different lengths; some are empty or missing, some have special characters."""
    rng = random.Random(seed)
    documents: list[str | None] = []
    for i in range(n):
        text = "".join(rng.choices("abc déf→\n😀", k=int(rng.paretovariate(0.7) * 20) % 5000))
        documents.append(rng.choice([text] * 20 + ["", None, " \n", f"<|endoftext|>{i}", "\x00"]))
    return documents


def write_parquet(path: Path, documents: list[str | None], row_group_size: int = 70) -> None:
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)


def write_jsonl(path: Path, documents: list[str | None]) -> None:
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))


def config(source: Path | str, out: Path, **settings: object) -> Config:
    defaults = {"data": str(source), "out_dir": str(out), "tokenizer": "bytes", "workers": 2, "shard_size": 10_000}
    return Config(**defaults | settings)


def run_and_check(cfg: Config, documents: list[str | None]) -> dict:
    """Run main(cfg), which does nothing if the folder is complete; compare with the reference; return the manifest."""
    main(cfg)
    # the tokenizer "bytes" without tiktoken
    rows = [[256, *document.encode()] if document and document.strip() else [] for document in documents]
    ends = np.cumsum([len(row) for row in rows])
    if cfg.max_tokens and cfg.max_tokens < ends[-1]:  # documents after the last token are not counted
        rows = rows[: int(np.argmax(ends >= cfg.max_tokens)) + 1]
    tokens = np.array([i for row in rows for i in row], dtype=np.uint16)[: cfg.max_tokens]
    parts = [tokens[i : i + cfg.shard_size] for i in range(0, len(tokens), cfg.shard_size)]
    if len(parts) == 1:
        parts = np.split(tokens, [max(1, len(tokens) // 10)])
    shards = {f"{'train' if i else 'val'}_{i:06d}.npy": part for i, part in enumerate(parts)}
    folder = Path(cfg.out_dir)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*shards, "manifest.json"])
    for name, ids in shards.items():
        assert np.load(folder / name).dtype == np.uint16 and np.array_equal(np.load(folder / name), ids), name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["tokenizer"] == "bytes" and manifest["n_tokens"] == len(tokens)
    assert [entry["file"] for entry in manifest["shards"]] == list(shards)
    assert manifest["n_documents"] == sum(map(bool, rows)) == len(rows) - manifest["n_skipped"]
    data.open_data(cfg.out_dir, data.get_tokenizer("bytes"))  # checks sizes and checksums
    (folder / "checked.json").unlink()
    return manifest


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb, "CHUNK_BYTES", 20_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder with a file of many row groups, a file of one row group and a jsonl file, and their documents."""
    folder = tmp_path_factory.mktemp("source")
    documents = make_documents(1200)
    write_parquet(folder / "part-0.parquet", documents[:500])
    write_parquet(folder / "part-1.parquet", documents[500:700], row_group_size=10**6)
    write_jsonl(folder / "part-2.jsonl", documents[700:])
    (folder / "notes.txt").write_text("not a source")
    return SimpleNamespace(folder=folder, documents=documents)


@pytest.mark.parametrize("pattern, n", [("", 1200), ("part-0.parquet", 500), ("part-[01].*", 700)])
@pytest.mark.parametrize("shard_size", [4999, 10**7])
def test_shards_equal_the_reference(source, tmp_path: Path, capsys, pattern: str, n: int, shard_size: int) -> None:
    manifest = run_and_check(config(source.folder / pattern, tmp_path, shard_size=shard_size), source.documents[:n])
    printed = capsys.readouterr().out
    assert ("files that are not read: notes.txt" in printed) == (pattern == "")
    following = printed.strip().splitlines()[-1].split("train_gpt2.py ")[1]
    training = neogpt.config.parse(train_gpt2.CONFIGS, "", following.split())
    assert (training.data, training.tokenizer) == (str(tmp_path), "bytes")
    sizes = [{"name": p.name, "size": p.stat().st_size} for p in sorted(source.folder.glob("part*"))]
    assert manifest["source"]["files"] == sizes[: len(manifest["source"]["files"])]
    assert str(source.folder.parent) not in json.dumps(manifest)  # the folder can be moved


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "txt", "windows.txt", "txt.gz"])
def test_formats_and_fields(kind: str, tmp_path: Path) -> None:
    documents = [text for text in make_documents(600, seed=2) if text and text.strip() and "<|" not in text]
    content = "\n".join(json.dumps({"body": text}) for text in documents)
    if kind == "json":
        content = json.dumps([{"body": text} for text in documents])
    elif "txt" in kind:
        documents = [text.strip("\n") for text in documents]
        end = "\r\n" if kind == "windows.txt" else "\n"
        content = f"{end}<|endoftext|>{end}".join(documents)
    with pa.output_stream(tmp_path / f"a.{kind}", compression="detect") as file:
        file.write(content.encode())
    run_and_check(config(tmp_path, tmp_path / "out", field="body"), documents)
    refused(config(tmp_path, tmp_path / "out"), "field=body", "text")


def test_documents_that_are_not_text_are_skipped(tmp_path: Path) -> None:
    lines = ["", "not json", '{"content": "x"}', "[1]", "7", '{"text": 3}', '{"text": ["a"]}', '{"text": "a', "\\"]
    documents = make_documents(400, seed=1)
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, *(json.dumps({"text": d}) for d in documents)]))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "bad \xff"}\n{"text": "no newline"}')
    values = pa.array([b"good", b"bad \xff", b"fine"], pa.binary())
    pq.write_table(pa.table({"text": values}), tmp_path / "c.parquet")
    expected = [*[None] * len(lines), *documents, None, "no newline", "good", None, "fine"]
    run_and_check(config(tmp_path, tmp_path / "out"), expected)


def read_ids(cfg: Config) -> list[int]:
    paths = sorted(Path(cfg.out_dir).glob("*.npy"), key=lambda path: path.name[-10:])
    return np.concatenate([np.load(path) for path in paths]).tolist()


def test_parts_together_equal_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for i, n in enumerate((150, 1, 220, 80, 90, 200, 120)):
        rows = [{"text": document} for document in make_documents(n, seed=i)]
        (tmp_path / "in" / f"{i}.json").write_text(json.dumps(rows))
    cfg = config(tmp_path / "in", tmp_path / "in" / "edu", shard_size=7000)  # the source holds the folders
    main(cfg)
    for k in (2, 3, 1):
        main(replace(cfg, part=f"{k}/3"))
    folders = [Path(f"{cfg.out_dir}-{k}-of-3") for k in (1, 2, 3)]
    manifests = [data.read_manifest(folder) for folder in folders]
    names = [[entry["name"] for entry in manifest["source"]["files"]] for manifest in manifests]
    assert names == [["0.json", "1.json"], ["2.json", "3.json"], ["4.json", "5.json", "6.json"]]
    assert sum(m["n_documents"] for m in manifests) == data.read_manifest(cfg.out_dir)["n_documents"]
    # in order the parts have the tokens, and therefore the documents, of one run, and the first its validation shard
    shards = [path for folder in folders for path in [*folder.glob("val*"), *sorted(folder.glob("train*"))]]
    assert np.concatenate([np.load(path) for path in shards]).tolist() == read_ids(cfg)
    assert [path.parent for path in shards if path.name.startswith("val")] == folders[:1]
    assert np.array_equal(np.load(shards[0]), np.load(Path(cfg.out_dir, "val_000000.npy")))
    assert len({manifest["source"]["whole"] for manifest in manifests}) == 1
    # the command that is printed trains on all parts, if all are there
    source = capsys.readouterr().out.strip().splitlines()[-1].split("--data=")[1].split()[0].strip("'")
    train, val = data.open_data(source, data.get_tokenizer("bytes"))
    assert [shard.path for shard in val + train] == shards
    shutil.rmtree(folders[1])
    (tmp_path / "in" / "7.json").write_text('[{"text": "new"}]')
    main(replace(cfg, part="2/3"))  # of other files
    with pytest.raises(ValueError, match="part 2/3"):
        data.open_data(source, data.get_tokenizer("bytes"))
    for part, words in (("0/3", "K/N"), ("4/3", "K/N"), ("1", "K/N"), ("1/", "K/N"), ("9/9", "8 ")):
        refused(replace(cfg, part=part), f"{part}", words)


@pytest.mark.parametrize("max_tokens", [2, 2999, 3000, 3001, 6000, 10**9])
def test_max_tokens(source: SimpleNamespace, tmp_path: Path, max_tokens: int) -> None:
    run_and_check(config(source.folder, tmp_path, shard_size=3000, max_tokens=max_tokens), source.documents)


def test_few_chunks_are_read_ahead(tmp_path: Path) -> None:
    read = []
    chunks = (read.append(number) or fineweb.Chunk(0, number, [b"x"], False) for number in range(200))
    with ProcessPoolExecutor(2) as pool:
        documents = fineweb.tokenize_all(chunks, config("", tmp_path), pool)
        n_ahead = [len(read) - n_done for n_done, _ in enumerate(documents)]
    assert len(n_ahead) == 200 and max(n_ahead) <= 9


def test_killed_or_interrupted_run_continues(source: SimpleNamespace, tmp_path: Path) -> None:
    """With every start method of multiprocessing."""
    rng, out = random.Random(0), tmp_path / "out"
    # in a new process group
    options = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    for attempt, method in enumerate(["fork", "spawn", "forkserver", "fork", "spawn"]):
        cfg = config(source.folder, out, shard_size=1000, workers=1 + attempt % 3)
        n = len(list(out.glob("*.npy"))) + rng.randrange(1, 10)
        command, give_up = [sys.executable, "-c", RUN, method, *harness.command_line(cfg)], time.monotonic() + 60
        process = subprocess.Popen(command, cwd=harness.ROOT, stdout=-1, stderr=-1, text=True, **options)
        while len(list(out.glob("*.npy*"))) < n:  # the last one can be unfinished
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.002)
        if attempt == 0:
            os.killpg(process.pid, signal.SIGINT)  # to the main process and the workers, as Ctrl-C in a terminal
        else:
            time.sleep(rng.random() * 0.01)
            process.kill()  # only the main process: communicate() hangs if the workers do not exit
        errors = process.communicate(timeout=20)[1]
        assert "Traceback" not in errors and (attempt or errors.splitlines()[-1] == "interrupted")
        assert process.returncode == (-signal.SIGKILL if attempt else 1)
    run_and_check(cfg, source.documents)


def test_invalid_and_other_settings_are_refused(source: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(config(source.folder, out))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "train_000002.npy"}
    refused(config(source.folder, out, shard_size=20_000), out, "shard_size", 10000, 20000, "--out_dir")
    refused(config(source.folder, out, max_tokens=5), "max_tokens", 5)
    refused(config(source.folder / "part-0.parquet", out), source.folder.name, "--out_dir")
    for name, value in (("shard_size", 1), ("max_tokens", 0), ("workers", 0), ("tokenizer", "gpt5")):
        refused(config(source.folder, out, **{name: value}), name, value)
    (out / "train_000002.npy").unlink()
    refused(config(source.folder, out), "train_000002.npy")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_unreadable_sources(source: SimpleNamespace, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "a.parquet"
    for pattern in (tmp_path / "nothing", tmp_path / "*.parquet"):
        refused(config(pattern, out), pattern, ".parquet")
    write_parquet(path, ["hello"])
    for content in (path.read_bytes()[:-5], b""):
        path.write_bytes(content)
        refused(config(path, out), path)
    for column, value, word in (("content", "a", "content"), ("text", 1, "'text'")):
        pq.write_table(pa.table({column: [value]}), path)
        refused(config(path, out), path, word, "--field")
    write_parquet(path, ["", None, "  "])
    refused(config(path, out), path.name, 3, "--field")
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 1500)
    refused(config(tmp_path / "a.jsonl", out, field="body"), "first 1,000", "'body'", "--field")
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    refused(config(tmp_path / "a.txt", out), "a.txt", "UTF-8", "--data")
    write_parquet(path, documents := make_documents(3000, seed=3))  # another source, but no shard was written yet
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 2000 + whole[len(whole) // 2 + 2000 :])
    refused(config(path, out), path)
    assert len(list(out.glob("*.npy"))) > 1
    path.write_bytes(whole)
    run_and_check(config(path, out), documents)


def test_full_disk(source: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(source.folder, tmp_path / "out")
    with monkeypatch.context() as full:
        full.setattr(np, "save", mock.Mock(side_effect=OSError(28, "No space left on device")))
        refused(cfg, f"{cfg.out_dir}/val_000000.npy")
    assert list(Path(cfg.out_dir).iterdir()) == []
    run_and_check(cfg, source.documents)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    refused(config(source.folder, tmp_path / "none"), tmp_path / "none", "GB")


def die(*args: object) -> None:
    os._exit(1)


def test_dead_worker(source: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb, "tokenize", die)
    refused(config(source.folder, tmp_path / "out"), "worker", "--workers")


URL = "hf://datasets/owner/name/sample/1BT"


@pytest.fixture
def hub(source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub of the files in a folder. Names in `broken` cannot be downloaded."""
    hub = SimpleNamespace(folder=source.folder, revision="c0ffee", downloads=[], broken=[])

    def list_repo_tree(repo: str, path: str, **options: object) -> list[SimpleNamespace]:
        assert (repo, path) == ("owner/name", "sample/1BT")
        assert options == {"recursive": True, "revision": "c0ffee", "repo_type": "dataset"}
        paths = sorted(hub.folder.iterdir(), reverse=True)
        entries = [SimpleNamespace(path=f"sample/1BT/{p.name}", size=p.stat().st_size) for p in paths]
        return [*entries, SimpleNamespace(path="sample/1BT/folder")]

    def download(repo: str, name: str, *, local_dir: Path, **options: object) -> str:
        assert repo == "owner/name" and options == {"revision": "c0ffee", "repo_type": "dataset"}
        if name in hub.broken:
            raise OSError("429 Client Error: Too Many Requests\nfor url: …")
        hub.downloads.append(name)
        (folder := (local_dir / name).parent).mkdir(parents=True, exist_ok=True)
        assert len(list(folder.iterdir())) <= 1  # at most one other file is on disk
        return str(shutil.copy(hub.folder / Path(name).name, folder))

    api = SimpleNamespace(dataset_info=lambda repo: SimpleNamespace(sha=hub.revision), list_repo_tree=list_repo_tree)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return hub


def test_failed_download_continues_at_the_same_commit(source, hub: SimpleNamespace, tmp_path: Path) -> None:
    cfg = config(URL, tmp_path / "out", shard_size=5000, workers=1)
    names = [f"sample/1BT/part-{name}" for name in ("0.parquet", "1.parquet", "2.jsonl")]
    hub.broken = names[2:]
    refused(cfg, "part-2.jsonl", "429")
    assert hub.downloads == names[:2] and len(list((tmp_path / "out").glob("*.npy"))) > 5
    hub.broken, hub.downloads, hub.revision = [], [], "beef"  # the dataset has changed
    manifest = run_and_check(cfg, source.documents)  # downloads are deleted
    assert names[0] not in hub.downloads and names[2] in hub.downloads
    assert manifest["source"]["data"] == URL and manifest["source"]["revision"] == "c0ffee"
    hub.folder, hub.revision = tmp_path / "missing", "c0ffee"
    main(cfg)  # does not ask the hub about a complete folder
    refused(config(URL, tmp_path / "new"), "owner/name", hub.folder, "--data")
    hub.folder.mkdir()
    (hub.folder / "README.txt").touch()  # only tables are read from the hub
    refused(config(URL, tmp_path / "new"), "0 files (.parquet, .jsonl) in", URL)
    for split in ("test", "train"):
        write_parquet(hub.folder / f"{split}-0.parquet", [split])
    run_and_check(config(URL, tmp_path / "train"), ["train"])


@pytest.fixture
def gpt2(tmp_path: Path) -> SimpleNamespace:
    """A configuration for texts that are difficult to encode (surrogates, special tokens, blanks), and their ids."""
    tokenizer = harness.get_tokenizer("gpt2")
    odd = ["\ud800 lone", "a<|endoftext|>b", "  \t\n", " " * 5000 + "x", "1" * 3000, "don't I'LL", "\u3000é\u0301"]
    documents, rows = [*odd, *make_documents(300, seed=2)], make_documents(500, seed=3)
    (folder := tmp_path / "in").mkdir()
    write_jsonl(folder / "a.jsonl", documents)
    write_jsonl(folder / "b.jsonl", [""] * 20)  # a file without text
    write_parquet(folder / "c.parquet", rows)
    texts = filter(str.strip, filter(None, [*documents, *rows]))
    ids = [i for text in texts for i in [50256, *tokenizer.encode_ordinary(text)]]
    return SimpleNamespace(cfg=config(folder, tmp_path / "out", tokenizer="gpt2"), ids=ids)


def test_gigatoken_ids_equal_encode_ordinary(gpt2: SimpleNamespace) -> None:
    pytest.importorskip("gigatoken")
    main(replace(gpt2.cfg, encoder="gigatoken"))
    assert read_ids(gpt2.cfg) == gpt2.ids


WRONG = {"other ids": lambda ids: ids ^ 1, "missing ids": lambda ids: ids[:-1], "an exception": lambda ids: ids.missing}


@pytest.mark.parametrize("failure", WRONG)
def test_wrong_gigatoken_is_not_used(gpt2: SimpleNamespace, tmp_path: Path, monkeypatch, failure: str) -> None:
    def get_encoder(tokenizer: str, encoder: str) -> object:
        right = correct(tokenizer, "tiktoken")
        return right if encoder == "tiktoken" else lambda text: WRONG[failure](right(text))

    correct = fineweb.get_encoder
    monkeypatch.setattr(fineweb, "get_encoder", get_encoder)
    main(gpt2.cfg)
    assert read_ids(gpt2.cfg) == gpt2.ids
    refused(replace(gpt2.cfg, encoder="gigatoken", out_dir=str(tmp_path / "none")), "--encoder=gigatoken")
