"""Text to batches. Tokens are written once and memory-mapped; `batch(step)` is a pure function of seed and step.

Resuming therefore needs no iterator state, and a batch does not depend on the number of hosts or devices: each
process reads the rows that its devices hold.
"""

import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mintrain import chat
from mintrain.config import Config, ConfigError
from mintrain.loss import Batch
from mintrain.tokenizer import Tokenizer, load_tokenizer

CACHE = Path("runs/.tokens")
PIECE = 1 << 20  # characters that are encoded at once
SCAN = 1 << 27  # tokens of a .bin file that are checked against the vocabulary before the run starts


@dataclass(frozen=True)
class Stream:
    name: str  # for messages
    ids: np.ndarray  # uint16 or uint32, memory-mapped; every document starts with `bos`
    vocab: int
    bos: int
    bytes_per_token: float | None  # of the text; None where it is unknown (.bin) or does not count as a whole (chats)
    # Of packed chats, whose rows are not cut elsewhere:
    counts: np.ndarray | None = None  # 1 for tokens of answers, which alone are targets
    segments: np.ndarray | None = None  # the example's number in its row; 0 is padding

    def row(self, start: int, length: int) -> tuple[np.ndarray, ...]:
        """tokens, targets, positions, segments and weights of `length` tokens from `start`.

        Past the end of the stream there is padding: token 0, segment 0, weight 0.
        """
        window = self.ids[start : start + length + 1].astype(np.int32)
        if window.max(initial=0) >= self.vocab:
            raise ConfigError(
                f"{self.name} has token id {window.max()} after token {start}, but the vocabulary has {self.vocab}; "
                "use the tokenizer that wrote the file"
            )
        real = max(len(window) - 1, 0)
        window = np.pad(window, (0, length + 1 - len(window)))
        tokens, targets = window[:-1], window[1:]
        place = np.arange(length)
        if self.segments is None:
            starts = tokens == self.bos
            segments = np.where(place < real, 1 + np.cumsum(starts), 0)
        else:
            segments = self.segments[start : start + real]
            segments = np.pad(segments, (0, length - len(segments)))
            starts = np.diff(segments, prepend=0) != 0
        first = np.maximum.accumulate(np.where(starts, place, 0))
        return (
            tokens,
            targets,
            np.where(segments > 0, place - first, 0).astype(np.int32),
            segments.astype(np.int32),
            ((segments > 0) * self._counted(start, length)).astype(np.float32),
        )

    def _counted(self, start: int, length: int) -> np.ndarray:
        if self.counts is None:
            return np.ones(length, np.uint8)
        counted = self.counts[start + 1 : start + length + 1]
        return np.pad(counted, (0, length - len(counted)))

    def targets(self, start: int, length: int) -> int:
        """How many targets of a row count."""
        return int(self._counted(start, min(max(len(self.ids) - 1 - start, 0), length)).sum())


def load_data(cfg: Config) -> tuple[Stream, Stream, Tokenizer]:
    """The training stream, the held-out stream and the tokenizer. Raises ConfigError for what cannot be used."""
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    # Tokens that were added for other towers may have no row here, as Gemma 3's image: a text that has one is refused.
    if tokenizer.ordinary > cfg.model.vocab:
        raise ConfigError(
            f"data.tokenizer={cfg.data.tokenizer} has {tokenizer.ordinary} tokens, model.vocab={cfg.model.vocab}; "
            "use a config with a vocabulary at least as large"
        )
    if cfg.data.path == "shakespeare":
        assets = Path(str(files("mintrain") / "assets"))
        paths = [assets / f"shakespeare_{part}.jsonl.xz" for part in ("train", "heldout")]
    else:
        paths = [Path(path) for path in (cfg.data.path, cfg.data.heldout_path) if path]
    streams = [_open(path, tokenizer, cfg.data.seq_len, cfg.model.vocab) for path in paths]
    train, heldout = streams if len(streams) == 2 else _split(*streams, cfg.data.heldout_fraction, cfg.data.seq_len)
    for stream in (train, heldout):
        if len(stream.ids) < cfg.data.seq_len + 1:
            raise ConfigError(
                f"{stream.name} has {len(stream.ids)} tokens, fewer than data.seq_len={cfg.data.seq_len} and one; "
                "use a smaller data.seq_len or more text"
            )
    return train, heldout, tokenizer


