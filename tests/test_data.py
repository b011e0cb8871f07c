"""Tokenizers, shards on disk, text files, and the order in which windows are read."""

import json
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from harness import ENV, ROOT

from neogpt import data
from neogpt.data import (
    EOT,
    Shard,
    Windows,
    check_shards,
    encode_document,
    get_tokenizer,
    open_data,
    open_shard,
    permute,
)


def tokens_of(n: int, seed: int, high: int = 256) -> np.ndarray:
    """n random ids below `high`."""
    return np.random.default_rng(seed).integers(0, high, n).astype(np.uint16)


def write_folder(folder: Path, shards: dict[str, np.ndarray], **manifest: object) -> Path:
    """A folder of shards; with keywords, also a correct manifest with these keys replaced."""
    folder.mkdir(exist_ok=True)
    for name, tokens in shards.items():
        np.save(folder / name, tokens)
    if manifest:
        listed = [dict(file=name, n_tokens=len(tokens), crc32=zlib.crc32(tokens)) for name, tokens in shards.items()]
        manifest = dict(tokenizer="bytes", complete=True, shards=listed) | manifest
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


def gpt2_tokenizer() -> tiktoken.Encoding:
    """The GPT-2 vocabulary, or a skipped test."""
    try:
        return get_tokenizer("gpt2")
    except (ValueError, OSError) as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {error}")


def test_bytes_ids_are_the_utf8_bytes() -> None:
    tokenizer = get_tokenizer("bytes")
    rng = random.Random(0)
    texts = ["", "a", "\x00\r\n\t ", "naïve — 日本語 🦊", "e\u0301", "x" * 5000, " \n" * 700]
    for length in (1, 10, 1000):
        points = [rng.randrange(0x110000) for _ in range(length)]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))  # no surrogates
    for text in texts:
        ids = tokenizer.encode_ordinary(text)
        assert ids == list(text.encode("utf-8"))
        assert tokenizer.decode(ids) == text
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.name) == (257, 256, "bytes")
    assert tokenizer.decode([256]) == EOT


def test_documents_start_with_end_of_text_and_contain_no_other() -> None:
    tokenizer = get_tokenizer("bytes")
    document = encode_document(tokenizer, f"a{EOT}b")
    assert document.dtype == np.uint16
    assert document.tolist() == [256, *f"a{EOT}b".encode()]
    assert encode_document(tokenizer, "").tolist() == [256]


def test_gpt2_ids() -> None:
    tokenizer = gpt2_tokenizer()
    # the ids OpenAI's own encoder gives for build-nanogpt's prompt
    known = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.encode_ordinary("Hello, I'm a language model,") == known
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    document = encode_document(tokenizer, f"Hello{EOT}")
    assert document[0] == 50256 and 50256 not in document[1:]
    assert tokenizer.decode(document[1:].tolist()) == f"Hello{EOT}"


