"""Tokenizers, shards on disk, text files, and the order in which windows are read."""

import io
import json
import os
import random
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import harness
import numpy as np
import pytest
import tiktoken

from neogpt import data
from neogpt.data import EOT, Shard, Windows, get_tokenizer, open_data, open_shard, permute


def tokens_of(n: int, seed: int, high: int = 256) -> np.ndarray:
    """n random ids below `high`."""
    return np.random.default_rng(seed).integers(0, high, n).astype(np.uint16)


WHOLE = data.OLD_MANIFEST | dict(tokenizer="bytes", complete=True, n_tokens=9, n_documents=2, n_skipped=0)
WHOLE |= dict(source=dict(data="x", files=[dict(name="x", size=3)]), next=dict(file=0, document=1, token=2))


def write_folder(folder: Path, shards: dict[str, np.ndarray], **manifest: object) -> Path:
    """A folder of shards; with keywords, also a correct manifest with these keys replaced."""
    folder.mkdir(exist_ok=True)
    for name, tokens in shards.items():
        np.save(folder / name, tokens)
    if manifest:
        listed = [dict(file=name, n_tokens=len(tokens), crc32=zlib.crc32(tokens)) for name, tokens in shards.items()]
        manifest = WHOLE | dict(shards=listed) | manifest
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def two_shards() -> dict[str, np.ndarray]:
    """One validation and one training shard as fineweb.py names them."""
    return {"val_000000.npy": tokens_of(100, 1), "train_000001.npy": tokens_of(300, 2)}


def contents(shard: Shard) -> np.ndarray:
    """The tokens of a shard, read without data.py."""
    if shard.tokens is not None:
        return shard.tokens
    return np.frombuffer(shard.path.read_bytes()[shard.offset :], dtype="<u2")


def check_shards(source: Path | str, n_tokens: int = 257) -> None:
    data.open_data(str(source), SimpleNamespace(name="bytes", n_vocab=n_tokens))


def refused(source: Path | str, *words: object, n_tokens: int = 257) -> None:
    with harness.error(*words):
        check_shards(source, n_tokens)


def test_ids_of_the_tokenizer_bytes_are_the_utf8_bytes() -> None:
    tokenizer = get_tokenizer("bytes")
    rng = random.Random(0)
    texts = ["", "a", "\x00\r\n\t ", "naïve — 日本語 🦊", "e\u0301", "x" * 5000, " \n" * 700, f"a{EOT}b"]
    for length in (1, 10, 1000):
        points = [rng.randrange(0x110000) for _ in range(length)]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))  # no surrogates
    for text in texts:
        ids = list(text.encode("utf-8"))
        assert tokenizer.encode_ordinary(text) == ids and tokenizer.decode(ids) == text
        document = data.encode_document(tokenizer, text)  # begins with end-of-text and contains no other
        assert document.dtype == np.uint16 and document.tolist() == [256, *ids]
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.name) == (257, 256, "bytes")
    assert tokenizer.decode([256]) == EOT
    with pytest.raises(ValueError, match="llama"):
        get_tokenizer("llama")


def test_offline_error_names_both_files_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", mock.Mock(side_effect=ConnectionError("Max retries exceeded")))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(OSError) as error:
        get_tokenizer("gpt2")
    # tiktoken's names in its cache: SHA-1 of the addresses of vocab.bpe and encoder.json
    names = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    assert all(word in str(error.value) for word in (*names, str(tmp_path)))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    with pytest.raises(OSError, match="tiktoken"):
        get_tokenizer("gpt2")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(harness.ROOT / ".cache" / "tiktoken")


