"""Tokenizers, token shards on disk, and the order in which training reads them.

A data folder holds shards of uint16 token ids, `*train*` for training and `*val*` for validation: `.npy` as written by
fineweb.py and build-nanogpt, or llm.c's `.bin`. A text file can be used in place of a folder.

The order is a pure function of (seed, position), where the position counts sequences. It does not depend on the number
of devices or on the micro-batch size, so a resumed or moved run sees the same batches.
"""

import contextlib
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import tiktoken

from neogpt import files

EOT = "<|endoftext|>"  # the first token of every document; a line with only this separates documents of a .txt
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # .bin: 256 int32 (magic, version 1, token count, …), then uint16
MANIFEST = "manifest.json"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50257 ids, end-of-text 50256) or "bytes" (257 ids, end-of-text 256, no download)."""
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"(?s:.{1,400})",  # short pieces: one of several MB would take GBs of memory
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={EOT: 256},
            explicit_n_vocab=257,
        )
    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}: expected 'gpt2' or 'bytes'")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE / "tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests and tiktoken raise many kinds
        raise OSError(
            f"cannot download the GPT-2 vocabulary ({type(error).__name__}). Without a network, copy the files "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 "
            f"(encoder.json) from the cache of another machine into {folder}"
        ) from error


def utf8(text: str) -> bytes:
    """Text as UTF-8; lone surrogates, which JSON can contain, are replaced as `encode_ordinary` does."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def encode_document(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """End-of-text, then the ids of the text, (n,) uint16. Special tokens in the text stay ordinary text."""
    try:
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        ids = tokenizer.encode_to_numpy(utf8(text).decode(), disallowed_special=())
    return np.concatenate(([tokenizer.eot_token], ids)).astype(np.uint16)


class Shard(NamedTuple):
    """A sequence of token ids: `n_tokens` uint16 after `offset` bytes of a file, or an array in memory."""

    path: Path
    n_tokens: int
    offset: int = 0
    tokens: np.ndarray | None = None


def open_shard(path: Path) -> Shard:
    """Read a shard's header. Raises ValueError if it is not a shard or has the wrong size."""
    try:
        if path.suffix == ".bin":
            header, offset = np.fromfile(path, dtype="<i4", count=256), LLMC_HEADER
            if len(header) < 256 or (header[0], header[1]) != (LLMC_MAGIC, 1):
                raise ValueError("no llm.c header with uint16 tokens")
            n_tokens = int(header[2])
        else:
            array = np.load(path, mmap_mode="r")  # reads the header only
            if array.dtype != np.dtype("<u2") or array.ndim != 1:
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not one row of uint16")
            n_tokens, offset = len(array), array.offset
    except Exception as error:  # numpy parses the header as Python and raises many kinds
        raise ValueError(f"{path} is not a token shard: {files.one_line(error)}") from error
    expected, size = offset + 2 * n_tokens, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header says {expected:,}: restore it or run fineweb.py again")
    return Shard(path, n_tokens, offset)


def read_manifest(folder: str | Path) -> dict | None:
    """The manifest.json that fineweb.py wrote into a folder; None if there is none (shards of other tools)."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        _ = manifest["tokenizer"], manifest["complete"]
        _ = [(entry["file"], entry["n_tokens"], entry["crc32"]) for entry in manifest["shards"]]
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path} ({error}): remove it to use the shards unchecked") from error


def list_shards(folder: Path) -> tuple[list[Shard], list[Shard]]:
    """The training and the validation shards of a folder, sorted by name; headers and sizes are checked."""
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".npy", ".bin"))
    train, val = ([open_shard(p) for p in paths if split in p.name] for split in ("train", "val"))
    if not train or not val:
        missing = "validation" if train else "training"
        raise ValueError(f"no {missing} shards in {folder}: run `python fineweb.py` to write them")
    return train, val


def scan_shard(shard: Shard) -> list[int]:
    """Read a whole shard; return [CRC-32 of its token bytes, largest id]."""
    crc, largest = 0, -1
    with open(shard.path, "rb") as file:
        file.seek(shard.offset)
        while piece := file.read(2**24):
            crc = zlib.crc32(piece, crc)
            largest = max(largest, int(np.frombuffer(piece, dtype="<u2").max()))
    return [crc, largest]


def check_shards(folder: str | Path, n_tokens: int) -> None:
    """Read every shard once. Raises ValueError if one is missing, differs from the manifest, or has an id of `n_tokens`
    or above. Results are cached in `checked.json` by size and modification time.
    """
    folder = Path(folder)
    shards = {shard.path.name: shard for split in list_shards(folder) for shard in split}
    manifest = read_manifest(folder) or {"complete": True, "shards": []}
    if not manifest["complete"]:
        raise ValueError(f"{folder} is incomplete: run the same `python fineweb.py` command again to continue")
    listed = {entry["file"]: [entry["n_tokens"], entry["crc32"]] for entry in manifest["shards"]}
    if missing := listed.keys() - shards.keys():
        raise ValueError(f"{folder / min(missing)} is missing: restore it, or run fineweb.py into a new folder")
    cache, known = folder / "checked.json", {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        known = {name: [*map(int, entry)] for name, entry in json.loads(cache.read_text()).items()}
    stamps = {name: [s.path.stat().st_size, s.path.stat().st_mtime_ns] for name, s in shards.items()}
    unread = [name for name in shards if known.get(name, [])[:2] != stamps[name]]
    with ThreadPoolExecutor(8) as pool:  # reading, crc32 and max release the GIL
        for name, result in zip(unread, pool.map(lambda name: scan_shard(shards[name]), unread)):
            known[name] = stamps[name] + result
    for name, shard in shards.items():
        crc, largest = known[name][2:]
        if largest >= n_tokens:
            raise ValueError(f"{shard.path} holds the id {largest}, but the tokenizer has {n_tokens} ids")
        if listed and listed.get(name) != [shard.n_tokens, crc]:
            raise ValueError(f"{shard.path} differs from {MANIFEST}: restore it, or run fineweb.py into a new folder")
    with contextlib.suppress(OSError), files.atomic_write(cache) as temporary:  # the folder can be read-only
        temporary.write_text(json.dumps(known))


def read_text(path: Path, tokenizer: tiktoken.Encoding) -> tuple[list[Shard], list[Shard]]:
    """Tokenize a text file into a training and a validation shard in memory.

    A line `<|endoftext|>` separates documents; the last 10 % of them are validation. A file with a single document is
    split at 90 % of its characters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    documents = [part for part in re.split(rf"\n?^{re.escape(EOT)}$\n?", text, flags=re.M) if part]
    n = min(int(0.9 * len(documents)), len(documents) - 1)
    splits = documents[:n], documents[n:]
    if len(documents) < 2:
        text = "".join(documents)
        splits = [text[: int(0.9 * len(text))]], [text[int(0.9 * len(text)) :]]
    tokens = [np.concatenate([encode_document(tokenizer, part) for part in split]) for split in splits]
    train, val = ([Shard(path, len(ids), 0, ids)] for ids in tokens)
    return train, val


