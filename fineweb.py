"""FineWeb-Edu, or any text in parquet or jsonl files -> shards of token ids, which train_gpt2.py reads.

    python fineweb.py                                           # FineWeb-Edu sample-10BT -> edu_fineweb10B
    python fineweb.py sample-100BT --out_dir=/big/disk/edu100B  # another configuration, another folder
    python fineweb.py --max_tokens=1000000000                   # only the first billion tokens
    python fineweb.py --data='books-*.parquet' --out_dir=books  # local files: one, a folder, or a pattern
    python fineweb.py --data=hf://datasets/OWNER/NAME/FOLDER --out_dir=NAME  # another dataset of the hub
    pip install gigatoken                                       # optional: several times faster, same shards

Files are .parquet with a column `text`, or .jsonl with a field `text`. Documents that are empty (or only
white space) or not text are counted and skipped. Each begins with end-of-text; one may span two shards.

Writes <out_dir>/val_000000.npy (validation), train_000001.npy, … (training): uint16, `shard_size` tokens
each, the last one shorter; and manifest.json: what they hold, and whether all are there. Files of the hub are
fetched one ahead into <out_dir>/download and deleted when read.

Stopped at any moment (Ctrl-C, kill -9, power loss) and started again by the same command, it continues after
the last finished shard and gives the same bytes as a run that never stopped, whatever the number of workers.

Disk, checked first: 2 bytes per token and two files of the hub (sample-10BT: 20 GB and twice 2.2 GB).
Memory: 0.6 GB for the main process and 0.2 GB for a worker (500 MB of novels in one row group); parquet is
read page by page, so a page of hundreds of MB takes more. Time: 4.6 million tokens/s on 2 cores of a Xeon at
2.5 GHz (73 MB of novels, Python 3.11, tiktoken 0.14); at that rate 36 minutes for sample-10BT.
"""

import functools
import glob
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data import (
    MANIFEST,
    encode_document,
    get_tokenizer,
    open_shard,
    read_manifest,
    utf8,
    write_manifest,
    write_shard,
)
from files import make_folder, one_line, require_space

HUB = "hf://datasets/"


@dataclass(frozen=True)
class Config:
    data: str = HUB + "HuggingFaceFW/fineweb-edu/sample/10BT"  # hub folder; or local file, folder or pattern
    out_dir: str = "edu_fineweb10B"  # folder for the shards; then `python train_gpt2.py --data=<out_dir>`
    tokenizer: str = "gpt2"  # "gpt2" (50257 ids) or "bytes" (257 ids, needs no download)
    shard_size: int = 10**8  # tokens per shard; the first shard is validation
    max_tokens: int = 0  # stop after so many tokens; 0 = everything
    workers: int = 0  # processes that tokenise; 0 = one per core
    encoder: Literal["auto", "tiktoken", "gigatoken"] = "auto"  # auto: gigatoken if installed and it agrees


CONFIGS = {
    "sample-10BT": Config(),
    "sample-100BT": Config(data=HUB + "HuggingFaceFW/fineweb-edu/sample/100BT", out_dir="edu_fineweb100B"),
    "sample-350BT": Config(data=HUB + "HuggingFaceFW/fineweb-edu/sample/350BT", out_dir="edu_fineweb350B"),
}

SUFFIXES = (".parquet", ".jsonl")
CHUNK_BYTES = 2**20  # of documents in one task: much against the cost of a task, little against memory
CHECKED_BYTES = 2**18  # of documents that gigatoken and tiktoken must agree on, at the start of every run
IN_FLIGHT_BYTES = 2**28  # of documents handed to the workers and not yet back, at most
BYTES_PER_TOKEN = {"gpt2": 4.5, "bytes": 1}  # of English on the web; only for estimates
TEXT_PER_HUB_BYTE = 1.6  # text in FineWeb-Edu's parquet files, against their size; only for estimates

# -----------------------------------------------------------------------------
# Finding documents


def find_local(pattern: str) -> list[Path]:
    """The .parquet and .jsonl files that a file, a folder or a pattern names, sorted; SystemExit if none."""
    if os.path.isdir(pattern):
        names = [os.path.join(pattern, name) for name in os.listdir(pattern)]
    else:
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(Path(name) for name in names if name.endswith(SUFFIXES) and os.path.isfile(name))
    if not paths:
        raise SystemExit(
            f"no .parquet or .jsonl file at --data={pattern}: give a file, a folder, a pattern, "
            f"or {HUB}OWNER/NAME/FOLDER"
        )
    return paths


@contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Turn any error of the hub into a `SystemExit` of one line that names what was asked for."""
    try:
        yield
    except Exception as error:  # no network, no such name, HTTP 429, a full disk, …: they share no class
        raise SystemExit(
            f"cannot get {what} from the Hugging Face hub ({type(error).__name__}: {one_line(error)}). "
            "Check name and network, then run the same command again: it continues where it stopped"
        ) from error


def split_url(url: str) -> tuple[str, str]:
    """hf://datasets/OWNER/NAME/FOLDER -> (OWNER/NAME, FOLDER)."""
    owner, name, folder = [*url.removeprefix(HUB).strip("/").split("/", 2), "", ""][:3]
    if not owner or not name:
        raise SystemExit(f"--data={url} names no dataset: expected {HUB}OWNER/NAME/FOLDER")
    return f"{owner}/{name}", folder


def find_on_hub(url: str) -> tuple[str, list[dict]]:
    """The newest commit of a dataset and the .parquet and .jsonl files below a folder of it, sorted."""
    from huggingface_hub import HfApi

    repo, folder = split_url(url)
    with asking_hub(url):
        revision = HfApi().dataset_info(repo).sha
        at = {"revision": revision, "repo_type": "dataset"}
        entries = HfApi().list_repo_tree(repo, folder or None, recursive=True, **at)
        files = [{"name": e.path, "size": e.size} for e in entries if e.path.endswith(SUFFIXES)]
    if not files:
        raise SystemExit(f"--data={url} holds no .parquet or .jsonl file")
    return revision, sorted(files, key=lambda file: file["name"])


def find_source(data: str, manifest: dict | None) -> tuple[dict, list[Path]]:
    """What `data` stands for, as the manifest records it, and the paths of its files (none if on the hub)."""
    if not data.startswith(HUB):
        paths = find_local(data)
        files = [{"name": path.name, "size": path.stat().st_size} for path in paths]
        return {"data": os.path.basename(os.path.normpath(data)), "revision": None, "files": files}, paths
    if manifest and manifest.get("source", {}).get("data") == data:
        return manifest["source"], []  # the dataset may have changed since: keep to the commit begun with
    revision, files = find_on_hub(data)
    return {"data": data, "revision": revision, "files": files}, []


def in_background(call: Callable[..., Path], *args: object) -> Future:
    """call(*args) on a thread of its own, which unlike an executor's never holds up the program's end."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def download(source: dict, number: int, folder: Path) -> Path:
    """Fetch one file of a source into `folder`; what an earlier run fetched of it is not fetched again."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # they would write over ours
    repo, name = split_url(source["data"])[0], source["files"][number]["name"]
    with asking_hub(name):
        where = {"repo_type": "dataset", "revision": source["revision"], "local_dir": folder}
        return Path(hf_hub_download(repo, name, **where))


def iter_downloads(source: dict, start: int, folder: Path) -> Iterator[Path]:
    """Yield a source's files from number `start` on, fetching one ahead; delete each after it was read."""
    ahead = in_background(download, source, start, folder)
    for number, file in enumerate(source["files"][start:], start):
        if not ahead.done():
            tqdm.write(f"downloading {file['name']} ({file['size'] / 1e9:.2f} GB)")
        path = ahead.result()
        if number + 1 < len(source["files"]):
            ahead = in_background(download, source, number + 1, folder)
        yield path
        path.unlink()


# -----------------------------------------------------------------------------
# Reading documents


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an unreadable file into a `SystemExit` of one line."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise SystemExit(f"cannot read {path} ({one_line(error)}): replace it and run again") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file; SystemExit if it is unreadable or has no column of text."""
    with reading(path):
        # With a buffer a column streams; without, all that a row group has of it is read at once.
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    schema = file.schema_arrow
    if schema.names.count("text") != 1:
        raise SystemExit(f"{path} has no column `text`, only {', '.join(schema.names)}: rename one of them")
    try:
        pa.array([], schema.field("text").type).cast(pa.large_binary())
    except pa.ArrowException as error:
        raise SystemExit(f"the column `text` of {path} is {schema.field('text').type}, not text") from error
    return file


def text_bytes(path: Path) -> int:
    """About how many bytes of text a file holds, from its metadata; SystemExit if it cannot be read."""
    if path.suffix == ".jsonl":
        return path.stat().st_size
    with open_parquet(path) as file:
        metadata = file.metadata
    column = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index("text")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return sum(group.column(column).total_uncompressed_size for group in groups)


