"""Tokenize FineWeb-Edu, or other parquet, json or text files, into shards of token ids for train_gpt2.py.

    python fineweb.py                                           # FineWeb-Edu sample-10BT -> edu_fineweb10B
    python fineweb.py --data='books-*.parquet' --out_dir=books  # local files: a file, a folder or a pattern
    python fineweb.py --data=hf://datasets/OWNER/NAME/FOLDER --out_dir=NAME  # another dataset of the hub
    python fineweb.py sample-100BT --out_dir=/big/disk/edu100B --part=3/16  # one of 16 machines: edu100B-03-of-16
    pip install gigatoken                                       # optional: two to five times as fast, same shards

Reads parquet, jsonl, json (a list) and txt (documents separated by <|endoftext|>), also .gz and .zst; of the hub only
parquet and jsonl. Documents without text are skipped. Every document begins with end-of-text. Writes val_000000.npy,
train_000001.npy, … (uint16) and manifest.json, which lists them, into out_dir. Only the first part has a val shard.

After an interruption the same command continues after the last finished shard. Needs 2 bytes of disk per token and
space for two files of the hub, which are deleted after they are read (sample-10BT: 20 GB and twice 2.2 GB).
"""

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from neogpt import config, data, files  # worker processes import this file: nothing here may import torch

HUB = "hf://datasets/"
FINEWEB = HUB + "HuggingFaceFW/fineweb-edu/sample"  # the folder of 10BT, 100BT and 350BT


@dataclass(frozen=True)
class Config:
    data: str = FINEWEB + "/10BT"  # hub folder; or local file, folder or pattern
    out_dir: str = "edu_fineweb10B"  # folder for the shards
    part: str = "1/1"  # of the source files; 3/16: the third of 16 shares, into the folder <out_dir>-03-of-16
    field: str = "text"  # column of parquet or field of json
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # gpt2: 50257 ids; bytes: 257 ids, needs no download
    shard_size: Annotated[int, "[2, inf)"] = 10**8  # tokens per shard; the first shard is validation
    max_tokens: Annotated[int, "[2, inf)"] | None = None  # stop after this many tokens (of the part); None: everything
    workers: config.PositiveInt | None = None  # processes that tokenize; None: one per core
    encoder: Literal["auto", "tiktoken", "gigatoken"] = "auto"  # auto: gigatoken if it is installed


CONFIGS = {f"sample-{n}BT": Config(f"{FINEWEB}/{n}BT", f"edu_fineweb{n}B") for n in (10, 100, 350)}
SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")
MAX_WITHOUT_TEXT = 1000  # if this many documents at the start have no text, --field is probably wrong
CHUNK_BYTES = 2**20  # text per task of a worker
TOKENS_PER_BYTE = {"gpt2": 0.36, "bytes": 1.6}  # of FineWeb-Edu's parquet files; for the estimate


def ask_hub(call: Callable[..., Any], *args: str, **options: object) -> Any:
    """call(*args, **options); every error becomes an OSError that names `args`."""
    try:
        return call(*args, **options)
    except Exception as error:  # no network, no such name, HTTP 429, …: no common class
        raise OSError(f"cannot get {HUB}{'/'.join(args)}: {files.one_line(error)}; retry, or check --data") from error


