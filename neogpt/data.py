"""Tokenizers, token shards on disk, and the order in which training reads them.

A data folder holds shards of uint16 ids with "train" or "val" in their names: `.npy` files of fineweb.py or
build-nanogpt, `.bin` files of llm.c or nanoGPT. A text file or several folders can replace it. The order depends on
the seed and on the position, which counts sequences, but not on the number of devices or the micro-batch size.
"""

import contextlib
import glob
import json
import os
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import tiktoken

from neogpt import config, files

EOT = "<|endoftext|>"  # the first token of every document; in a text file it separates documents
MANIFEST, CHECKED = "manifest.json", "checked.json"  # what fineweb.py wrote; the latest successful check
# what manifest.json has, for files.matches; "next" is where an incomplete one continues
OLD_MANIFEST = dict(field="text", part=dict(k=1, n=1))  # keys that an old one lacks
MANIFEST_KEYS = OLD_MANIFEST | dict(tokenizer="", complete=True, n_tokens=0, n_documents=0, n_skipped=0)
MANIFEST_KEYS |= dict(shards=[dict(file="", n_tokens=0, crc32=0)], source=dict(data="", files=[dict(name="", size=0)]))
NEXT = dict(file=0, document=0, token=0)
Item = TypeVar("Item")


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50257 ids, end-of-text 50256) or "bytes" (257 ids, end-of-text 256, no download)."""
    if name == "bytes":
        pattern = r"(?s:.{1,400})"  # short pieces: a piece of several MB would take GBs of memory
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(name="bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 256})
    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}: expected 'gpt2' or 'bytes'")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(config.ROOT / ".cache" / "tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests and tiktoken raise many kinds
        names = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"  # tiktoken's
        problem = f"cannot download the GPT-2 vocabulary into {folder} ({files.one_line(error)})"
        remedy = f"copy {names[0]} (vocab.bpe) and {names[1]} (encoder.json) from another machine's cache into it"
        raise OSError(f"{problem}: {remedy}, or set TIKTOKEN_CACHE_DIR to another folder") from error


def encode_document(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """End-of-text, then the ids of the text, (n,) uint16. Special tokens in the text stay ordinary text."""
    ids = tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.concatenate(([tokenizer.eot_token], ids)).astype(np.uint16)


class Shard(NamedTuple):
    """A sequence of token ids: `n_tokens` uint16 after `offset` bytes of a file, or an array in memory."""

    path: Path
    n_tokens: int
    offset: int = 0
    tokens: np.ndarray | None = None


Splits = tuple[list[Shard], list[Shard]]  # training, validation


def open_shard(path: Path) -> Shard:
    """Read a shard's header. Raises ValueError if it is not a shard or has the wrong size."""
    try:
        if path.suffix == ".bin":
            offset = 1024  # llm.c: 256 int32 (magic, version 1, number of tokens, …), then the tokens
            magic, version, n_tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
            if (magic, version) != (20240520, 1):
                if path.name not in ("train.bin", "val.bin"):
                    raise ValueError("no llm.c header with uint16 tokens")
                offset, n_tokens = 0, path.stat().st_size // 2  # nanoGPT: only the tokens
        else:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)  # raises a clearer error than np.load
            array = np.load(path, mmap_mode="r")  # reads the header only
            if array.dtype != np.dtype("<u2") or array.ndim != 1:
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not one row of uint16")
            n_tokens, offset = len(array), array.offset
    except Exception as error:  # numpy parses the header as Python and raises many kinds
        raise ValueError(f"{path} is not a token shard ({files.one_line(error)}): restore or remove it") from error
    expected, size = offset + 2 * n_tokens, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, not {expected:,}: restore it or run fineweb.py into a new folder")
    return Shard(path, n_tokens, offset)


def read_manifest(folder: str | Path) -> dict | None:
    """The manifest.json of fineweb.py; None if there is none, as with other shards. Raises ValueError if damaged."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):  # not JSON, or not a manifest
        manifest = OLD_MANIFEST | json.loads(path.read_bytes())
        valid = files.matches(manifest, MANIFEST_KEYS | ({} if manifest["complete"] else dict(next=NEXT)))
        # a name is not a path: shards are read from this folder only
        valid = valid and all(Path(entry["file"]).name == entry["file"] for entry in manifest["shards"])
        valid = valid and (manifest["complete"] or manifest["next"]["file"] < len(manifest["source"]["files"]))
        if valid and (manifest["shards"] or not manifest["complete"]):
            return manifest
    raise ValueError(f"cannot use {path}: it is damaged; restore it, or remove it to use the shards unchecked")


def read_tokens(shard: Shard) -> np.ndarray:
    """The tokens of a shard, (n,) uint16, memory-mapped if they are in a file."""
    return np.memmap(shard.path, dtype="<u2", mode="r", offset=shard.offset) if shard.tokens is None else shard.tokens


def checksum(arrays: Iterable[np.ndarray]) -> str:
    """The CRC-32 of the contents of all arrays."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return f"{crc:08x}"