def llmc(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    """An llm.c file by its specification: 256 int32, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TOKENS = tokens_of(100, 0)


def test_shards_of_build_nanogpt_llmc_and_nanogpt(tmp_path: Path) -> None:
    # medieval is not val; train.bin: llm.c's format under nanoGPT's name
    names = ["edufineweb_train_000002.npy", "medieval_train_000010.npy", "train.bin"]
    names += ["edufineweb_val_000000.npy", "val.bin", "validation_000001.bin"]
    made = {name: tokens_of(50 + i, i, 50257) for i, name in enumerate(names)}
    for name in reversed(names):
        content = npy(made[name]) if name.endswith(".npy") else llmc(made[name])
        (tmp_path / name).write_bytes(made[name].tobytes() if name == "val.bin" else content)  # nanoGPT's: no header
    train, val = open_data(str(tmp_path), SimpleNamespace(name="gpt2", n_vocab=50257))
    assert [[shard.path.name for shard in shards] for shards in (train, val)] == [names[:3], names[3:]]
    for shard in train + val:
        assert shard.n_tokens == len(made[shard.path.name]) and np.array_equal(contents(shard), made[shard.path.name])
    for shards in (train[2:], val[1:2]):
        assert np.array_equal(Windows(shards, 8).read(np.arange(6))[5], made[shards[0].path.name][40:49])


DAMAGED = {  # contents and a part of the message
    "truncated.npy": (npy(TOKENS)[:-60], "not a token shard"),
    "longer.npy": (npy(TOKENS) + b"xx", "new folder"),
    "wrong dtype.npy": (npy(TOKENS.astype(np.int64)), "int64"),
    "big-endian.npy": (npy(TOKENS.astype(">u2")), "uint16"),
    "two-dimensional.npy": (npy(TOKENS.reshape(10, 10)), "(10, 10)"),
    "truncated.bin": (llmc(TOKENS)[:-2], "1,222 bytes"),
    "weights of GPT-2.bin": (llmc(TOKENS, magic=20240801), "not a token shard"),
    "uint32.bin": (llmc(TOKENS, version=2), "no llm.c header"),
    "cut header.bin": (llmc(TOKENS)[:500], "500 bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_shard_is_named(tmp_path: Path, name: str) -> None:
    content, word = DAMAGED[name]
    path = write_folder(tmp_path / "d", two_shards()) / f"train {name}"
    path.write_bytes(content)
    refused(path.parent, str(path), word)


def test_manifest_decides_what_is_accepted(tmp_path: Path) -> None:
    shards = two_shards() | {"train_000002.npy": tokens_of(30, 3)}
    folder = write_folder(tmp_path / "d", shards, complete=True)
    check_shards(folder)
    train, val = open_data(str(folder), get_tokenizer("bytes"))
    assert [shard.n_tokens for shard in train + val] == [300, 30, 100]
    np.save(folder / "train_000007.npy", tokens_of(300, 99))  # not listed
    refused(folder, "train_000007.npy", "not listed")
    (folder / "train_000007.npy").unlink()
    (folder / "train_000002.npy").unlink()
    refused(folder, "train_000002.npy")
    refused(write_folder(tmp_path / "incomplete", two_shards(), complete=False), "incomplete", "fineweb.py")
    refused(write_folder(tmp_path / "train", {"train_000001.npy": tokens_of(300, 2)}), "validation")
    refused(write_folder(tmp_path / "gpt2", two_shards(), tokenizer="gpt2"), "gpt2", "bytes")


def test_several_folders_are_read_as_one(tmp_path: Path) -> None:
    everything = {}
    for i, name in enumerate(("b/edu-10", "a/edu-2", "other")):  # in the order of reading: the parent has no effect
        shards = {f"train_{k:06d}.npy": tokens_of(30 + i + 7 * k, 3 * i + k) for k in range(3)}
        shards |= {"val_000000.npy": tokens_of(40, 7)} if name == "other" else {}
        (tmp_path / name).mkdir(parents=True)
        write_folder(tmp_path / name, shards)
        everything |= {file.replace("_0", f"_{i}"): tokens for file, tokens in shards.items()}
    expected = open_data(str(write_folder(tmp_path / "one", everything)), get_tokenizer("bytes"))
    for source in (f"{tmp_path}/?/edu-*,{tmp_path}/other", f"{tmp_path}/other,{tmp_path}/./a/*,{tmp_path}/[ab]/edu*"):
        for a, b in zip(open_data(source, get_tokenizer("bytes")), expected):
            assert len(a) == len(b) and data.fingerprint(a) == data.fingerprint(b)
            assert all(np.array_equal(contents(x), contents(y)) for x, y in zip(a, b))


def test_folders_that_do_not_belong_together(tmp_path: Path) -> None:
    def write(name: str, k: int, n: int = 3, **changes: object) -> None:
        shards = two_shards() if k == 1 else {"train_000000.npy": tokens_of(30, k)}
        source = WHOLE["source"] | dict(whole="x (checksum 1)")
        write_folder(tmp_path / name, shards, **dict(part=dict(k=k, n=n), source=source) | changes)

    for k in (1, 2, 3):
        write(f"p-{k}", k)
    pattern = str(tmp_path / "p-*")
    train, val = open_data(pattern, get_tokenizer("bytes"))
    assert (len(train), len(val)) == (3, 1)
    refused(f"{pattern},{tmp_path}/nothing*", "no data in", "nothing*")
    refused(str(tmp_path / "p-1"), "0 folders", "part 2/3")
    write("p-copy", 2)
    refused(pattern, "2 folders", "part 2/3 of x")
    write("p-copy", 3, n=2**40)  # a damaged manifest
    refused(pattern, f"part 1/{2**40}")
    (tmp_path / "p-copy" / "manifest.json").unlink()
    open_data(pattern, get_tokenizer("bytes"))
    (tmp_path / "file.txt").write_text("text")
    refused(str(tmp_path / "file*"), "no data in", "file*")
    refused(tmp_path, "0 training and 0 validation shards")
    assert not (tmp_path / "checked.json").exists()  # it is written beside shards only


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", two_shards())
    shard = dict(file="train_000001.npy", n_tokens=300, crc32=5)
    valid = WHOLE | dict(shards=[shard, shard])
    incomplete = valid | dict(complete=False, shards=[])
    wrong = [valid | dict(shards=[shard, shard | change]) for change in (dict(file="../x.npy"), dict(n_tokens="300"))]
    wrong += [valid | dict(shards=[]), valid | dict(source={}), valid | dict(complete=1)]
    wrong += [valid | dict(n_skipped=-1), valid | dict(n_skipped=True), valid | dict(part=dict(k=1, n=-1))]
    wrong += [incomplete | dict(next=following) for following in ({}, dict(file=1, document=0, token=0))]
    for text in ["", "{", "[]", "null", '"x"', "[" * 10**5, "\xff", *map(json.dumps, wrong)]:
        (folder / "manifest.json").write_bytes(text.encode("latin-1"))
        refused(folder, folder / "manifest.json")
    for manifest in (valid, incomplete):
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert data.read_manifest(folder) == manifest


def test_shards_are_checked_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = two_shards()
    shards["train_000001.npy"][-1] = 256  # the largest id of the tokenizer
    folder = write_folder(tmp_path / "d", shards, complete=True)
    check_shards(folder)
    with monkeypatch.context() as patch:
        patch.setattr(data, "scan_shard", lambda shard: pytest.fail("read again"))
        check_shards(folder)
    refused(folder, "train_000001.npy", "256", n_tokens=256)  # another tokenizer

    cache = folder / "checked.json"
    for junk in ("", "{", "[]", "null", '{"train_000001.npy": []}'):
        cache.write_text(junk)
        check_shards(folder)
    with monkeypatch.context() as patch:
        patch.setattr(data.files, "atomic_write", mock.Mock(side_effect=OSError("Read-only file system")))
        cache.unlink()
        check_shards(folder)
    check_shards(folder)  # writes the cache

    path = folder / "train_000001.npy"
    before = path.stat()
    np.save(path, tokens_of(300, 99))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    for _ in range(2):  # a failed check is not cached as a success
        data.open_data(str(folder), get_tokenizer("bytes"), check=False)  # another rank
        refused(folder, path.name)


DOCUMENTS = [f"Document {i}.\nLine ü." for i in range(25)]
TEXT = "0123456789é" * 10  # 110 characters, 120 bytes
TEXTS = [  # the content of a file, its training and its validation documents
    (f"\n{EOT}\n".join(DOCUMENTS), DOCUMENTS[:22], DOCUMENTS[22:]),  # the last 10 % of the documents
    (TEXT, [TEXT[:99]], [TEXT[99:]]),  # the last 10 % of the only document
    (f"{EOT}\na\n{EOT}\n{EOT}\nb\n{EOT}\n", ["a"], ["b"]),  # separators at the edges and repeated make no documents
    (f"a\n{EOT}\nb\n{EOT}", ["a"], ["b"]),
    (f"a\r\n{EOT}\r\nb", ["a"], ["b"]),  # as Windows ends lines
    (f"a {EOT} b\n{EOT}\nc{EOT}\n", ["a ", " b"], ["c"]),  # also inside a line
    (f"\ufeffa{EOT}b", ["a"], ["b"]),  # with a byte order mark
]


def test_fingerprint_depends_on_sizes_and_ends() -> None:
    tokens = tokens_of(10**5, 1)

    def fingerprint(*parts: np.ndarray) -> str:
        return data.fingerprint([Shard(Path("x"), len(part), 0, part) for part in parts])

    first, last = tokens.copy(), tokens.copy()
    first[5] ^= 1
    last[-5] ^= 1
    variants = [(tokens,), (first,), (last,), (tokens[:-1],), (tokens[:10], tokens[10:]), (tokens[:20], tokens[20:])]
    assert len({fingerprint(*parts) for parts in variants}) == len(variants)
    assert fingerprint(tokens) == fingerprint(tokens.copy()) and "100,000 tokens" in fingerprint(tokens)


@pytest.mark.parametrize("text, train, val", TEXTS, ids=repr)
def test_documents_of_a_text_file(tmp_path: Path, text: str, train: list[str], val: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8"))
    shards = open_data(str(tmp_path / "a.txt"), get_tokenizer("bytes"))
    for (shard,), documents in zip(shards, (train, val)):
        assert shard.n_tokens == len(shard.tokens) and shard.tokens.dtype == np.uint16
        assert shard.tokens.tolist() == [i for document in documents for i in [256, *document.encode("utf-8")]]


def test_missing_undecodable_and_short_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, word in (("missing", "fineweb.py"), ("empty", "fineweb.py"), ("latin.txt", "UTF-8")):
        refused(tmp_path / name, tmp_path / name, word)
    short = [Shard(tmp_path / f"val_{n}.npy", n) for n in (60, 64)]  # they do not add up
    with harness.error("val_64.npy", "64", "65"):
        Windows(short, 64)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("T", [1, 7, 64])
def test_windows_are_slices_of_the_shards(tmp_path: Path, T: int, in_memory: bool) -> None:
    # lengths around multiples of T: T + 1 tokens are one window, T none; two shards hold none at all
    lengths = [3 * T + 1, T, 5 * T, 0, T + 1, 2 * T + 2, 200]
    arrays = [tokens_of(length, i, 2**16) for i, length in enumerate(lengths)]
    if in_memory:
        shards = [Shard(tmp_path / "x", len(tokens), 0, tokens) for tokens in arrays]
    else:
        for i, tokens in enumerate(arrays):
            np.save(tmp_path / f"train_{i}.npy", tokens)
        shards = [open_shard(tmp_path / f"train_{i}.npy") for i in range(len(arrays))]
    starts = [range(0, len(tokens) - T, T) for tokens in arrays]
    expected = [a[start : start + T + 1].tolist() for a, here in zip(arrays, starts) for start in here]
    windows = Windows(shards, T)
    assert len(windows) == len(expected)
    order = np.random.default_rng(0).permutation(len(expected))
    got = windows.read(order)
    assert got.dtype == np.int64 and got.shape == (len(expected), T + 1)
    assert got.tolist() == [expected[i] for i in order]
    assert windows.read(np.arange(0)).shape == (0, T + 1)


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train_0.npy"
    for name in ("train_0.npy", "train_1.npy"):
        np.save(tmp_path / name, tokens_of(1000, 0))
    windows = Windows([open_shard(path)], 9)
    os.truncate(path, 1000)
    with pytest.raises(OSError, match="train_0.npy"):
        windows.read(np.array([len(windows) - 1]))
    windows = Windows([open_shard(tmp_path / "train_1.npy")], 9, 257)
    np.save(tmp_path / "train_1.npy", np.full(1000, 257, dtype=np.uint16))
    with pytest.raises(OSError, match="train_1.npy"):
        windows.read(np.array([0]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_reading_keeps_no_memory_and_no_open_files(tmp_path: Path) -> None:
    def used() -> tuple[int, int]:
        """Resident bytes, and the number of open files."""
        n_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return n_pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    path, n_tokens = tmp_path / "train_0.npy", 100_000_000
    with open(path, "wb") as file:  # a sparse file of 200 MB
        np.lib.format.write_array_header_1_0(file, dict(descr="<u2", fortran_order=False, shape=(n_tokens,)))
        file.truncate(file.tell() + 2 * n_tokens)
    windows, rng, before = Windows([open_shard(path)], 1024), np.random.default_rng(0), used()
    for _ in range(500):  # draws that touch over a quarter of the windows: mapped memory would grow by 100 MB
        windows.read(rng.integers(0, len(windows), 64))
    after = used()
    assert after[0] - before[0] < 30e6 and after[1] == before[1]


@pytest.mark.parametrize("n_windows", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65])
def test_each_epoch_sees_each_window_once_for_any_batch_size(n_windows: int) -> None:
    for seed in (0, 1337, 2**31):
        whole = data.windows_at(0, 12 * n_windows, n_windows, seed)
        epochs = whole.reshape(12, n_windows)
        assert (np.sort(epochs) == np.arange(n_windows)).all()
        assert n_windows < 15 or len({tuple(epoch) for epoch in epochs.tolist()}) == 12
    for batch in (1, 3, 4, 12):
        parts = [data.windows_at(start, batch, n_windows, seed) for start in range(0, len(whole), batch)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_order_has_fixed_values() -> None:
    """Values computed with Python's integers. If they change, older runs can no longer be resumed."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [1, 0, 9, 3, 5, 6, 2, 8, 7, 4]
    assert data.windows_at(10, 10, 10, 1337).tolist() == [7, 3, 6, 9, 8, 0, 5, 1, 4, 2]  # epoch 1
    n, expected = 97_656_250, [88735918, 71436305, 71605748, 59234779, 74208372]  # windows of 100 billion tokens
    assert data.windows_at(3 * n, 5, n, 1337).tolist() == expected
    assert permute(np.array([0, 2**33 + 4]), 2**33 + 5, 1337, 2).tolist() == [2005390950, 6060533857]


def test_prefetch_yields_in_order_and_works_at_most_depth_ahead_on_one_thread() -> None:
    made, threads, before = [], set(), threading.active_count()

    def make(step: int) -> int:
        made.append(step)
        threads.add(threading.get_ident())
        if step == 9:
            raise OSError("no such window")
        return step * step

    steps = data.prefetch(make, 3, 100, depth=2)
    for step in range(3, 9):
        assert next(steps) == step * step
        time.sleep(0.05)
        assert made == list(range(3, step + 3))  # this one and two more
    with pytest.raises(OSError, match="no such window"):
        next(steps)
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(data.prefetch(make, 5, 5)) == [] and list(data.prefetch(make, 5, 6, depth=4)) == [25]
    assert threading.active_count() == before
