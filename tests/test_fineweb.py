"""fineweb.py: the bytes it writes against a plain reference, whatever is done to it meanwhile."""

import functools
import glob
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
import fineweb
from fineweb import Config, main

ROOT = Path(__file__).parent.parent
EOT = 256  # of the tokenizer "bytes"
RUN = (
    "import multiprocessing, sys, fineweb; multiprocessing.set_start_method(sys.argv[1]); "
    "fineweb.main(fineweb.Config(**eval(sys.argv[2])))"
)


def make_documents(n: int, seed: int = 0) -> list[str | None]:
    """Documents of very different lengths, some of them empty or missing, some with awkward text."""
    rng = random.Random(seed)
    documents: list[str | None] = []
    for i in range(n):
        text = "".join(rng.choices("abc déf→\n😀", k=int(rng.paretovariate(0.7) * 20) % 5000))
        documents.append(rng.choice([text] * 20 + ["", None, " \n", f"<|endoftext|>{i}", "\x00"]))
    return documents


def write_parquet(path: Path, documents: list[str | None], row_group_size: int = 70) -> None:
    table = pa.table({"id": pa.array(range(len(documents))), "text": pa.array(documents, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)


def is_text(document: str | None) -> bool:
    return bool(document and document.strip())


def expected_tokens(documents: list[str | None]) -> np.ndarray:
    """End-of-text and UTF-8 bytes of every document, end to end: what "bytes" means, without tiktoken."""
    ids = [[EOT, *document.encode()] for document in documents if is_text(document)]
    return np.array([i for row in ids for i in row], dtype=np.uint16)


def cut(tokens: np.ndarray, shard_size: int) -> dict[str, np.ndarray]:
    """The shards that tokens should give, by file name."""
    if len(tokens) <= shard_size:
        n = max(1, len(tokens) // 10)
        parts = [tokens[:n], tokens[n:]]
    else:
        parts = [tokens[i : i + shard_size] for i in range(0, len(tokens), shard_size)]
    return {f"{'train' if i else 'val'}_{i:06d}.npy": part for i, part in enumerate(parts)}


def check_folder(folder: Path, documents: list[str | None], shard_size: int, max_tokens: int = 0) -> dict:
    """Compare a folder's shards and manifest with the reference; return the manifest."""
    tokens = expected_tokens(documents)[: max_tokens or None]
    shards = cut(tokens, shard_size)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*shards, "manifest.json"])
    for name, ids in shards.items():
        found = np.load(folder / name)
        assert found.dtype == np.uint16 and np.array_equal(found, ids), name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["tokenizer"] == "bytes" and manifest["n_tokens"] == len(tokens)
    assert manifest["shards"] == [
        {"file": name, "n_tokens": len(ids), "crc32": zlib.crc32(ids.tobytes())}
        for name, ids in shards.items()
    ]
    read = documents  # up to the one that the last token is of
    if 0 < max_tokens < len(expected_tokens(documents)):
        ends = np.cumsum([len(expected_tokens([document])) for document in documents])
        read = documents[: int(np.argmax(ends >= max_tokens)) + 1]
    assert manifest["n_documents"] == sum(map(is_text, read))
    assert manifest["n_skipped"] == len(read) - manifest["n_documents"]
    data.check_shards(folder, 257)
    (folder / "checked.json").unlink()
    return manifest


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config(source: Path | str, out: Path, **constants: object) -> Config:
    return Config(
        **{"data": str(source), "out_dir": str(out), "tokenizer": "bytes", "workers": 2} | constants
    )


def start(cfg: Config, method: str = "fork", **kwargs: object) -> subprocess.Popen:
    """Run main(cfg) in a process group of its own, which hears Ctrl-C even if this one does not."""
    command = [sys.executable, "-c", RUN, method, repr(vars(cfg))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, start_new_session=True, **{"preexec_fn": hear} | pipes | kwargs)


def wait_for(condition: object, process: subprocess.Popen, seconds: float = 30) -> None:
    """Wait until condition() or until the process ends."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several tasks of a small file."""
    monkeypatch.setattr(fineweb, "CHUNK_BYTES", 20_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three parquet files in a folder, and the documents in them."""
    folder = tmp_path_factory.mktemp("source")
    documents = make_documents(1200)
    write_parquet(folder / "part-0.parquet", documents[:500])
    write_parquet(folder / "part-1.parquet", documents[500:700])
    write_parquet(folder / "part-2.parquet", documents[700:])
    (folder / "notes.txt").write_text("not a source")
    return SimpleNamespace(folder=folder, documents=documents, parts=[documents[:500], documents[500:700]])


@pytest.mark.parametrize("shard_size", [4999, 40_000, 10**7])
def test_bytes_equal_reference(source: SimpleNamespace, tmp_path: Path, shard_size: int) -> None:
    main(config(source.folder, tmp_path / "out", shard_size=shard_size))
    manifest = check_folder(tmp_path / "out", source.documents, shard_size)
    sizes = [{"name": p.name, "size": p.stat().st_size} for p in sorted(source.folder.glob("*.parquet"))]
    assert manifest["source"]["files"] == sizes
    assert str(tmp_path) not in json.dumps(manifest) and str(source.folder.parent) not in json.dumps(manifest)


def test_file_and_pattern(source: SimpleNamespace, tmp_path: Path) -> None:
    main(config(source.folder / "part-0.parquet", tmp_path / "file", shard_size=10_000))
    check_folder(tmp_path / "file", source.parts[0], 10_000)
    main(config(source.folder / "part-[01].*", tmp_path / "pattern", shard_size=10_000))
    check_folder(tmp_path / "pattern", source.documents[:700], 10_000)


def test_jsonl(tmp_path: Path) -> None:
    documents = make_documents(400, seed=1)
    odd = [
        "",
        "not json",
        '{"content": "x"}',
        "[1]",
        "7",
        '{"text": 3}',
        '{"text": ["a"]}',
        '{"text": "a',
        "\\",
    ]
    lines = [json.dumps({"text": document}, ensure_ascii=i % 2 == 0) for i, document in enumerate(documents)]
    lines[100:100] = odd
    raw = "\n".join(lines).encode() + b'\n{"text": "bad \xff utf-8"}\n{"text": "the last, without a newline"}'
    (tmp_path / "a.jsonl").write_bytes(raw)
    main(config(tmp_path / "a.jsonl", tmp_path / "out", shard_size=3000))
    expected = [*documents, *[None] * (len(odd) + 1), "the last, without a newline"]
    check_folder(tmp_path / "out", expected, 3000)


def test_invalid_utf8_in_parquet_is_skipped(tmp_path: Path) -> None:
    values = pa.array([b"good", b"bad \xff", b"fine"], pa.binary())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    main(config(tmp_path / "a.parquet", tmp_path / "out"))
    check_folder(tmp_path / "out", ["good", None, "fine"], 10**8)


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_source_gives_both_parts(tmp_path: Path, n: int) -> None:
    write_parquet(tmp_path / "a.parquet", ["hello"] * n)
    main(config(tmp_path / "a.parquet", tmp_path / "out"))
    manifest = check_folder(tmp_path / "out", ["hello"] * n, 10**8)
    assert [shard["n_tokens"] for shard in manifest["shards"]] == [1, 6 * n - 1]


@pytest.mark.parametrize("n", [59, 60, 61, 120])
def test_sources_about_one_or_two_shards_long(tmp_path: Path, n: int, capfd: pytest.CaptureFixture) -> None:
    write_parquet(tmp_path / "a.parquet", ["x" * (n - 1)])
    main(config(tmp_path / "a.parquet", tmp_path / "out", shard_size=60))
    check_folder(tmp_path / "out", ["x" * (n - 1)], 60)
    assert ("partial on purpose" in capfd.readouterr().out) == (n != 120)


@pytest.mark.parametrize("max_tokens", [2, 500, 3000, 3001, 8_000, 10**9])
def test_max_tokens(source: SimpleNamespace, tmp_path: Path, max_tokens: int) -> None:
    main(config(source.folder, tmp_path / "out", shard_size=3000, max_tokens=max_tokens))
    check_folder(tmp_path / "out", source.documents, 3000, max_tokens)


def test_reading_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However much there is to read, only a few chunks are read ahead of what has been written."""
    n_read = n_done = most = 0

    def endless() -> object:
        nonlocal n_read, most
        for n_read in range(1, 200):
            most = max(most, n_read - n_done)
            yield fineweb.Chunk(0, n_read, [b"x"], False, 10, 0.5)

    pool = fineweb.start_workers(2, "bytes")
    for _ in fineweb.tokenize_all(endless(), pool, 2, "bytes", "tiktoken"):
        n_done += 1
    assert n_done == 199 and most <= 10
    monkeypatch.setattr(fineweb, "IN_FLIGHT_BYTES", 30)
    n_read = n_done = most = 0
    for _ in fineweb.tokenize_all(endless(), pool, 2, "bytes", "tiktoken"):
        n_done += 1
    pool.shutdown()
    assert n_done == 199 and most <= 5


# -----------------------------------------------------------------------------
# Stopped and continued


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A source that takes a while, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("large")
    documents = make_documents(9000, seed=2)
    write_parquet(folder / "a.parquet", documents[:3000])
    write_parquet(folder / "b.parquet", documents[3000:6000], row_group_size=10**6)
    lines = [json.dumps({"text": document}) for document in documents[6000:]]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    main(config(folder, folder / "out", shard_size=8_000))
    check_folder(folder / "out", documents, 8_000)
    return SimpleNamespace(folder=folder, files=files_of(folder / "out"))


def test_killed_and_continued(large: SimpleNamespace, tmp_path: Path) -> None:
    rng = random.Random(0)
    out, n_kills = tmp_path / "out", 0
    for attempt in range(6):
        process = start(config(large.folder, out, shard_size=8_000, workers=1 + attempt % 3))
        n_shards = len(list(out.glob("*.npy"))) + rng.randrange(1, 8)
        wait_for(lambda n=n_shards: len(list(out.glob("*.npy*"))) >= n, process)
        time.sleep(rng.random() * 0.02)
        process.kill()  # the main process only: the workers must notice and end, else communicate() hangs
        process.communicate(timeout=20)
        if process.returncode == 0:
            break
        n_kills += 1
    assert n_kills >= 2
    main(config(large.folder, out, shard_size=8_000, workers=2))
    assert files_of(out) == large.files


def test_continues_from_every_shard(source: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    """Stop after each shard in turn, in the same process, so that every position is tried."""
    main(config(source.folder, tmp_path / "whole", shard_size=5000, max_tokens=48_000))
    write_manifest, out = fineweb.write_manifest, tmp_path / "out"
    n_stops = 0

    def write_and_stop(folder: Path, manifest: dict) -> None:
        write_manifest(folder, manifest)
        if manifest["shards"] and not manifest["complete"] and len(manifest["shards"]) > n_stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(fineweb, "write_manifest", write_and_stop)
    while not (out / "manifest.json").exists() or not data.read_manifest(out)["complete"]:
        try:
            main(config(source.folder, out, shard_size=5000, max_tokens=48_000))
        except SystemExit as error:
            assert "the same command continues" in str(error)
            n_stops += 1
    assert n_stops == 9
    assert files_of(out) == files_of(tmp_path / "whole")


def test_ctrl_c(large: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(config(large.folder, out, shard_size=8_000))
    wait_for(lambda: len(list(out.glob("*.npy"))) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("stopped after")
    main(config(large.folder, out, shard_size=8_000))
    assert files_of(out) == large.files


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_start_methods_and_no_torch_in_workers(source: SimpleNamespace, tmp_path: Path, method: str) -> None:
    code = RUN + (
        "; pool = fineweb.start_workers(1, 'bytes')"
        "; loaded = pool.submit(eval, 'set(__import__(\"sys\").modules)').result()"
        "; print('fineweb' in loaded, 'torch' in loaded)"
    )
    arguments = [method, repr(vars(config(source.folder, tmp_path / "out", shard_size=10_000)))]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "True False"
    check_folder(tmp_path / "out", source.documents, 10_000)


def test_complete_does_nothing(source: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    cfg = config(source.folder, tmp_path, shard_size=10_000)
    main(cfg)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capfd.readouterr()
    main(cfg)
    assert "is complete" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_leftovers_are_removed(source: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "train_000999.npy.tmp").write_text("half of it")
    main(config(source.folder, tmp_path, shard_size=10_000))
    check_folder(tmp_path, source.documents, 10_000)


# -----------------------------------------------------------------------------
# Mistakes: one line that names the thing, and nothing lost


def refused(cfg: Config, *parts: str) -> None:
    """main(cfg) must end with one line that has all these parts in it."""
    with pytest.raises(SystemExit) as error:
        main(cfg)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_other_settings(source: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(config(source.folder, out, shard_size=10_000))
    before = files_of(out)
    refused(config(source.folder, out, shard_size=20_000), str(out), "10000", "20000", "--out_dir")
    refused(config(source.folder, out, shard_size=10_000, max_tokens=5), "max_tokens = 0", "5")
    refused(config(source.folder / "part-0.parquet", out, shard_size=10_000), "part-1.parquet", "--out_dir")
    hub = "hf://datasets/o/n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "find_on_hub", lambda url: ("abc", [{"name": "x.parquet", "size": 1}]))
        refused(config(hub, out, shard_size=10_000), hub, "--out_dir")
    (out / "train_000002.npy").unlink()
    refused(config(source.folder, out, shard_size=10_000), "train_000002.npy")
    (out / "manifest.json").unlink()
    refused(config(source.folder, out, shard_size=10_000), "without a manifest.json")
    del before["train_000002.npy"], before["manifest.json"]
    assert files_of(out) == before


def test_bad_sources(source: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good, bad = tmp_path / "in" / "a.parquet", tmp_path / "in" / "b.parquet"
    good.parent.mkdir()
    write_parquet(good, ["hello"])
    for pattern in (tmp_path / "nothing", tmp_path / "*.parquet", source.folder / "notes.txt"):
        refused(config(pattern, out), str(pattern), "no .parquet or .jsonl")
    bad.write_bytes(good.read_bytes()[:-5])
    refused(config(good.parent, out), str(bad), "cannot read")
    bad.write_bytes(b"")
    refused(config(good.parent, out), str(bad), "cannot read")
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), bad)
    refused(config(good.parent, out), str(bad), "no column `text`", "content, id")
    pq.write_table(pa.table({"text": [1, 2]}), bad)
    refused(config(good.parent, out), str(bad), "int64")
    assert not out.exists()  # all that is found before any work


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    documents = make_documents(3000, seed=3)
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    write_parquet(path, documents)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 2000 + whole[len(whole) // 2 + 2000 :])
    refused(config(path, out, shard_size=10_000), str(path), "cannot read")
    assert len(list(out.glob("*.npy"))) > 1
    path.write_bytes(whole)
    main(config(path, out, shard_size=10_000))
    check_folder(out, documents, 10_000)


def test_nothing_but_empty_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["", None, "  "])
    refused(config(tmp_path / "a.parquet", tmp_path / "out"), "a.parquet", "3 documents")
    write_parquet(tmp_path / "a.parquet", ["", "text"])  # another source, but nothing was written yet
    main(config(tmp_path / "a.parquet", tmp_path / "out"))
    check_folder(tmp_path / "out", ["", "text"], 10**8)


@pytest.mark.parametrize(
    "constants",
    [{"shard_size": 1}, {"max_tokens": -1}, {"max_tokens": 1}, {"workers": -1}, {"tokenizer": "gpt5"}],
)
def test_bad_constants(source: SimpleNamespace, tmp_path: Path, constants: dict) -> None:
    refused(config(source.folder, tmp_path / "out", **constants), str(*constants.values()))
    (tmp_path / "file").write_text("")
    refused(config(source.folder, tmp_path / "file"), str(tmp_path / "file"))


def test_disk_full(source: SimpleNamespace, tmp_path: Path) -> None:
    """The disk is checked first; a write that fails all the same leaves no part of a file."""
    usage = SimpleNamespace(free=10_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(config(source.folder, tmp_path / "none"), str(tmp_path / "none"), "free")
    out = tmp_path / "out"
    limit = (8_000, 8_000)  # bytes in a file
    process = start(
        config(source.folder, out, shard_size=20_000),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith(f"cannot write {out / 'val_000000.npy'}")
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    main(config(source.folder, out, shard_size=20_000))
    check_folder(out, source.documents, 20_000)


def die(*args: object) -> None:
    os._exit(1)


def test_dead_worker(source: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb, "tokenize", die)
    refused(config(source.folder, tmp_path / "out"), "worker died", "the same command")


# -----------------------------------------------------------------------------
# The hub


class Hub:
    """A hub of files in a folder; downloads are noted and fail on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[str] = []
        self.broken: set[str] = set()
        self.revision = "c0ffee"

    def dataset_info(self, repo: str) -> SimpleNamespace:
        assert repo == "owner/name"
        return SimpleNamespace(sha=self.revision)

    def list_repo_tree(
        self, repo: str, path: str, *, recursive: bool, revision: str, repo_type: str
    ) -> object:
        assert (repo, path, recursive, revision, repo_type) == (
            "owner/name",
            "sample/1BT",
            True,
            "c0ffee",
            "dataset",
        )
        for file in sorted(self.folder.iterdir(), reverse=True):
            yield SimpleNamespace(path=f"sample/1BT/{file.name}", size=file.stat().st_size)
        yield SimpleNamespace(path="sample/1BT/folder")

    def download(self, repo: str, name: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        assert (repo, repo_type, revision) == ("owner/name", "dataset", "c0ffee")
        if name in self.broken:
            raise OSError("429 Client Error: Too Many Requests\nfor url: …")
        self.downloads.append(name)
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held = glob.glob(str(Path(local_dir) / "**" / "*.parquet"), recursive=True)
        assert len(held) <= 1  # at most one other file is on disk
        shutil.copy(self.folder / Path(name).name, path)
        return str(path)


@pytest.fixture
def hub(source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(source.folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


URL = "hf://datasets/owner/name/sample/1BT"


def test_hub(source: SimpleNamespace, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    main(config(URL, tmp_path / "out", shard_size=10_000))
    manifest = check_folder(tmp_path / "out", source.documents, 10_000)  # and no downloads are left
    assert hub.downloads == [f"sample/1BT/part-{i}.parquet" for i in range(3)]
    assert manifest["source"]["data"] == URL and manifest["source"]["revision"] == "c0ffee"
    hub.dataset_info = hub.list_repo_tree = None  # complete: the hub is not asked
    main(config(URL, tmp_path / "out", shard_size=10_000))
    assert "is complete" in capfd.readouterr().out


def test_hub_fails_and_continues(
    source: SimpleNamespace, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fineweb, "IN_FLIGHT_BYTES", 1)  # else all is in flight, and done again, when it fails
    out = tmp_path / "out"
    hub.broken = {"sample/1BT/part-2.parquet"}
    refused(config(URL, out, shard_size=4000), "part-2.parquet", "429", "run the same command again")
    assert len(list(out.glob("*.npy"))) > 5
    hub.broken, hub.downloads, hub.revision = set(), [], "beef"  # the dataset has changed: not our business
    main(config(URL, out, shard_size=4000))
    check_folder(out, source.documents, 4000)
    assert (
        "sample/1BT/part-0.parquet" not in hub.downloads and hub.downloads[-1] == "sample/1BT/part-2.parquet"
    )


def test_hub_mistakes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(config("hf://datasets/owner", tmp_path / "out"), "names no dataset", "OWNER/NAME/FOLDER")
    monkeypatch.setattr(hub, "list_repo_tree", lambda *args, **kwargs: [])
    refused(config(URL, tmp_path / "out"), URL, "no .parquet")

    def offline(repo: str) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "dataset_info", offline)
    refused(config(URL, tmp_path / "out"), URL, "ConnectionError", "Name or service not known")
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------


def test_gpt2(source: SimpleNamespace, tmp_path: Path) -> None:
    try:
        tokenizer = data.get_tokenizer("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    main(config(source.folder, tmp_path, tokenizer="gpt2", shard_size=10_000))
    texts = [document for document in source.documents if is_text(document)]
    expected = [i for text in texts for i in [50256, *tokenizer.encode_ordinary(text)]]
    found = np.concatenate(
        [np.load(path) for path in sorted(tmp_path.glob("*.npy"), key=lambda p: p.name[-10:])]
    )
    assert found.tolist() == expected


def all_bytes(folder: Path) -> dict[str, bytes]:
    """A folder's shards and manifest, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def awkward_files(tmp_path: Path) -> Path:
    """A folder of jsonl and parquet with what could trip an encoder: lone surrogates, specials, blanks."""
    pytest.importorskip("gigatoken")
    try:
        data.get_tokenizer("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))
    folder = tmp_path / "in"
    folder.mkdir()
    documents = make_documents(300, seed=2)
    odd = [
        "\ud800 lone",
        "a<|endoftext|>b",
        "  \t\n",
        " " * 5000 + "x",
        "1" * 3000,
        "don't I'LL we've",
        "\u3000é\u0301",
    ]
    lines = [json.dumps({"text": document}) for document in [*odd, *documents]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": ""}) for _ in range(20)))  # nothing kept
    write_parquet(folder / "c.parquet", make_documents(500, seed=3))
    return folder


def test_gigatoken_gives_the_same_bytes(
    awkward_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for encoder in ("tiktoken", "gigatoken"):
        main(config(awkward_files, tmp_path / encoder, tokenizer="gpt2", shard_size=10_000, encoder=encoder))
    assert "encoding with gigatoken" in "".join(capsys.readouterr())
    assert all_bytes(tmp_path / "gigatoken") == all_bytes(tmp_path / "tiktoken")


@pytest.mark.parametrize("how", ["other ids", "other lengths", "an error"])
def test_gigatoken_that_differs_is_not_used(
    awkward_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    how: str,
) -> None:
    encode = fineweb.gigatoken_encoder()

    def wrong(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = encode(texts)
        if how == "an error":
            raise RuntimeError("of another version")
        if how == "other ids":
            return np.where(ids == ids[-1], ids - 1, ids), lengths
        return ids, np.roll(lengths, 1)

    monkeypatch.setattr(fineweb, "gigatoken_encoder", lambda: wrong)
    main(config(awkward_files, tmp_path / "out", tokenizer="gpt2", shard_size=10_000))
    assert "going on with tiktoken" in "".join(capsys.readouterr())
    main(config(awkward_files, tmp_path / "ref", tokenizer="gpt2", shard_size=10_000, encoder="tiktoken"))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "ref")


def test_gigatoken_that_is_not_installed(
    source: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fineweb, "find_gigatoken", lambda: False)
    refused(config(source.folder, tmp_path / "out", encoder="gigatoken"), "pip install gigatoken")
    main(config(source.folder, tmp_path / "out", shard_size=10_000))
    check_folder(tmp_path / "out", source.documents, 10_000)


def test_command_line(source: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    options = [f"--data={source.folder}/*.parquet", f"--out-dir={tmp_path / 'out'}", "--tokenizer=bytes"]
    command = [sys.executable, "fineweb.py", *options, "--shard_size=10000", "--workers=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"train_gpt2.py --data={tmp_path / 'out'}" in done.stdout
    check_folder(tmp_path / "out", source.documents, 10_000)