def find_source(url: str, k: int, n: int, manifest: dict | None) -> tuple[dict, list[Path]]:
    """(manifest entry `source`, paths) of the files in part k/n of --data; the paths are [] if they are on the hub."""
    paths, revision, suffixes = [], None, SUFFIXES[:2] if url.startswith(HUB) else SUFFIXES
    if url.startswith(HUB):
        if manifest and manifest["source"]["data"] == url:
            return manifest["source"], []  # the dataset can have changed: keep the commit of the first run
        from huggingface_hub import HfApi

        parts = url.removeprefix(HUB).strip("/").split("/")
        repo, folder = "/".join(parts[:2]), "/".join(parts[2:])
        revision = ask_hub(HfApi().dataset_info, repo).sha
        list_tree = functools.partial(HfApi().list_repo_tree, recursive=True, revision=revision, repo_type="dataset")
        tree = ask_hub(lambda *args: list(list_tree(*args)), repo, folder)
        tables = sorted((e.path, e.size) for e in tree if hasattr(e, "size") and files.has_suffix(e.path, suffixes))
        found = [table for table in tables if files.split_of(table[0].removeprefix(folder)) == "train"] or tables
        others = sorted(Path(name) for name, _ in set(tables) - set(found))
    else:
        paths, others = files.find_files(url, suffixes)
        paths = [path for path in paths if path.name not in (data.MANIFEST, data.CHECKED)]  # of an out_dir inside
        found = [(path.name, path.stat().st_size) for path in paths]
    if others:
        print(f"files that are not read: {', '.join(path.name for path in others)}")
    if len(found) < n:
        problem = f"{len(found)} files ({', '.join(suffixes)}) in --data={url}, too few for --part={k}/{n}"
        raise ValueError(f"{problem}: give another path, {HUB}OWNER/NAME/FOLDER, or fewer parts")
    share = slice(len(found) * (k - 1) // n, len(found) * k // n)
    entries = [{"name": name, "size": size} for name, size in found[share]]
    source = {"data": url if url.startswith(HUB) else Path(url).name, "revision": revision, "files": entries}
    if n > 1:  # equal for all parts of the same files
        source["whole"] = f"{source['data']} (checksum {zlib.crc32(repr((revision, found)).encode()):08x})"
    return source, paths[share]


def iter_downloads(source: dict, start: int, folder: Path) -> Iterator[Path]:
    """Yield the files of a hub source from number `start` on; download one ahead, delete each after use."""
    from huggingface_hub import hf_hub_download

    repo = "/".join(source["data"].removeprefix(HUB).split("/")[:2])
    options = {"revision": source["revision"], "repo_type": "dataset", "local_dir": folder}
    pool = ThreadPool(1)  # a daemon thread: the program can exit during a download
    started = (pool.apply_async(ask_hub, (hf_hub_download, repo, e["name"]), options) for e in source["files"][start:])
    ahead = next(started, None)
    while ahead:
        path = Path(ahead.get())
        ahead = next(started, None)  # starts the next download
        yield path
        path.unlink()


class Chunk(NamedTuple):
    """Consecutive documents of one file."""

    file: int  # number of the file in the source
    start: int  # number of the first document in the file
    documents: list[bytes | None]  # json objects, or text in UTF-8
    field: str  # of the objects; "" for text


def read_file(path: Path, field: str) -> Iterator[list[bytes | None]]:
    """Yield the documents of a file in lists, of about CHUNK_BYTES for parquet and jsonl."""
    try:
        if not files.has_suffix(path, (".parquet",)):
            with files.open_binary(path) as file:
                if files.has_suffix(path, (".jsonl",)):
                    yield from iter(lambda: file.readlines(CHUNK_BYTES), [])
                    return
                is_json, content = files.has_suffix(path, (".json",)), file.read()
            rows = json.loads(content) if is_json else []
            if not isinstance(rows, list):
                raise OSError("it is not a list")
            documents = [json.dumps(row).encode() for row in rows] if is_json else data.split_documents(content)
            yield from (documents[i : i + 256] for i in range(0, len(documents), 256))
            return
        # a buffer makes pyarrow read a row group in pieces instead of at once
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            if field not in (names := file.schema_arrow.names):
                raise ValueError(f"{path} has no column {field!r}, only {', '.join(names)}: use --field")
            n_bytes = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            n_rows = max(1, file.metadata.num_rows * CHUNK_BYTES // max(1, n_bytes))
            for batch in file.iter_batches(n_rows, columns=[field]):
                yield batch.column(0).cast(pa.large_binary()).to_pylist()  # bytes: it need not be valid UTF-8
    except pa.ArrowNotImplementedError as error:  # of cast
        raise ValueError(f"{path}: the column {field!r} holds no text: use --field") from error
    except (OSError, EOFError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, pa.ArrowException) as error:
        raise OSError(f"cannot read {path} ({files.one_line(error)}): replace it and run again") from error


def read_chunks(paths: Iterable[Path], file: int, start: int, field: str) -> Iterator[Chunk]:
    """Yield the chunks of the files. The first file has the number `file` and is read from document `start` on."""
    for number, path in enumerate(paths, file):
        n_read = 0  # documents of this file
        is_json = files.has_suffix(path, (".jsonl", ".json"))
        for documents in read_file(path, field):
            if rest := documents[max(0, start - n_read) :]:
                yield Chunk(number, max(start, n_read), rest, field if is_json else "")
            n_read += len(documents)
        start = 0


def parse_document(document: bytes | None, field: str) -> str:
    """The text of a document: a field of a json object, or all of it; "" if it has no text or only white space."""
    try:
        if field:  # JSON can contain lone surrogates: replace them as tiktoken does
            text = json.loads(document)[field].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        else:
            text = (document or b"").decode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # bad UTF-8 or JSON, no text
        return ""
    return "" if text.isspace() else text


def start_worker() -> None:
    """Ignore Ctrl-C, which the main process handles, and exit when the main process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@functools.cache
def get_encoder(tokenizer: str, encoder: str) -> Callable[[str], np.ndarray]:
    """The function that encodes a document: text -> end-of-text and the ids of the text, (n,) uint16."""
    encoding = data.get_tokenizer(tokenizer)
    if encoder == "tiktoken":
        return functools.partial(data.encode_document, encoding)
    import gigatoken

    tokens = [b64encode(encoding.decode_single_token_bytes(token)) for token in range(encoding.eot_token)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpt2.tiktoken"
        path.write_bytes(b"".join(b"%s %d\n" % (token, rank) for rank, token in enumerate(tokens)))
        fast = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2", special_tokens={})
    return lambda text: np.append(np.uint16(encoding.eot_token), fast.encode(text).astype(np.uint16))


def tokenize(chunk: Chunk, tokenizer: str, encoder: str) -> list[np.ndarray]:
    """The ids of each document, (n,) uint16; n is 0 for a document without text."""
    encode = get_encoder(tokenizer, encoder)
    texts = [parse_document(document, chunk.field) for document in chunk.documents]
    return [encode(text) if text else np.empty(0, np.uint16) for text in texts]


def choose_encoder(cfg: Config, chunk: Chunk) -> str:
    """The encoder: gigatoken if it is wanted and encodes the first documents of the chunk as tiktoken does."""
    if cfg.tokenizer != "gpt2" or cfg.encoder == "tiktoken":
        return "tiktoken"
    sample = chunk._replace(documents=chunk.documents[:32])
    try:
        results = [tokenize(sample, "gpt2", encoder) for encoder in ("gigatoken", "tiktoken")]
        problem = "" if all(map(np.array_equal, *results)) else "its ids differ from tiktoken's"
    except Exception as error:  # it is not installed, or another version fails in any way
        problem = files.one_line(error)
    if problem and cfg.encoder == "gigatoken":
        raise ValueError(f"--encoder=gigatoken fails ({problem}): use --encoder=tiktoken")
    tqdm.write(f"using tiktoken, because gigatoken fails ({problem})" if problem else "using gigatoken")
    return "tiktoken" if problem else "gigatoken"


def tokenize_all(chunks: Iterator[Chunk], cfg: Config, pool: Executor) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (file number, document number, ids) of all documents in order; read 4 chunks ahead per worker."""
    encoder, pending = None, deque()
    while True:
        for chunk in islice(chunks, 4 * cfg.workers - len(pending)):
            encoder = encoder or choose_encoder(cfg, chunk)
            pending.append((chunk, pool.submit(tokenize, chunk, cfg.tokenizer, encoder)))
        if not pending:
            return
        chunk, future = pending.popleft()
        for number, ids in enumerate(future.result(), chunk.start):
            yield chunk.file, number, ids


def write_shard(folder: Path, manifest: dict, tokens: np.ndarray) -> None:
    """Write token ids, (n,) uint16, as the next shard, atomically, and list it in the manifest in memory."""
    number = len(manifest["shards"])
    name = f"{'train' if number or manifest['part']['k'] > 1 else 'val'}_{number:06d}.npy"
    with files.atomic_write(folder / name) as temporary, open(temporary, "wb") as file:
        np.save(file, tokens)
    manifest["shards"].append({"file": name, "n_tokens": len(tokens), "crc32": zlib.crc32(tokens)})
    manifest["n_tokens"] += len(tokens)


def write_shards(documents: Iterable[tuple[int, int, np.ndarray]], folder: Path, manifest: dict, bar: tqdm) -> None:
    """Write documents as shards. After every shard manifest.json says where the next shard begins."""
    shard, filled = np.empty(manifest["shard_size"], dtype=np.uint16), 0
    n_left = (manifest["max_tokens"] or 2**63) - manifest["n_tokens"]
    token = manifest["next"]["token"]  # number of tokens of the current document that are written
    for file, number, ids in documents:
        ids = ids[: token + n_left]
        while token < len(ids):
            # a full shard is written only if more tokens follow, because a single shard is split below
            if filled == len(shard):
                write_shard(folder, manifest, shard)
                manifest["next"] = {"file": file, "document": number, "token": token}
                files.write_json(folder / data.MANIFEST, manifest)
                filled = 0
            n = min(len(shard) - filled, len(ids) - token)
            shard[filled : filled + n] = ids[token : token + n]
            filled, token, n_left = filled + n, token + n, n_left - n
            bar.update(n)
        token = 0
        manifest["n_documents" if len(ids) else "n_skipped"] += 1
        if not n_left or not manifest["n_documents"] and manifest["n_skipped"] == MAX_WITHOUT_TEXT:
            break
    if not filled:
        problem = f"no text in UTF-8 (field {manifest['field']!r}) in the first {manifest['n_skipped']:,} documents"
        raise ValueError(f"{problem} of {manifest['source']['data']}: use another --field or --data")
    if not manifest["shards"] and manifest["part"]["k"] == 1:
        n_val = max(1, filled // 10)
        write_shard(folder, manifest, shard[:n_val])
        shard, filled = shard[n_val:], filled - n_val
    write_shard(folder, manifest, shard[:filled])
    manifest["complete"] = True
    del manifest["next"]
    files.write_json(folder / data.MANIFEST, manifest)


def write_missing(cfg: Config, folder: Path, manifest: dict, paths: list[Path]) -> None:
    """Write the shards that are missing. `paths`: the source files, [] if they are on the hub."""
    sizes = [entry["size"] for entry in manifest["source"]["files"]]
    n_done, file, document = manifest["n_tokens"], manifest["next"]["file"], manifest["next"]["document"]
    n_tokens = int(min(TOKENS_PER_BYTE[cfg.tokenizer] * sum(sizes), cfg.max_tokens or 2**63))
    n_bytes = 2 * max(0, n_tokens - n_done) + (0 if paths else 2 * max(sizes))
    print(f"estimate: {n_tokens / 1e6:,.1f}M tokens ({n_done / 1e6:,.1f}M done), {n_bytes / 1e9:,.2f} GB of disk")
    files.require_space(files.make_folder(folder), n_bytes, f"--out_dir={folder}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cfg = replace(cfg, workers=cfg.workers or min(cores, 60))  # Windows allows 61
    inputs = paths[file:] or iter_downloads(manifest["source"], file, folder / "download")
    chunks = read_chunks(inputs, file, document, cfg.field)
    pool = ProcessPoolExecutor(cfg.workers, initializer=start_worker)
    pool.submit(int).result()  # forks the workers before there are threads, which a fork does not copy
    try:
        with tqdm(total=n_tokens, initial=n_done, unit=" tokens", unit_scale=True, mininterval=1) as bar:
            write_shards(tokenize_all(chunks, cfg, pool), folder, manifest, bar)
    except BrokenExecutor as error:
        if sys.version_info < (3, 11, 5):  # they wait for ever: https://github.com/python/cpython/issues/94777
            pool._call_queue._reader.close()
        raise OSError("a worker died (out of memory?): run the same command with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder / "download", ignore_errors=True)


def main(cfg: Config) -> None:
    """Write the missing shards and print a summary."""
    k, n = map(int, cfg.part.split("/") if re.fullmatch(r"[1-9]\d{0,5}/[1-9]\d{0,5}", cfg.part) else (1, 0))
    if k > n:
        raise ValueError(f"--part={cfg.part}: expected K/N with K from 1 to N, such as 3/16")
    data.get_tokenizer(cfg.tokenizer)  # raises if it cannot be downloaded
    folder = Path(cfg.out_dir if n == 1 else f"{Path(cfg.out_dir)}-{k:0{len(str(n))}}-of-{n}")
    manifest = data.read_manifest(folder)
    source, paths = find_source(cfg.data, k, n, manifest)
    settings = dict(tokenizer=cfg.tokenizer, shard_size=cfg.shard_size, max_tokens=cfg.max_tokens or 0)
    settings |= dict(source=source, field=cfg.field, part=dict(k=k, n=n))
    empty = dict(complete=False, n_tokens=0, n_documents=0, n_skipped=0, shards=[], next=data.NEXT)
    manifest = manifest or settings | empty
    for name, value in settings.items():
        if (old := manifest.get(name)) != value:
            changed = f"other files of {old['data']}" if name == "source" else f"{name}={old}, not {value}"
            raise ValueError(f"{folder} was begun with {changed}: change --out_dir")
    for entry in manifest["shards"]:
        data.open_shard(folder / entry["file"])  # raises if it is missing or truncated
    if not manifest["complete"]:
        write_missing(cfg, folder, manifest, paths)
    counts = f"{manifest['n_tokens']:,} tokens of {manifest['n_documents']:,} documents"
    print(f"{folder}: {counts}; {manifest['n_skipped']:,} documents without text in UTF-8 were skipped")
    small = n == 1 and manifest["n_tokens"] < 2**20  # two steps of the default configuration of train_gpt2.py
    command = f"train_gpt2.py demo --out_dir=out/{folder.name}" if small else "train_gpt2.py"
    shards = folder if n == 1 else f"'{Path(cfg.out_dir)}-*-of-{n}'"  # all parts
    print(f"next: python {command} --data={shards} --tokenizer={cfg.tokenizer}")


if __name__ == "__main__":
    config.run(main, CONFIGS)
