"""Tokenizers, token shards on disk, and the order in which training reads them.

A data folder holds shards of uint16 token ids, `*val*` for validation and `*train*` for training: `.npy` as
`fineweb.py` writes them (and build-nanogpt), or llm.c's `.bin`. A text file may stand wherever a folder does.

The order is a pure function of (seed, step): nothing is stored, nothing depends on the number of devices or
on the micro-batch, and any step can be asked for at once. That is why a resumed or moved run sees the same
batches.
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

from files import one_line, written_whole

EOT = "<|endoftext|>"  # begins every document; in a text file, a line of its own between documents
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # .bin: 256 int32 (magic, version 1, token count, …), then uint16
MANIFEST = "manifest.json"
REMEDY = "restore it, or remove the folder and run fineweb.py again"  # for a shard that is missing or foreign
TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

# -----------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50257 ids, end-of-text 50256) or "bytes" (257, 256; no download)."""
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"(?s:.{1,400})",  # in pieces, because a piece of megabytes takes gigabytes
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={EOT: 256},
            explicit_n_vocab=257,
        )
    if name != "gpt2":
        raise SystemExit(f"unknown tokenizer {name!r}: expected 'gpt2' or 'bytes'")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(__file__).parent / ".cache" / "tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' and tiktoken's many ways to say that it could not be fetched
        raise SystemExit(
            f"cannot get the GPT-2 vocabulary ({type(error).__name__}). Offline, copy the two files "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
            f"6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json) from a machine that has "
            f"them into {folder}, or set TIKTOKEN_CACHE_DIR"
        ) from error


def utf8(text: str) -> bytes:
    """A text in UTF-8; lone surrogates, which JSON can spell, are replaced as encode_ordinary does."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def encode_document(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """End-of-text, then the text's ids, as uint16. Specials spelled out in it stay ordinary text."""
    try:
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())  # no list of Python integers on the way
    except UnicodeEncodeError:
        ids = tokenizer.encode_to_numpy(utf8(text).decode(), disallowed_special=())
    return np.concatenate(([tokenizer.eot_token], ids)).astype(np.uint16)


def prompt_text(instruction: str, context: str = "") -> str:
    """The one prompt template: what the model reads before its response."""
    return f"{instruction}\nContext:\n{context}\nResponse:\n" if context else f"{instruction}\nResponse:\n"


# -----------------------------------------------------------------------------
# Shards


class Shard(NamedTuple):
    """A run of token ids: `n_tokens` uint16 behind `offset` bytes of a file, or an array in memory."""

    path: Path
    n_tokens: int
    offset: int = 0
    tokens: np.ndarray | None = None


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write token ids, (n,) uint16, as `.npy`, whole or not at all."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        # np.save would do, but where the disk is full it does not say why
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(np.ascontiguousarray(tokens).data)


