"""Three kinds of tokenizers behind the same names, with what a Hugging Face folder has beside its tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mintrain.config import ConfigError

BOS = ("<|bos|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|endoftext|>")


@dataclass(frozen=True)
class Tokenizer:
    vocab: int  # ids are 0 to vocab - 1
    ordinary: int  # the same without the tokens that were added; a model may have no row for some of these
    bos: int  # stands before every document
    encode: Callable[[list[str]], Iterator[list[int]]]  # a batch of texts, without special tokens
    decode: Callable[[list[int]], str]
    fingerprint: str  # equal for equal files
    stop: tuple[int, ...]  # tokens that end a text
    template: str | None = None  # of chats, in jinja
    named: tuple[tuple[str, str], ...] = ()  # the special tokens that the template may ask for, such as bos_token


def load_tokenizer(name: str) -> Tokenizer:
    """`name` is "shakespeare" (4096-entry byte-level BPE in the package), "bytes", or a .json or .model file.

    Raises ConfigError if there is no such file, or no token that could stand before a document.
    """
    if name == "bytes":
        decode = lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return Tokenizer(257, 257, 256, lambda texts: (list(text.encode()) for text in texts), decode, "bytes", (256,))
    path = tokenizer_path(name)
    if not path.is_file() or path.suffix not in (".json", ".model"):
        raise ConfigError(f"data.tokenizer={name} is not a .json or .model file; give one, or bytes, or shakespeare")
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    return (_tokenizers if path.suffix == ".json" else _sentencepiece)(path, fingerprint)


def tokenizer_path(name: str) -> Path:
    return Path(str(files("mintrain") / "assets" / "tokenizer.json")) if name == "shakespeare" else Path(name)


def tokenizer_of(folder: Path) -> str:
    """The name of the tokenizer in a Hugging Face folder. Raises ConfigError if it has none."""
    found = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not found:
        raise ConfigError(f"{folder} has no tokenizer.json and no tokenizer.model; put one there")
    return str(found[0])


def _tokenizers(path: Path, fingerprint: str) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"data.tokenizer={path} is not a tokenizers file: {error}") from error
    beside = _beside(path, "tokenizer_config.json")
    content = lambda token: token["content"] if isinstance(token, dict) else token
    named = {name: content(beside[name]) for name in ("bos_token", "eos_token", "pad_token") if beside.get(name)}
    candidates = (named["bos_token"], *BOS) if "bos_token" in named else BOS
    bos = next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)
    if bos is None:
        raise ConfigError(f"data.tokenizer={path} has none of {', '.join(BOS)}; add one, it separates documents")
    encode = lambda texts: (e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    stop = _beside(path, "generation_config.json").get("eos_token_id")
    if stop is None:
        stop = tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else bos
    stop = tuple(stop) if isinstance(stop, list) else (stop,)
    template = path.with_name("chat_template.jinja")
    template = template.read_text() if template.is_file() else beside.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    parts = dict(stop=stop, template=template, named=tuple(named.items()))
    vocab, ordinary = (
        1 + max(tokenizer.get_vocab(with_added_tokens=added).values(), default=-1) for added in (True, False)
    )
    return Tokenizer(vocab, ordinary, bos, encode, tokenizer.decode, fingerprint, **parts)


def _beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON file in the tokenizer's folder, if there is one."""
    file = path.with_name(name)
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}; mend or remove it") from error
    return found if isinstance(found, dict) else {}


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
    stop = (model.eos_id() if model.eos_id() >= 0 else model.bos_id(),)
    return Tokenizer(model.vocab_size(), model.vocab_size(), model.bos_id(), encode, model.decode, fingerprint, stop)