def test_offline_error_names_both_files_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> tiktoken.Encoding:
        raise ConnectionError("Max retries exceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(OSError) as error:
        get_tokenizer("gpt2")
    message = str(error.value)
    # tiktoken's names in its cache: SHA-1 of the addresses of vocab.bpe and encoder.json
    for name in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"):
        assert name in message
    assert str(tmp_path) in message

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    with pytest.raises(OSError, match="tiktoken"):
        get_tokenizer("gpt2")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(ROOT / ".cache" / "tiktoken")


def test_unknown_tokenizer() -> None:
    with pytest.raises(ValueError, match="llama"):
        get_tokenizer("llama")


def test_shards_of_build_nanogpt(tmp_path: Path) -> None:
    names = ["edufineweb_train_000010.npy", "edufineweb_train_000002.npy", "edufineweb_val_000000.npy"]
    made = {name: tokens_of(50 + i, i, 50257) for i, name in enumerate(names)}
    train, val = data.list_shards(write_folder(tmp_path, made))
    assert [s.path.name for s in train] == [names[1], names[0]]
    assert [s.path.name for s in val] == [names[2]]
    for shard in train + val:
        assert np.array_equal(contents(shard), made[shard.path.name])


def llmc(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    """An llm.c file by its specification: 256 int32, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def test_shards_of_llmc(tmp_path: Path) -> None:
    made = {"fineweb_val_000000.bin": tokens_of(70, 3), "fineweb_train_000001.bin": tokens_of(80, 4)}
    for name, tokens in made.items():
        (tmp_path / name).write_bytes(llmc(tokens))
    (train,), (val,) = data.list_shards(tmp_path)
    for shard in (train, val):
        assert np.array_equal(contents(shard), made[shard.path.name])
    windows = Windows([train], 8).read(np.arange(9))
    assert np.array_equal(windows[5], made["fineweb_train_000001.bin"][40:49])


def npy(array: np.ndarray, path: Path) -> bytes:
    """The bytes of `array` as a .npy file."""
    np.save(path / "scratch.npy", array)
    raw = (path / "scratch.npy").read_bytes()
    (path / "scratch.npy").unlink()
    return raw


@pytest.mark.parametrize(
    "damage, complaint",
    [
        ("truncated", "not a token shard"),
        ("one byte short", "not a token shard"),
        ("too long", "330 bytes"),
        ("wrong dtype", "int64"),
        ("big-endian", "uint16"),
        ("two-dimensional", r"\(10, 10\)"),
        ("empty", "not a token shard"),
        ("not npy", "not a token shard"),
        ("header cut", "not a token shard"),
    ],
)
def test_damaged_npy_is_named(tmp_path: Path, damage: str, complaint: str) -> None:
    tokens = tokens_of(100, 0)
    raw = npy(tokens, tmp_path)
    broken = {
        "truncated": raw[:-60],
        "one byte short": raw[:-1],
        "too long": raw + b"\0\0",
        "wrong dtype": npy(tokens.astype(np.int64), tmp_path),
        "big-endian": npy(tokens.astype(">u2"), tmp_path),
        "two-dimensional": npy(tokens.reshape(10, 10), tmp_path),
        "empty": b"",
        "not npy": b"PAR1" + raw,
        "header cut": raw[:40],
    }
    path = write_folder(tmp_path / "d", two_shards()) / "train_000001.npy"
    path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=complaint) as error:
        check_shards(path.parent, 257)
    assert str(path) in str(error.value)


def test_every_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    tokens = tokens_of(100, 0)
    path = tmp_path / "train_000001.npy"
    raw = npy(tokens, tmp_path)
    rng = random.Random(0)
    for _ in range(400):
        broken = bytearray(raw)
        broken[rng.randrange(len(raw) - tokens.nbytes)] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            shard = open_shard(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
        else:
            assert np.array_equal(contents(shard), tokens)


@pytest.mark.parametrize(
    "raw, complaint",
    [
        (llmc(tokens_of(50, 0))[:-2], "1,122 bytes"),
        (llmc(tokens_of(50, 0)) + b"\0\0", "1,126 bytes"),
        (llmc(tokens_of(50, 0), magic=20240801), "x_train_1"),  # llm.c's GPT-2 weights
        (llmc(tokens_of(50, 0), version=2), "x_train_1"),  # uint32 tokens
        (llmc(tokens_of(50, 0))[:500], "x_train_1"),
    ],
)
def test_damaged_llmc_is_named(tmp_path: Path, raw: bytes, complaint: str) -> None:
    path = tmp_path / "x_train_1.bin"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=complaint) as error:
        open_shard(path)
    assert str(path) in str(error.value)


def test_manifest_decides_what_is_accepted(tmp_path: Path) -> None:
    shards = two_shards() | {"train_000002.npy": tokens_of(30, 3)}
    folder = write_folder(tmp_path / "d", shards, complete=True)
    check_shards(folder, 257)
    train, val = open_data(folder, get_tokenizer("bytes"))
    assert [shard.n_tokens for shard in train + val] == [300, 30, 100]
    np.save(folder / "train_000007.npy", tokens_of(300, 99))  # not listed
    with pytest.raises(ValueError, match="train_000007.npy"):
        check_shards(folder, 257)
    (folder / "train_000007.npy").unlink()
    (folder / "train_000002.npy").unlink()
    with pytest.raises(ValueError, match="train_000002.npy"):
        check_shards(folder, 257)
    folder = write_folder(tmp_path / "incomplete", two_shards(), complete=False)
    with pytest.raises(ValueError, match="incomplete.*fineweb.py"):
        check_shards(folder, 257)
    folder = write_folder(tmp_path / "gpt2", two_shards(), tokenizer="gpt2")
    with pytest.raises(ValueError, match="gpt2.*bytes"):
        open_data(folder, get_tokenizer("bytes"))
    folder = write_folder(tmp_path / "train", {"train_000001.npy": tokens_of(300, 2)})
    with pytest.raises(ValueError, match="validation"):
        check_shards(folder, 257)


def test_other_shard_of_the_same_size_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", two_shards(), complete=True)
    np.save(folder / "train_000001.npy", tokens_of(300, 99))
    with pytest.raises(ValueError, match="train_000001.npy"):
        check_shards(folder, 257)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    shards = two_shards()
    shards["train_000001.npy"][-1] = 256  # the largest id of the tokenizer
    folder = write_folder(tmp_path / "d", shards)
    check_shards(folder, 257)
    with pytest.raises(ValueError, match="train_000001.npy.*256.*256"):
        check_shards(folder, 256)  # also from the cache of results


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"tokenizer": "bytes", "complete": true, "shards": [{}]}', '"x"']
)
def test_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "d", two_shards())
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json"):
        check_shards(folder, 257)


@pytest.mark.parametrize("kind", ["no folder", "empty folder"])
def test_missing_data_is_named_with_a_remedy(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "edu"
    if kind == "empty folder":
        folder.mkdir()
    with pytest.raises((ValueError, OSError), match="fineweb.py") as error:
        open_data(folder, get_tokenizer("bytes"))
    assert str(folder) in str(error.value)


def test_checked_shards_are_read_again_only_if_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "d", two_shards(), complete=True)
    check_shards(folder, 257)
    read = []
    scan = data.scan_shard
    monkeypatch.setattr(data, "scan_shard", lambda shard: read.append(shard.path.name) or scan(shard))
    check_shards(folder, 257)
    assert read == []

    path = folder / "train_000001.npy"
    before = path.stat()
    np.save(path, tokens_of(300, 99))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="train_000001.npy"):
        check_shards(folder, 257)
    assert read == [path.name]
    with pytest.raises(ValueError, match="train_000001.npy"):
        check_shards(folder, 257)  # a failed check is not cached as a success


@pytest.mark.parametrize("junk", ["", "{", "[]", "null", '{"train_000001.npy": 3}', '{"train_000001.npy": []}'])
def test_damaged_cache_of_checks_is_ignored(tmp_path: Path, junk: str) -> None:
    folder = write_folder(tmp_path / "d", two_shards(), complete=True)
    (folder / "checked.json").write_text(junk)
    check_shards(folder, 257)


def test_results_of_checking_need_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "d", two_shards(), complete=True)

    def read_only(path: Path) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(data.files, "atomic_write", read_only)
    check_shards(folder, 257)
    assert not (folder / "checked.json").exists()


def ids(*documents: str) -> list[int]:
    """End-of-text and bytes of each document."""
    return [i for document in documents for i in [256, *document.encode("utf-8")]]


def read(path: Path, text: str | bytes) -> tuple[list[int], list[int]]:
    """Training and validation ids of a text file with this content."""
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    (train,), (val,) = open_data(path, get_tokenizer("bytes"))
    assert train.n_tokens == len(train.tokens) and val.n_tokens == len(val.tokens)
    assert train.tokens.dtype == val.tokens.dtype == np.uint16
    return train.tokens.tolist(), val.tokens.tolist()


def test_last_10_percent_of_the_documents_are_validation(tmp_path: Path) -> None:
    documents = [f"Document {i}.\nLine ü." for i in range(25)]
    train, val = read(tmp_path / "a.txt", "\n<|endoftext|>\n".join(documents))
    assert train == ids(*documents[:22])
    assert val == ids(*documents[22:])


@pytest.mark.parametrize("text", ["{0}\na\n{0}\nb", "a\n{0}\nb\n{0}", "a\n{0}\n{0}\nb\n{0}\n"])
def test_separators_at_the_edges_and_repeated_make_no_documents(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "a.txt", text.format(EOT)) == (ids("a"), ids("b"))


def test_end_of_text_within_a_line_does_not_split(tmp_path: Path) -> None:
    train, val = read(tmp_path / "a.txt", "a <|endoftext|> b\n<|endoftext|>\nc<|endoftext|>\n")
    assert train == ids("a <|endoftext|> b")
    assert val == ids("c<|endoftext|>\n")


def test_windows_line_ends_separate_documents(tmp_path: Path) -> None:
    train, val = read(tmp_path / "a.txt", b"a\r\n<|endoftext|>\r\nb")
    assert (train, val) == (ids("a"), ids("b"))


def test_one_document_is_split_at_90_percent(tmp_path: Path) -> None:
    text = "0123456789é" * 10  # 110 characters, 120 bytes
    assert read(tmp_path / "a.txt", text) == (ids(text[:99]), ids(text[99:]))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.txt"):
        read(tmp_path / "a.txt", "naïve".encode("latin-1"))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("T", [1, 7, 64])
def test_windows_are_slices_of_the_shards(tmp_path: Path, T: int, in_memory: bool) -> None:
    # lengths around multiples of T: T + 1 tokens are one window, T none; two shards hold none at all
    lengths = [3 * T + 1, T, 5 * T, 0, T + 1, 2 * T + 2, 200]
    arrays = [tokens_of(length, i, 2**16) for i, length in enumerate(lengths)]
    shards = []
    for i, tokens in enumerate(arrays):
        if in_memory:
            shards.append(Shard(tmp_path / "x", len(tokens), 0, tokens))
        else:
            np.save(tmp_path / f"train_{i}.npy", tokens)
            shards.append(open_shard(tmp_path / f"train_{i}.npy"))
    expected = []
    for tokens in arrays:
        start = 0
        while start + T + 1 <= len(tokens):
            expected.append(tokens[start : start + T + 1].tolist())
            start += T
    windows = Windows(shards, T)
    assert len(windows) == len(expected)
    order = np.random.default_rng(0).permutation(len(expected))
    got = windows.read(order)
    assert got.dtype == np.int64 and got.shape == (len(expected), T + 1)
    assert got.tolist() == [expected[i] for i in order]
    assert windows.read(np.arange(0)).shape == (0, T + 1)


def test_shards_without_one_window(tmp_path: Path) -> None:
    np.save(tmp_path / "val_0.npy", tokens_of(64, 0))
    with pytest.raises(ValueError, match="val_0.npy.*64.*65"):
        Windows([open_shard(tmp_path / "val_0.npy")], 64)
    np.save(tmp_path / "val_1.npy", tokens_of(60, 0))  # shards do not add up
    shards = [open_shard(tmp_path / name) for name in ("val_1.npy", "val_0.npy")]
    with pytest.raises(ValueError, match="val_0.npy.*64"):
        Windows(shards, 64)


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train_0.npy"
    np.save(path, tokens_of(1000, 0))
    windows = Windows([open_shard(path)], 9)
    os.truncate(path, 1000)
    with pytest.raises(OSError, match="train_0.npy"):
        windows.read(np.array([len(windows) - 1]))


def test_more_shards_than_open_files_allowed(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on open files are a POSIX matter")
    arrays = [tokens_of(30, i) for i in range(160)]
    for i, tokens in enumerate(arrays):
        np.save(tmp_path / f"train_{i:03d}.npy", tokens)
    windows = Windows([open_shard(tmp_path / f"train_{i:03d}.npy") for i in range(160)], 29)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.dup(0)  # the lowest free number; most open files have lower numbers
    try:
        # 100 billion tokens are 1,000 shards, and 1024 open files are the usual limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 80, hard))
        got = windows.read(np.arange(160))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held)
    assert np.array_equal(got, np.stack(arrays))


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from neogpt.data import Windows, open_shard

def resident() -> int:  # bytes
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

windows = Windows([open_shard(Path(sys.argv[1]))], 1024)
rng = np.random.default_rng(0)
windows.read(rng.integers(0, len(windows), 64))
before = resident()
for _ in range(1500):
    windows.read(rng.integers(0, len(windows), 64))
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_reading_does_not_grow_resident_memory(tmp_path: Path) -> None:
    path = tmp_path / "train_0.npy"
    n_tokens = 100_000_000
    with open(path, "wb") as file:  # a sparse file of 200 MB
        np.lib.format.write_array_header_1_0(file, dict(descr="<u2", fortran_order=False, shape=(n_tokens,)))
        file.truncate(file.tell() + 2 * n_tokens)
    args = [sys.executable, "-c", MEMORY, str(path)]
    out = subprocess.run(args, env=ENV, capture_output=True, text=True, check=True)
    # 96,000 draws touch over 60 % of the 97,656 windows: mapped memory would grow by more than 100 MB
    assert int(out.stdout) < 10e6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 10007])
def test_permute_is_a_bijection(n: int) -> None:
    for seed, epoch in [(0, 0), (1337, 0), (1337, 1), (2**31, 12)]:
        assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_permute_of_some_indices_equals_the_whole_permutation() -> None:
    whole = permute(np.arange(1000), 1000, 5, 6)
    some = np.array([999, 0, 0, 500])
    assert permute(some, 1000, 5, 6).tolist() == whole[some].tolist()


def test_permute_differs_by_seed_and_epoch() -> None:
    n = 1000
    drawn = [permute(np.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(drawn):
        assert (a == np.arange(n)).sum() < 12
        for b in drawn[:i]:
            # two random permutations agree in 1 place on average, in 12 or more with probability 1e-9
            assert (a == b).sum() < 12


@pytest.mark.parametrize("vary", ["seed", "epoch"])
def test_permutations_of_four_are_equally_likely(vary: str) -> None:
    n_draws = 4800
    counts = Counter(
        tuple(permute(np.arange(4), 4, i if vary == "seed" else 7, 7 if vary == "seed" else i).tolist())
        for i in range(n_draws)
    )
    expected = n_draws / 24
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert len(counts) == 24
    assert chi2 < 70  # 23 degrees of freedom: above 70 with probability 1e-6


def test_permute_has_fixed_values() -> None:
    """Values computed with Python's integers. If they change, older runs can no longer be resumed."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [1, 0, 9, 3, 5, 6, 2, 8, 7, 4]
    assert permute(np.arange(10), 10, 1337, 1).tolist() == [7, 3, 6, 9, 8, 0, 5, 1, 4, 2]
    assert permute(np.arange(5), 97_656_250, 1337, 3).tolist() == [  # 100 billion tokens
        88735918,
        71436305,
        71605748,
        59234779,
        74208372,
    ]
    assert permute(np.array([0, 2**33 + 4]), 2**33 + 5, 1337, 2).tolist() == [2005390950, 6060533857]


@pytest.mark.parametrize("n_windows, batch", [(10, 4), (7, 7), (5, 3), (3, 8), (1, 2), (101, 16)])
def test_each_epoch_sees_each_window_once(n_windows: int, batch: int) -> None:
    n_steps = 4 * n_windows  # a whole number of epochs
    order = np.concatenate([data.windows_at(step * batch, batch, n_windows, 1337) for step in range(n_steps)])
    epochs = order.reshape(-1, n_windows)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n_windows))
    if n_windows > 100:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    whole = data.windows_at(0, 720, 50, 3)
    for batch in (1, 8, 9, 60, 240):
        parts = [data.windows_at(step * batch, batch, 50, 3) for step in range(720 // batch)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_late_positions_are_computed_directly() -> None:
    started = time.perf_counter()
    windows = data.windows_at(512 * 10**9, 512, 97_656_250, 1)
    assert time.perf_counter() - started < 1
    assert len(set(windows.tolist())) == 512 and 0 <= windows.min() and windows.max() < 97_656_250


def test_prefetch_yields_in_order() -> None:
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3))
        return step * step

    assert list(data.prefetch(make, 3, 20)) == [step * step for step in range(3, 20)]
    assert list(data.prefetch(make, 5, 5)) == []
    assert list(data.prefetch(make, 5, 6, depth=4)) == [25]


def test_prefetch_works_at_most_depth_ahead_on_one_thread() -> None:
    made, threads = [], set()

    def make(step: int) -> int:
        made.append(step)
        threads.add(threading.get_ident())
        return step

    steps = data.prefetch(make, 0, 100, depth=2)
    for step in range(5):
        assert next(steps) == step
        time.sleep(0.05)
        assert made == list(range(step + 3))  # this one and two more
    steps.close()
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_exceptions_of_prefetch_are_raised_at_their_item() -> None:
    def make(step: int) -> int:
        if step == 4:
            raise OSError("no such window")
        return step

    got = []
    with pytest.raises(OSError, match="no such window"):
        for item in data.prefetch(make, 0, 10):
            got.append(item)
    assert got == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["close", "exception"])
def test_prefetch_leaves_no_thread(how: str) -> None:
    before = threading.active_count()

    def make(step: int) -> int:
        if how == "exception" and step == 3:
            raise ValueError
        return step

    steps = data.prefetch(make, 0, 1000)
    try:
        for _ in range(5):
            next(steps)
    except ValueError:
        pass
    steps.close()
    assert threading.active_count() == before