def open_shard(path: Path) -> Shard:
    """Read a shard's header and check it against the file's size; SystemExit says what is wrong."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".bin":
                header = np.fromfile(file, dtype="<i4", count=256)
                if len(header) < 256 or header[0] != LLMC_MAGIC or header[1] != 1:
                    raise ValueError("no llm.c header with uint16 tokens")
                n_tokens, offset = int(header[2]), LLMC_HEADER
            else:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                shape, _, dtype = read[version](file)
                if dtype != np.dtype("<u2") or len(shape) != 1:
                    raise ValueError(f"it holds {dtype} of shape {shape}, not a row of uint16")
                n_tokens, offset = shape[0], file.tell()
    except Exception as error:  # numpy parses the header as Python, with as many ways to fail
        raise SystemExit(f"{path} is not a token shard: {one_line(error)}") from error
    expected, size = offset + 2 * n_tokens, path.stat().st_size
    if size != expected:
        raise SystemExit(
            f"{path} is {'truncated' if size < expected else 'too long'}: {size:,} of {expected:,} bytes"
        )
    return Shard(path, n_tokens, offset)


def read_manifest(folder: Path) -> dict | None:
    """The folder's manifest.json as `fineweb.py` wrote it; None where there is none (shards of others)."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        (
            manifest["tokenizer"],
            manifest["complete"],
            {s["file"]: (s["n_tokens"], s["crc32"]) for s in manifest["shards"]},
        )
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): remove it to use the shards unchecked") from error


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json, whole or not at all."""
    with written_whole(Path(folder) / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def scan_shard(shard: Shard) -> tuple[int, int]:
    """Read a whole shard in pieces; return (CRC-32 of its token bytes, largest id)."""
    crc, largest = 0, -1
    with open(shard.path, "rb") as file:
        file.seek(shard.offset)
        while piece := file.read(2**24):
            crc = zlib.crc32(piece, crc)
            largest = max(largest, int(np.frombuffer(piece, dtype="<u2").max()))
    return crc, largest


def list_shards(folder: Path) -> tuple[list[Shard], list[Shard]]:
    """The training and the validation shards of a folder, by name, with headers and sizes checked."""
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".npy", ".bin"))
    train = [open_shard(p) for p in paths if "train" in p.name]
    val = [open_shard(p) for p in paths if "val" in p.name]
    if not train or not val:
        kind = "training" if not train else "validation"
        raise SystemExit(
            f"no {kind} shards in {folder}: run `python fineweb.py` to write them, "
            "or `python train_gpt2.py demo` for a first run on input.txt"
        )
    return train, val


def check_shards(folder: str | Path, n_tokens: int) -> None:
    """Read every shard once; SystemExit at the first that is missing, foreign, or has ids of `n_tokens` or
    above.

    What was read is noted in `checked.json` beside the shards (where that can be written) by size and time of
    change, so the next start need not read it again.
    """
    folder = Path(folder)
    shards = [shard for split in list_shards(folder) for shard in split]
    manifest = read_manifest(folder)
    if manifest and not manifest["complete"]:
        raise SystemExit(
            f"{folder} is incomplete: run the same `python fineweb.py` again, it continues where it stopped"
        )
    listed = {s["file"]: (s["n_tokens"], s["crc32"]) for s in manifest["shards"]} if manifest else {}
    for name in listed.keys() - {shard.path.name for shard in shards}:
        raise SystemExit(f"{folder / name} is missing, and {MANIFEST} lists it: {REMEDY}")

    notes = folder / "checked.json"
    try:
        known = {
            name: [*map(int, note)] for name, note in json.loads(notes.read_text()).items() if len(note) == 4
        }
    except (OSError, ValueError, TypeError, AttributeError):
        known = {}
    stamps = {s.path: [s.path.stat().st_size, s.path.stat().st_mtime_ns] for s in shards}
    unread = [s for s in shards if known.get(s.path.name, [])[:2] != stamps[s.path]]
    with ThreadPoolExecutor(8) as pool:  # reading, crc32 and max all release the GIL
        scans = dict(zip(unread, pool.map(scan_shard, unread)))
    for shard in shards:
        crc, largest = scans[shard] if shard in scans else known[shard.path.name][2:]
        if largest >= n_tokens:
            raise SystemExit(
                f"{shard.path} holds the id {largest}, but the tokenizer has only {n_tokens} ids"
            )
        if manifest and listed.get(shard.path.name) != (shard.n_tokens, crc):
            raise SystemExit(f"{shard.path} is not the shard that {MANIFEST} describes: {REMEDY}")
        known[shard.path.name] = [*stamps[shard.path], crc, largest]
    if unread and os.access(folder, os.W_OK):
        with contextlib.suppress(SystemExit), written_whole(notes) as temporary:  # the disk may be full
            temporary.write_text(json.dumps(known))


def read_text(path: str | Path, tokenizer: tiktoken.Encoding) -> tuple[list[Shard], list[Shard]]:
    """Tokenise a text file into a training and a validation shard, held in memory.

    Documents are separated by a line `<|endoftext|>`; the last 10 % of them are validation. A file that is
    one document is cut at nine tenths of its characters.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not a text in UTF-8: {error}") from error
    documents = [
        document for document in re.split(rf"\n?^{re.escape(EOT)}$\n?", text, flags=re.M) if document
    ]
    if len(documents) < 2:
        text = "".join(documents)
        n = int(0.9 * len(text))
        splits = [text[:n]], [text[n:]]
    else:
        n = min(int(0.9 * len(documents)), len(documents) - 1)
        splits = documents[:n], documents[n:]
    shards = [
        np.concatenate([encode_document(tokenizer, document) for document in split]) for split in splits
    ]
    return [Shard(Path(path), len(shards[0]), 0, shards[0])], [
        Shard(Path(path), len(shards[1]), 0, shards[1])
    ]