def read_parquet(path: Path, start: int) -> Iterator[tuple[bytes | None, float]]:
    """Yield (text in UTF-8 or None, fraction of the file read) for each row from number `start` on."""
    with open_parquet(path) as file:
        n_rows = file.metadata.num_rows
        groups = list(range(file.num_row_groups))
        row = 0
        while groups and row + (n := file.metadata.row_group(groups[0]).num_rows) <= start:
            row += n
            groups.pop(0)
        per_row = text_bytes(path) // max(1, n_rows) + 1
        batch_size = max(1, min(64, CHUNK_BYTES // per_row))  # fewer rows where they are long
        for batch in file.iter_batches(batch_size, groups, columns=["text"]):
            texts = batch.column(0).cast(pa.large_binary())  # bytes, because it need not be valid UTF-8
            for text in texts.to_pylist():
                row += 1
                if row > start:
                    yield text, row / n_rows


def read_jsonl(path: Path, start: int) -> Iterator[tuple[bytes, float]]:
    """Yield (line, fraction of the file read) for each line from number `start` on."""
    size, place = path.stat().st_size, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            place += len(line)
            if number >= start:
                yield line, place / size


class Chunk(NamedTuple):
    """Consecutive documents of one file."""

    file: int  # number of the file in the source
    start: int  # number of the first document in the file
    documents: list[bytes | None]  # rows of parquet or lines of jsonl, as they stand
    is_json: bool
    n_bytes: int
    done: float  # fraction of the file read, this chunk included


def read_chunks(paths: Iterable[Path], file: int, start: int) -> Iterator[Chunk]:
    """Cut files, the first of which is number `file`, into chunks, beginning with its document `start`."""
    for number, path in enumerate(paths, file):
        is_json = path.suffix != ".parquet"
        documents, n_bytes = [], 0
        with reading(path):
            for document, done in read_jsonl(path, start) if is_json else read_parquet(path, start):
                documents.append(document)
                n_bytes += len(document or b"") + 64  # and the object around it: empty ones take memory too
                if n_bytes >= CHUNK_BYTES:
                    yield Chunk(number, start, documents, is_json, n_bytes, done)
                    start += len(documents)
                    documents, n_bytes = [], 0
        if documents:
            yield Chunk(number, start, documents, is_json, n_bytes, 1.0)
        start = 0


# -----------------------------------------------------------------------------
# Tokenising in worker processes. They import this file too: nothing above may import torch.

cached_tokenizer = functools.cache(get_tokenizer)  # one per worker


def start_worker(tokenizer: str) -> None:
    """Make this process a worker: it has a tokenizer, ignores Ctrl-C, and ends when the main process died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    cached_tokenizer(tokenizer)


def start_workers(n_workers: int, tokenizer: str) -> ProcessPoolExecutor:
    """Start worker processes, in whichever way (fork, forkserver, spawn) is Python's default."""
    pool = ProcessPoolExecutor(n_workers, initializer=start_worker, initargs=(tokenizer,))
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: deaf to Ctrl-C from the first moment
    for _ in range(n_workers):
        pool.submit(int)  # a process starts only when there is work for it
    signal.signal(signal.SIGINT, answer)
    return pool


def text_of(document: bytes | None, is_json: bool) -> str:
    """The text of a row of parquet or a line of jsonl; "" where there is none or only white space."""
    try:
        text = json.loads(document)["text"] if is_json else (document or b"").decode()
    except (ValueError, LookupError, TypeError, RecursionError):  # bad UTF-8, bad JSON, no field, no object
        return ""
    return text if isinstance(text, str) and not text.isspace() else ""


def find_gigatoken() -> bool:
    """Whether the package gigatoken is installed."""
    return importlib.util.find_spec("gigatoken") is not None


@functools.cache
def gigatoken_encoder() -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """gigatoken with the GPT-2 vocabulary: texts -> (ids end to end, (n,); ids of each, (n_texts,))."""
    import awkward  # gigatoken's own dependency
    import gigatoken

    encoding = cached_tokenizer("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder) / "gpt2.tiktoken"
        with open(ranks, "wb") as file:
            tokens = encoding.token_byte_values()
            for number, token in sorted((encoding.encode_single_token(token), token) for token in tokens):
                file.write(b64encode(token) + b" %d\n" % number)
        # without special tokens: spelled out in a text they stay text
        encoder = gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2", special_tokens={})

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = encoder.encode_batch([utf8(text) for text in texts], parallel=False)  # one process a core does
        return np.asarray(awkward.flatten(rows)), np.asarray(awkward.num(rows))

    return encode


def tokenize(
    tokenizer: str, encoder: str, documents: list[bytes | None], is_json: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Documents -> (their tokens end to end, (n,) uint16; tokens of each, (n_documents,), 0 = skipped)."""
    encoding = cached_tokenizer(tokenizer)
    texts = [text_of(document, is_json) for document in documents]
    if encoder == "tiktoken":
        tokens = [encode_document(encoding, text) if text else np.empty(0, np.uint16) for text in texts]
        return np.concatenate(tokens), np.array([len(ids) for ids in tokens])
    lengths = np.zeros(len(texts), dtype=np.int64)
    kept = np.array([bool(text) for text in texts])
    if not kept.any():
        return np.empty(0, np.uint16), lengths
    ids, n_ids = gigatoken_encoder()([text for text in texts if text])
    lengths[kept] = n_ids + 1  # and end-of-text before each
    tokens = np.full(lengths.sum(), encoding.eot_token, dtype=np.uint16)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[(np.cumsum(lengths) - lengths)[kept]] = False
    tokens[is_text] = ids
    return tokens, lengths


def choose_encoder(cfg: Config, chunks: Iterator[Chunk]) -> tuple[str, Iterator[Chunk]]:
    """ "gigatoken" where it is wanted and gives tiktoken's ids for the first documents, else "tiktoken"; and
    the chunks, all of them.
    """
    if cfg.tokenizer != "gpt2" or cfg.encoder == "tiktoken" or not find_gigatoken():
        return "tiktoken", chunks
    first = next(chunks, None)
    if first is None:
        return "tiktoken", chunks
    ends = np.cumsum([len(document or b"") for document in first.documents])
    documents = first.documents[: np.searchsorted(ends, CHECKED_BYTES) + 1]
    expected = tokenize(cfg.tokenizer, "tiktoken", documents, first.is_json)
    try:
        found = tokenize(cfg.tokenizer, "gigatoken", documents, first.is_json)
        problem = "" if all(map(np.array_equal, found, expected)) else "gives other ids than tiktoken"
    except Exception as error:  # another version of it may fail in any way
        problem = f"fails ({type(error).__name__}: {one_line(error)})"
    if problem:
        tqdm.write(f"gigatoken {problem}: going on with tiktoken")
    else:
        tqdm.write(
            f"encoding with gigatoken: the same ids as tiktoken on the first {len(documents)} documents"
        )
    return "tiktoken" if problem else "gigatoken", chain([first], chunks)


Result = tuple[Chunk, np.ndarray, np.ndarray]  # a chunk and what `tokenize` makes of it


def tokenize_all(
    chunks: Iterable[Chunk], pool: ProcessPoolExecutor, n_workers: int, tokenizer: str, encoder: str
) -> Iterator[Result]:
    """Tokenise chunks and yield them in order, reading only as far ahead as keeps the workers busy."""
    pending: deque[tuple[Chunk, Future]] = deque()
    in_flight = 0
    for chunk in chunks:
        pending.append((chunk, pool.submit(tokenize, tokenizer, encoder, chunk.documents, chunk.is_json)))
        in_flight += chunk.n_bytes
        while len(pending) > 4 * n_workers or in_flight > IN_FLIGHT_BYTES:
            first, future = pending.popleft()
            in_flight -= first.n_bytes
            yield first, *future.result()
    for chunk, future in pending:
        yield chunk, *future.result()


# -----------------------------------------------------------------------------
# Writing shards


def add_shard(folder: Path, manifest: dict, tokens: np.ndarray) -> None:
    """Write the next shard and enter it in the manifest (which is not written)."""
    number = len(manifest["shards"])
    name = f"{'train' if number else 'val'}_{number:06d}.npy"
    write_shard(folder / name, tokens)
    manifest["shards"].append({"file": name, "n_tokens": len(tokens), "crc32": zlib.crc32(tokens)})


def count(lengths: np.ndarray, counts: dict[str, int]) -> dict[str, int]:
    """Add documents of these lengths in tokens (0 = skipped) to the counts."""
    kept = int(np.count_nonzero(lengths))
    more = {"n_documents": kept, "n_skipped": len(lengths) - kept}
    return {key: counts[key] + more[key] for key in more}


def write_shards(results: Iterable[Result], folder: Path, manifest: dict, bar: tqdm) -> None:
    """Cut the tokens into shards, from where the manifest stands to the end, and keep it up to date on disk.

    After each shard the manifest says where the next one begins. A full shard is written only when another
    token comes, because a source that ends with its first shard is divided into validation and training.
    """
    shard_size, max_tokens, n_tokens = (manifest[key] for key in ("shard_size", "max_tokens", "n_tokens"))
    shares = np.cumsum([0] + [file["size"] for file in manifest["source"]["files"]])  # bytes before each file
    counts = {key: manifest[key] for key in ("n_documents", "n_skipped")}
    shard, filled = np.empty(shard_size, dtype=np.uint16), 0
    used = manifest["next"]["token"]  # tokens of the chunk that went into shards; at first, before this run
    for chunk, tokens, lengths in results:
        ends = np.cumsum(lengths)
        stop = min(len(tokens), used + max_tokens - n_tokens) if max_tokens else len(tokens)
        n_tokens += stop - used
        bar.update(stop - used)
        while used < stop:
            if filled == shard_size:
                row = int(np.searchsorted(ends, used, side="right"))  # the document of the next token
                token = used - int(ends[row] - lengths[row])
                add_shard(folder, manifest, shard)
                manifest |= {"n_tokens": manifest["n_tokens"] + shard_size, **count(lengths[:row], counts)}
                manifest["next"] = {"file": chunk.file, "document": chunk.start + row, "token": token}
                write_manifest(folder, manifest)
                filled = 0
            n = min(shard_size - filled, stop - used)
            shard[filled : filled + n] = tokens[used : used + n]
            filled, used = filled + n, used + n
        used = 0
        if max_tokens and n_tokens == max_tokens:
            counts = count(lengths[: np.searchsorted(ends, stop) + 1], counts)  # up to that of the last token
            break
        counts = count(lengths, counts)
        fraction = np.interp(chunk.file + chunk.done, np.arange(len(shares)), shares) / shares[-1]
        bar.total = min(round(n_tokens / fraction), max_tokens or 2**63)

    if not filled:
        n, data = counts["n_skipped"], manifest["source"]["data"]
        raise SystemExit(f"no text in {data}: {n:,} documents, all of them empty or not text")
    if not manifest["shards"]:
        n_val = max(1, filled // 10)
        add_shard(folder, manifest, shard[:n_val])
        shard, filled = shard[n_val:], filled - n_val
    add_shard(folder, manifest, shard[:filled])
    manifest |= {"complete": True, "n_tokens": n_tokens, **counts}
    del manifest["next"]
    write_manifest(folder, manifest)


# -----------------------------------------------------------------------------
# From start to end


def begin(folder: Path, settings: dict, manifest: dict | None) -> dict:
    """The manifest to go on from, recorded or new; SystemExit if the folder has shards of other settings."""
    remedy = "remove the folder or choose another --out_dir"
    if manifest is None and any(path.suffix in (".npy", ".bin") for path in folder.glob("*")):
        raise SystemExit(f"{folder} holds shards without a {MANIFEST}: {remedy}")
    if manifest is None or not manifest["shards"]:
        counts = {"n_tokens": 0, "n_documents": 0, "n_skipped": 0, "shards": []}
        return {"complete": False, **settings, **counts, "next": {"file": 0, "document": 0, "token": 0}}
    old, new = manifest.get("source", {}), settings["source"]
    names = ("tokenizer", "shard_size", "max_tokens")
    pairs = [(f"{name} = {manifest.get(name)}", f"{name} = {settings[name]}") for name in names]
    if old.get("revision") != new["revision"]:
        pairs += [(f"data = {old.get('data')}", f"data = {new['data']}")]
    pairs += zip_longest(old.get("files", []), new["files"])
    for was, now in pairs:
        if was != now:
            raise SystemExit(f"{folder} was begun with {was}, not {now}: {remedy}")
    for entry in manifest["shards"]:
        if open_shard(folder / entry["file"]).n_tokens != entry["n_tokens"]:
            raise SystemExit(f"{folder / entry['file']} is not what {MANIFEST} describes: {remedy}")
    return manifest


def print_summary(folder: Path, manifest: dict, n_new: int, seconds: float) -> None:
    """What the folder holds, how long this run took for its n_new tokens, and what to do next."""
    n_shards, n_val = len(manifest["shards"]), manifest["shards"][0]["n_tokens"]
    n_last = manifest["shards"][-1]["n_tokens"]
    partial = f", the last partial on purpose ({n_last:,} tokens)" if n_last < manifest["shard_size"] else ""
    print(
        f"documents   {manifest['n_documents']:,}\n"
        f"skipped     {manifest['n_skipped']:,} (empty or not text)\n"
        f"tokens      {manifest['n_tokens']:,} ({manifest['tokenizer']})\n"
        f"validation  {n_val:,} tokens in 1 shard\n"
        f"training    {manifest['n_tokens'] - n_val:,} tokens, shards: {n_shards - 1}{partial}\n"
        f"time        {timedelta(seconds=round(seconds))} ({n_new / seconds:,.0f} tokens/s)\n"
        f"next        python train_gpt2.py --data={folder}"
    )


def check(cfg: Config) -> None:
    """End with a message if a constant cannot be worked with."""
    if not 2 <= cfg.shard_size <= 10**9:
        raise SystemExit(f"--shard_size={cfg.shard_size}: expected 2 … 10**9 tokens (one is held in memory)")
    if cfg.max_tokens < 0 or cfg.max_tokens == 1:
        raise SystemExit(f"--max_tokens={cfg.max_tokens}: expected 0 (everything) or at least 2")
    if cfg.encoder == "gigatoken" and not find_gigatoken():
        raise SystemExit("--encoder=gigatoken, but the package is not here: `pip install gigatoken`")
    if cfg.workers < 0:
        raise SystemExit(f"--workers={cfg.workers}: expected 0 (one per core) or more")


def main(cfg: Config) -> None:
    """Write the shards, or what is missing of them."""
    check(cfg)
    folder = Path(cfg.out_dir)
    manifest = read_manifest(folder)
    source, paths = find_source(cfg.data, manifest)
    settings = {"tokenizer": cfg.tokenizer, "shard_size": cfg.shard_size, "max_tokens": cfg.max_tokens}
    manifest = begin(folder, settings | {"source": source}, manifest)
    get_tokenizer(cfg.tokenizer)  # says so if it cannot be had
    if manifest["complete"]:
        print(f"{folder} is complete: {manifest['n_tokens']:,} tokens in {len(manifest['shards'])} shards")
        return

    sizes = [file["size"] for file in source["files"]]
    n_text = sum(map(text_bytes, paths)) or TEXT_PER_HUB_BYTE * sum(sizes)  # opens and checks all local files
    n_before, next_file = manifest["n_tokens"], manifest["next"]["file"]
    n_tokens = max(n_before, min(int(n_text / BYTES_PER_TOKEN[cfg.tokenizer]), cfg.max_tokens or 2**63))
    n_bytes = 2 * (n_tokens - n_before) + (0 if paths else 2 * max(sizes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_workers = cfg.workers or min(cores, 60)  # Windows cannot wait for more than 61 processes
    print(
        f"{cfg.data}: {len(sizes)} files, {sum(sizes) / 1e9:,.2f} GB, about {n_tokens / 1e9:,.2f}B tokens; "
        f"needs about {n_bytes / 1e9:,.1f} GB of disk; {n_workers} workers"
    )
    if n_before:
        print(f"continuing after {n_before:,} tokens in {len(manifest['shards'])} shards")
    make_folder(folder)
    require_space(folder, n_bytes, f"--out_dir={folder}")
    for leftover in folder.glob("*.tmp"):  # of a run that was killed
        leftover.unlink()
    write_manifest(folder, manifest)

    start = time.perf_counter()
    pool = start_workers(n_workers, cfg.tokenizer)  # before there are threads, which do not go with a fork
    bar = tqdm(total=n_tokens, initial=n_before, unit=" tokens", unit_scale=True, mininterval=1)
    try:
        files = paths[next_file:] or iter_downloads(source, next_file, folder / "download")
        chunks = read_chunks(files, next_file, manifest["next"]["document"])
        encoder, chunks = choose_encoder(cfg, chunks)
        write_shards(tokenize_all(chunks, pool, n_workers, cfg.tokenizer, encoder), folder, manifest, bar)
    except KeyboardInterrupt:
        n_shards = len(manifest["shards"])
        raise SystemExit(f"stopped after {n_shards} shards: the same command continues there") from None
    except BrokenProcessPool as error:
        raise SystemExit(
            "a worker died (out of memory?): the same command continues; try fewer --workers"
        ) from error
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder / "download", ignore_errors=True)
    print_summary(folder, manifest, manifest["n_tokens"] - n_before, time.perf_counter() - start)


if __name__ == "__main__":
    from training import parse  # here, because workers import this file and training imports torch

    main(parse(CONFIGS, __doc__))