def open_data(path: str | Path, tokenizer: tiktoken.Encoding) -> tuple[list[Shard], list[Shard]]:
    """The (training, validation) shards of a folder or a text file. Call `check_shards` on a folder first."""
    path = Path(path)
    if not path.exists():
        demo = "`python train_gpt2.py demo` for a first run"
        raise FileNotFoundError(f"no data in {path}: run `python fineweb.py` to write shards, or {demo}")
    if path.is_file():
        return read_text(path, tokenizer)
    manifest = read_manifest(path)
    if manifest and manifest["tokenizer"] != tokenizer.name:
        raise ValueError(f"{path} was written with --tokenizer={manifest['tokenizer']}, not {tokenizer.name}")
    return list_shards(path)


class Windows:
    """Shards cut into windows of T + 1 tokens: window w of a shard holds its tokens wT … wT + T."""

    def __init__(self, shards: list[Shard], T: int) -> None:
        self.shards = shards
        self.T = T
        self.ends = np.cumsum([max(0, shard.n_tokens - 1) // T for shard in shards], dtype=np.int64)
        self.files: dict[int, object] = {}  # open files, by shard
        if not len(self):
            longest = max(shards, key=lambda shard: shard.n_tokens)
            raise ValueError(f"{longest.path} has {longest.n_tokens} tokens, fewer than T + 1 = {T + 1}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Window numbers (n,) int64 -> tokens (n, T + 1) int64. Not thread-safe.

        Files are read, not memory-mapped: mapped pages would count as this process's memory and grow with it.
        """
        out = np.empty((len(windows), self.T + 1), dtype=np.uint16)
        shard_numbers = np.searchsorted(self.ends, windows, side="right")
        for row, window, number in zip(out, windows, shard_numbers):
            shard = self.shards[number]
            start = int(window - (self.ends[number - 1] if number else 0)) * self.T
            if shard.tokens is not None:
                row[:] = shard.tokens[start : start + self.T + 1]
                continue
            if number not in self.files:
                if len(self.files) == 64:  # the limit of a process is about 1,000 open files
                    self.files.pop(next(iter(self.files))).close()
                self.files[number] = open(shard.path, "rb", buffering=0)
            file = self.files[number]
            file.seek(shard.offset + 2 * start)
            if file.readinto(row.data) != row.nbytes:
                raise OSError(f"{shard.path} was truncated while it was read")
        return out.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64: every input bit affects every output bit (splitmix64's finalizer)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of i, (k,) int64, under a random permutation of 0 … n - 1 drawn from (seed, epoch).

    Computed, not stored: a Feistel network permutes the next even power of two, and results outside 0 … n - 1 are
    permuted again (cycle walking, Black and Rogaway 2002), fewer than four times on average.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(
        np.arange(1, 9, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        ^ mix(np.uint64([seed]) ^ mix(np.uint64([epoch])))
    )
    out = i.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def windows_at(position: int, n: int, n_windows: int, seed: int) -> np.ndarray:
    """The n windows from `position` on, (n,) int64, in the order of training.

    The order is an endless sequence of epochs. Each epoch is another permutation of all windows.
    """
    place = position + np.arange(n, dtype=np.int64)
    epochs = place // n_windows
    out = np.empty_like(place)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        out[here] = permute(place[here] % n_windows, n_windows, seed, epoch)
    return out


Item = TypeVar("Item")


def prefetch(make: Callable[[int], Item], start: int, stop: int, depth: int = 2) -> Iterator[Item]:
    """Yield make(start) … make(stop - 1), computed up to `depth` ahead on a thread, which forwards exceptions."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(make, step) for step in range(start, min(start + depth, stop)))
        for step in range(start, stop):
            item = ahead.popleft().result()
            if step + depth < stop:
                ahead.append(pool.submit(make, step + depth))
            yield item