def _open(path: Path, tokenizer: Tokenizer, length: int, rows: int | None = None) -> Stream:
    """Memory-map the tokens of a file, encoding it first unless that was done before. Chats are packed in memory.

    rows: of the model's embedding, by default one for each token; a token beyond them is refused.
    """
    rows = tokenizer.vocab if rows is None else rows
    if not path.is_file():
        raise ConfigError(f"data.path={path} is not a file; give a .txt, .jsonl or .bin file")
    kinds = [suffix for suffix in path.suffixes if suffix in (".txt", ".jsonl", ".bin")]
    if not kinds or path.suffix not in (kinds[-1], ".xz"):
        raise ConfigError(f"data.path={path} is of no known kind; give a .txt, .jsonl (also with .xz) or .bin file")
    dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
    if kinds[-1] == ".bin":
        if path.stat().st_size == 0 or path.stat().st_size % dtype.itemsize:
            raise ConfigError(
                f"data.path={path} has {path.stat().st_size} bytes, not whole {dtype} tokens; write it again"
            )
        vocab = min(tokenizer.vocab, rows)
        stream = Stream(str(path), np.memmap(path, dtype, mode="r"), vocab, tokenizer.bos, None)
        if (largest := stream.ids[:SCAN].max()) >= vocab:
            raise ConfigError(
                f"data.path={path} has token id {largest}, but the vocabulary has {vocab}; "
                "use the tokenizer that wrote the file"
            )
        return stream
    if kinds[-1] == ".jsonl" and {"messages", "prompt"} & next(_records(path), (0, {}))[1].keys():
        packed = chat.pack(_examples(path, tokenizer, rows), length)
        if len(packed.ids) == 1:
            longer = "; use a larger one" if packed.cut else ""
            raise ConfigError(f"data.path={path}: no answer begins within data.seq_len={length}{longer}")
        if packed.cut:
            print(f"{path}: {packed.cut} examples are longer than data.seq_len={length}, the rest is not trained on")
        return Stream(str(path), packed.ids, rows, tokenizer.bos, None, counts=packed.counts, segments=packed.segments)
    stat = path.stat()
    identity = f"2 {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {tokenizer.fingerprint} {tokenizer.bos}"
    cached = CACHE / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not cached.with_suffix(".json").is_file():
        _encode(path, kinds[-1], tokenizer, dtype, cached)
    size = json.loads(cached.with_suffix(".json").read_text())
    ids = np.memmap(cached.with_suffix(".bin"), dtype, mode="r", shape=(size["tokens"],))
    if size["largest"] >= rows:
        at = int(np.argmax(ids >= rows))
        document = np.count_nonzero(ids[: at + 1] == tokenizer.bos)
        raise ConfigError(f"data.path={path} document {document} {_without_row(int(ids[at]), rows)}")
    return Stream(str(path), ids, rows, tokenizer.bos, size["bytes"] / size["tokens"])


def _without_row(token: int, rows: int) -> str:
    return f"has token id {token}, for which the model has no row (model.vocab={rows}); take it out"