def fingerprint(shards: list[Shard]) -> str:
    """The number of tokens, and a checksum of the sizes and both ends of all shards."""
    ends = [part for shard in shards for part in np.split(read_tokens(shard), [2**15, -(2**15)])[::2]]
    sizes = np.array([shard.n_tokens for shard in shards])
    return f"{sizes.sum():,} tokens, {checksum([sizes, *ends])}"


def scan_shard(shard: Shard) -> tuple[int, int]:
    """Read a whole shard; return the CRC-32 of its tokens and its largest id."""
    tokens = read_tokens(shard)
    return zlib.crc32(tokens), int(tokens.max(initial=0))


def open_folder(folder: Path, tokenizer: tiktoken.Encoding, check: bool) -> Splits:
    """The (training, validation) shards of a folder, sorted by name. Raises ValueError if the tokenizer or the names
    of the shards differ from the manifest. check: also if a shard differs from it, or has an id outside the vocabulary.
    `checked.json` stores sizes and modification times of a successful check; until they change, no shard is read again.
    """
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".bin"))
    words = "train(ing)?", "val(id|idation)?"  # not within a word: medieval_train_000001.npy is no validation shard
    train, val = ([open_shard(p) for p in paths if re.search(f"(?<![a-z]){w}(?![a-z])", p.name)] for w in words)
    shards, n_vocab, cache = {shard.path.name: shard for shard in train + val}, tokenizer.n_vocab, folder / CHECKED
    manifest = read_manifest(folder) or {"complete": True, "shards": [], "tokenizer": tokenizer.name}
    if manifest["tokenizer"] != tokenizer.name:
        raise ValueError(f"{folder} was written with --tokenizer={manifest['tokenizer']}, not {tokenizer.name}")
    if not manifest["complete"]:
        raise ValueError(f"{folder} is incomplete: run the same `python fineweb.py` command again to continue")
    listed = {entry["file"]: (entry["n_tokens"], entry["crc32"]) for entry in manifest["shards"]}
    if missing := listed.keys() - shards.keys():
        raise ValueError(f"{folder / min(missing)} is missing: restore it, or run fineweb.py into a new folder")
    if listed and (unlisted := shards.keys() - listed.keys()):
        raise ValueError(f"{folder / min(unlisted)} is not listed in {MANIFEST}: move it to another folder")
    state = [n_vocab, manifest, {name: [s.n_tokens, s.path.stat().st_mtime_ns] for name, s in shards.items()}]
    with contextlib.suppress(OSError, ValueError):
        check = check and json.loads(cache.read_text()) != state
    with ThreadPoolExecutor(8) as pool:  # reading, crc32 and max release the GIL
        results = pool.map(scan_shard, shards.values() if check else [])
    for shard, (crc, largest) in zip(shards.values(), results):
        if largest >= n_vocab:
            raise ValueError(f"{shard.path} holds the id {largest}, but the tokenizer has {n_vocab} ids")
        if listed and listed.get(shard.path.name) != (shard.n_tokens, crc):
            raise ValueError(f"{shard.path} differs from {MANIFEST}: restore it, or run fineweb.py into a new folder")
    if check and shards:
        with contextlib.suppress(OSError):  # the folder can be read-only
            files.write_json(cache, state)
    return train, val


def split_documents(text: bytes) -> list[bytes]:
    """The documents of a text, which `<|endoftext|>` separates, alone on a line or not, without a byte order mark."""
    separator = rb"\r?\n?" + re.escape(EOT.encode()) + rb"\r?\n?"
    return [part for part in re.split(rb"^\xef\xbb\xbf|" + separator, text) if part]


