"""Three kinds of tokenizers behind four names: `vocab`, `bos`, `encode`, `decode`."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mintrain.config import ConfigError

BOS = ("<|bos|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|endoftext|>")


@dataclass(frozen=True)
class Tokenizer:
    vocab: int  # ids are 0 to vocab - 1
    bos: int  # stands before every document
    encode: Callable[[list[str]], Iterator[list[int]]]  # a batch of texts, without special tokens
    decode: Callable[[list[int]], str]
    fingerprint: str  # equal for equal files


def load_tokenizer(name: str) -> Tokenizer:
    """`name` is "shakespeare" (4096-entry byte-level BPE in the package), "bytes", or a .json or .model file.

    Raises ConfigError if there is no such file, or no token that could stand before a document.
    """
    if name == "bytes":
        decode = lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return Tokenizer(257, 256, lambda texts: (list(text.encode()) for text in texts), decode, "bytes")
    path = tokenizer_path(name)
    if not path.is_file() or path.suffix not in (".json", ".model"):
        raise ConfigError(f"data.tokenizer={name} is not a .json or .model file; give one, or bytes, or shakespeare")
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    return (_tokenizers if path.suffix == ".json" else _sentencepiece)(path, fingerprint)


def tokenizer_path(name: str) -> Path:
    return Path(str(files("mintrain") / "assets" / "tokenizer.json")) if name == "shakespeare" else Path(name)


def _tokenizers(path: Path, fingerprint: str) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"data.tokenizer={path} is not a tokenizers file: {error}") from error
    bos = next((i for i in map(tokenizer.token_to_id, BOS) if i is not None), None)
    if bos is None:
        raise ConfigError(f"data.tokenizer={path} has none of {', '.join(BOS)}; add one, it separates documents")
    encode = lambda texts: (e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return Tokenizer(tokenizer.get_vocab_size(), bos, encode, tokenizer.decode, fingerprint)


def _sentencepiece(path: Path, fingerprint: str) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(f"data.tokenizer={path} needs sentencepiece; pip install sentencepiece") from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"data.tokenizer={path} is not a sentencepiece model: {error}") from error
    if model.bos_id() < 0:
        raise ConfigError(f"data.tokenizer={path} has no begin-of-sentence piece; train it with one")
    encode = lambda texts: iter(model.encode(texts))
    return Tokenizer(model.vocab_size(), model.bos_id(), encode, model.decode, fingerprint)