def _encode(path: Path, kind: str, tokenizer: Tokenizer, dtype: np.dtype, target: Path) -> None:
    """Write the tokens of `path` and their count. The count comes last: without it the file does not count."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    tokens = size = largest = 0
    with temporary.open("wb") as out:
        for text in _documents(path, kind):
            out.write(np.array([tokenizer.bos], dtype).tobytes())
            for ids in tokenizer.encode(list(_pieces(text))):
                out.write(np.array(ids, dtype).tobytes())
                tokens, largest = tokens + len(ids), max(largest, max(ids, default=0))
            tokens += 1
            size += len(text.encode())
    if size == 0:
        temporary.unlink()
        raise ConfigError(f"data.path={path} holds no text; give a file with some")
    temporary.rename(target.with_suffix(".bin"))
    target.with_suffix(".json").write_text(
        json.dumps({"source": str(path), "tokens": tokens, "bytes": size, "largest": largest})
    )


def _documents(path: Path, kind: str) -> Iterator[str]:
    if kind == ".txt":
        yield "".join(_lines(path))
        return
    for number, record in _records(path):
        if not isinstance(record.get("text"), str):
            raise ConfigError(f'data.path={path} line {number} has no "text"; give one string a line')
        yield record["text"]


def _examples(path: Path, tokenizer: Tokenizer, rows: int) -> Iterator[chat.Example]:
    for number, record in _records(path):
        try:
            ids, counts = chat.example(tokenizer, record)
            if max(ids) >= rows:
                raise ConfigError(_without_row(max(ids), rows))
        except ConfigError as error:
            raise ConfigError(f"data.path={path} line {number} {error}") from error
        yield ids, counts


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their line numbers."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                record = json.loads(line)
                if "\\u" in line:
                    json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # a surrogate without its other half
                raise ConfigError(
                    f"data.path={path} line {number} holds half of a character, {error.object[error.start]!r}; "
                    "mend or remove it"
                ) from error
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of [
                raise ConfigError(f"data.path={path} line {number} is not JSON: {error}; mend or remove it") from error
            if not isinstance(record, dict):
                raise ConfigError(f"data.path={path} line {number} is no object; give one a line")
            yield number, record


def _lines(path: Path) -> Iterator[str]:
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            yield from file
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ConfigError(f"data.path={path} cannot be read as UTF-8 text: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    """Cut after a newline that a word follows, where no tokenizer joins the two sides."""
    start = 0
    while start < len(text):
        end = start + PIECE
        while end < len(text) and not (text[end - 1] == "\n" and not text[end].isspace()):
            end += 1
        yield text[start:end]
        start = end


def _split(stream: Stream, fraction: float, length: int) -> tuple[Stream, Stream]:
    """Hold out whole documents from the end, at least `fraction` of the tokens; the end of a single document."""
    total = len(stream.ids)
    if stream.counts is not None:
        cut = (total - 1) // length - max(round(fraction * ((total - 1) // length)), 1)
        if cut < 1:
            raise ConfigError(
                f"{stream.name} fills one row of data.seq_len={length}; give more, or a data.heldout_path"
            )
        part = lambda at: replace(stream, ids=stream.ids[at], counts=stream.counts[at], segments=stream.segments[at])
        return part(slice(cut * length + 1)), part(slice(cut * length, None))
    cut = total - round(fraction * total)
    if not 0 < cut < total:
        raise ConfigError(f"data.heldout_fraction={fraction} leaves nothing of {total} tokens on one side; use 0.05")
    starts = np.flatnonzero(stream.ids == stream.bos)
    before = starts[(starts > 0) & (starts <= cut)]
    cut = int(before[-1]) if len(before) else cut
    return replace(stream, ids=stream.ids[:cut]), replace(stream, ids=stream.ids[cut:])


def _mix(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Where `index` goes in a permutation of range(size): a Feistel network, walked until it lands inside."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(seed, epoch, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


def train_start(stream: Stream, index: int, length: int, seed: int) -> int:
    """Where the `index`-th row of training starts. An epoch visits every row once, cut at another offset each time."""
    tokens = len(stream.ids) - 1
    rows = max(tokens // length - (stream.counts is None), 1)
    epoch, place = divmod(index, rows)
    shift = _mix(seed, epoch) % (tokens - rows * length + 1)  # 0 where rows are whole examples
    return permute(place, rows, seed, epoch) * length + shift


def train_batch(stream: Stream, abstract: Batch, step: int, seed: int) -> Batch:
    accumulate, batch, length = abstract.tokens.shape
    first = step * accumulate * batch
    return _assemble(
        stream, abstract, [train_start(stream, first + i, length, seed) for i in range(accumulate * batch)]
    )


def heldout_batches(stream: Stream, abstract: Batch, limit: int) -> Iterator[tuple[Batch, int]]:
    """The held-out stream in order, each token once, and the number of targets of each batch."""
    accumulate, batch, length = abstract.tokens.shape
    targets = len(stream.ids) - 1
    for i in range(min(limit, -(-targets // (accumulate * batch * length)))):
        starts = [(i * accumulate * batch + row) * length for row in range(accumulate * batch)]
        yield _assemble(stream, abstract, starts), sum(stream.targets(start, length) for start in starts)


def _assemble(stream: Stream, abstract: Batch, starts: list[int]) -> Batch:
    """Global arrays from the rows that this process needs; the others are never read."""
    accumulate, batch, length = abstract.tokens.shape
    local = abstract.tokens.sharding.addressable_devices_indices_map(abstract.tokens.shape).values()
    needed = sorted({(a, b) for at in local for a in range(accumulate)[at[0]] for b in range(batch)[at[1]]})
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.tree.leaves(abstract))
    for a, b in needed:
        for array, row in zip(arrays, stream.row(starts[a * batch + b], length), strict=True):
            array[a, b] = row
    leaves = [
        jax.make_array_from_callback(x.shape, x.sharding, lambda at, array=array: array[at])
        for x, array in zip(jax.tree.leaves(abstract), arrays, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