def read_text(path: Path, tokenizer: tiktoken.Encoding) -> Splits:
    """A training and a validation shard in memory: the last 10 % of the documents of a text file are for validation."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    documents = [document.decode() for document in split_documents(text.encode())]
    if len(documents) < 2:  # split a single document by characters
        text = "".join(documents)
        documents = [text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]]
    encoded, n = [encode_document(tokenizer, document) for document in documents], int(0.9 * len(documents))
    train, val = np.concatenate(encoded[:n]), np.concatenate(encoded[n:])
    return [Shard(path, len(train), 0, train)], [Shard(path, len(val), 0, val)]


def find_folders(source: str) -> list[Path]:
    """The folders of `source` (one path, or patterns separated by commas), sorted by name. Raises OSError for a pattern
    without folders, and ValueError if a part that `fineweb.py --part` writes is missing or there twice.
    """
    folders = set()
    for pattern in [glob.escape(source)] if os.path.exists(source) else source.split(","):
        if not (found := {Path(path) for path in glob.glob(pattern) if os.path.isdir(path)}):
            raise OSError(f"no data in {pattern}: check the path, write shards with fineweb.py, or use --data=FILE.txt")
        folders |= found
    manifests = filter(None, map(read_manifest, sorted(folders)))
    parts = Counter((str(m["source"].get("whole")), m["part"]["n"], m["part"]["k"]) for m in manifests)
    for whole, n, _ in parts:
        for k in range(1, n + 1):
            if n > 1 and (count := parts[whole, n, k]) != 1:
                raise ValueError(f"{count} folders of --data={source} hold part {k}/{n} of {whole}: expected one")
    return sorted(folders, key=lambda folder: (folder.name, folder))


def open_data(source: str, tokenizer: tiktoken.Encoding, check: bool = True) -> Splits:
    """The (training, validation) shards of a text file or the folders of `find_folders`. check: see `open_folder`."""
    if os.path.isfile(source):
        return read_text(Path(source), tokenizer)
    folders = [open_folder(folder, tokenizer, check) for folder in find_folders(source)]
    train, val = (sum(shards, []) for shards in zip(*folders))
    if not train or not val:
        found = f"{len(train)} training and {len(val)} validation shards"
        raise ValueError(f"{source} has {found}, by the words train and val in names: run python fineweb.py")
    return train, val


class Windows:
    """Shards cut into windows of T + 1 tokens: window w of a shard has its tokens wT … wT + T, ids below n_vocab."""

    def __init__(self, shards: list[Shard], T: int, n_vocab: int = 2**16) -> None:
        self.shards, self.T, self.n_vocab = shards, T, n_vocab
        self.starts = np.cumsum([0, *(max(0, shard.n_tokens - 1) // T for shard in shards)])  # first windows of shards
        if not len(self):
            longest = max(shards, key=lambda shard: shard.n_tokens)
            parts = "its training or validation part" if longest.tokens is not None else "the longest shard"
            raise ValueError(f"{longest.path}: {parts} has {longest.n_tokens} tokens, fewer than T + 1 = {T + 1}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Window numbers (n,) int64 -> tokens (n, T + 1) int64."""
        out = np.empty((len(windows), self.T + 1), dtype=np.uint16)
        for row, window, number in zip(out, windows, np.searchsorted(self.starts, windows, side="right") - 1):
            shard, start = self.shards[number], int(window - self.starts[number]) * self.T
            if shard.tokens is not None:
                row[:] = shard.tokens[start : start + self.T + 1]
                continue
            with open(shard.path, "rb", buffering=0) as file:  # not mapped: mapped pages count as memory of the process
                file.seek(shard.offset + 2 * start)
                if file.readinto(row.data) != row.nbytes or row.max() >= self.n_vocab:
                    raise OSError(f"{shard.path} was truncated or damaged during the run: restore it and start again")
        return out.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64: every input bit affects every output bit (splitmix64's finalizer)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def permute(i: np.ndarray, n: int, seed: int, epoch: int | np.ndarray) -> np.ndarray:
    """The images of i, (k,) int64, under permutations of 0 … n - 1, selected by seed and epoch. epoch: int or (k,).
    Nothing is stored: a Feistel network permutes 0 … 4^m - 1 for the smallest 4^m >= n, and results of n or more are
    permuted again (cycle walking, Black and Rogaway 2002), fewer than four times on average.
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2  # m, the number of bits of either half
    mask = 2**half - 1
    base = mix(np.uint64(seed) ^ mix(np.full(len(i), epoch, dtype=np.uint64)))
    keys = mix(np.arange(1, 9, dtype=np.uint64)[:, None] * 0x9E3779B97F4A7C15 ^ base)  # (8, k), a row per round
    out = i.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key[todo]) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def windows_at(position: int, n: int, n_windows: int, seed: int) -> np.ndarray:
    """The n windows from `position` on, (n,) int64, in the order of training: a new permutation in every epoch."""
    epochs, windows = np.divmod(position + np.arange(n), n_windows)
    return permute(windows, n_windows, seed, epochs)


def prefetch(make: Callable[[int], Item], start: int, stop: int, depth: int = 2) -> Iterator[Item]:
    """Yield make(start) … make(stop - 1), computed by a thread up to `depth` ahead. Raises the exceptions of `make`."""
    ahead = deque()
    with ThreadPoolExecutor(1) as pool:
        for step in range(start, stop + depth):
            if step < stop:
                ahead.append(pool.submit(make, step))
            if step >= start + depth:
                yield ahead.popleft().result()