def require_data(path: str | Path) -> None:
    """SystemExit that says where data comes from, unless `path` is a file or a folder."""
    if Path(path).name == "tinyshakespeare.txt" and not Path(path).exists():
        raise SystemExit(f"no file {path}: fetch it with `curl -o {path} {TINY_SHAKESPEARE}`")
    if not Path(path).exists():
        raise SystemExit(
            f"no shards in {path}: run `python fineweb.py` to write them, "
            "or `python train_gpt2.py demo` for a first run on input.txt"
        )


def open_data(path: str | Path, tokenizer: tiktoken.Encoding) -> tuple[list[Shard], list[Shard]]:
    """The (training, validation) shards of a folder or a text file. Let `check_shards` see a folder first."""
    require_data(path)
    path = Path(path)
    if path.is_file():
        return read_text(path, tokenizer)
    manifest = read_manifest(path)
    if manifest and manifest["tokenizer"] != tokenizer.name:
        raise SystemExit(
            f"{path} was written with the tokenizer {manifest['tokenizer']!r}, not {tokenizer.name!r}"
        )
    return list_shards(path)


# -----------------------------------------------------------------------------
# The deterministic loader


class Windows:
    """Shards cut into windows of T + 1 tokens: window w of a shard is its tokens wT … wT + T."""

    def __init__(self, shards: list[Shard], T: int) -> None:
        self.shards = shards
        self.T = T
        self.ends = np.cumsum([max(0, shard.n_tokens - 1) // T for shard in shards], dtype=np.int64)
        self.files: dict[int, object] = {}  # open files, by shard
        if not len(self):
            longest = max(shards, key=lambda shard: shard.n_tokens)
            raise SystemExit(
                f"{longest.path} has {longest.n_tokens} tokens, fewer than one window of T + 1 = {T + 1}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Windows by number, (n,) int64 -> their tokens, (n, T + 1) int64. Not for two threads at once.

        Files are read, not mapped: mapped pages would count as this process's memory and grow with the data.
        """
        out = np.empty((len(windows), self.T + 1), dtype=np.uint16)
        of_shard = np.searchsorted(self.ends, windows, side="right")
        for row, window, number in zip(out, windows, of_shard):
            shard = self.shards[number]
            start = int(window - (self.ends[number - 1] if number else 0)) * self.T
            if shard.tokens is not None:
                row[:] = shard.tokens[start : start + self.T + 1]
                continue
            if number not in self.files:
                # a process may hold about a thousand open, and 100B tokens are as many shards
                if len(self.files) == 64:
                    self.files.pop(next(iter(self.files))).close()
                self.files[number] = open(shard.path, "rb", buffering=0)
            file = self.files[number]
            file.seek(shard.offset + 2 * start)
            if file.readinto(row.data) != row.nbytes:
                raise OSError(f"{shard.path} became shorter while it was read")
        return out.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64: every bit of the input moves every bit of the output (splitmix64's)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a random permutation of 0 … n - 1, drawn from (seed, epoch), sends i, (k,) int64; nothing is
    stored.

    A Feistel network permutes the next even power of two; what falls outside 0 … n - 1 is sent on until it is
    inside (cycle walking: Black and Rogaway 2002), which takes fewer than four rounds on average.
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


def step_windows(step: int, batch: int, n_windows: int, seed: int) -> np.ndarray:
    """The windows of a training step, (batch,) int64: numbers step · batch … of the epochs laid end to end.

    Each epoch is a permutation of its own of all windows; a batch may span two.
    """
    place = step * batch + np.arange(batch, dtype=np.int64)
    epochs = place // n_windows
    out = np.empty_like(place)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        out[here] = permute(place[here] % n_windows, n_windows, seed, epoch)
    return out


Item = TypeVar("Item")


def prefetch(make: Callable[[int], Item], start: int, stop: int, depth: int = 2) -> Iterator[Item]:
    """Yield make(start) … make(stop - 1), up to `depth` ahead on a thread; its exceptions arrive here."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(make, step) for step in range(start, min(start + depth, stop)))
        for step in range(start, stop):
            item = ahead.popleft().result()
            if step + depth < stop:
                ahead.append(pool.submit(make, step + depth))
            yield item
