"""Conversations to tokens: which of them a model reads, and which it learns to write.

A line of a .jsonl file is {"messages": [{"role": ..., "content": ...}, ...]}, rendered with the tokenizer's own chat
template, or {"prompt": ..., "response": ...}, taken as they are. Only answers count in the loss, with the token that
ends them. Each piece is encoded by itself, as it will be when the model has to answer.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mintrain.config import ConfigError
from mintrain.tokenizer import Tokenizer

Example = tuple[list[int], list[bool]]  # token ids from `bos` on, and which of them are the answers'


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A user's message up to where the answer begins. Raises ConfigError if the tokenizer has no chat template."""
    (ids,) = tokenizer.encode([render(tokenizer, [{"role": "user", "content": text}], True)])
    return _with_bos(tokenizer, ids)


def example(tokenizer: Tokenizer, record: Any) -> Example:
    """The tokens of one line. Raises ConfigError, without the file's name, for what is neither of the two forms."""
    pieces = _messages(tokenizer, record["messages"]) if "messages" in record else _pair(record)
    ids, counts = [tokenizer.bos], [False]
    for (_, answer), piece in zip(pieces, tokenizer.encode([text for text, _ in pieces]), strict=True):
        piece = piece[1:] if len(ids) == 1 and piece[:1] == [tokenizer.bos] else piece  # the template wrote one too
        ids += piece
        counts += [answer] * len(piece)
    if "messages" not in record:
        ids.append(tokenizer.stop[0])
        counts.append(True)
    return ids, counts


def _pair(record: Any) -> list[tuple[str, bool]]:
    if not (isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str)):
        raise ConfigError('has no "messages" and not both a "prompt" and a "response"; give one of the two forms')
    return [(record["prompt"], False), (record["response"], True)]


def _messages(tokenizer: Tokenizer, messages: Any) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces. An answer is what its message adds to the text before it, begun for it."""
    fits = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not fits or not any(m["role"] == "assistant" for m in messages):
        raise ConfigError('has "messages" that are no list of roles and contents with an answer of the assistant')
    for i in range(len(messages)):
        _check_content(tokenizer, messages, i)
    pieces, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(tokenizer, messages[:i], True), render(tokenizer, messages[: i + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise ConfigError(
                f"does not fit the chat template: with message {i + 1} it writes the text before it in another way; "
                "keep one answer in each line"
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _check_content(tokenizer: Tokenizer, messages: list[dict[str, Any]], i: int) -> None:
    """Raises ConfigError for a content that the template would write as Python does, such as None or a list."""
    content = messages[i]["content"]
    if isinstance(content, str):
        return
    said = f"has in message {i + 1} the content {str(content)[:60]}"
    if content is None:
        instead = [*messages[:i], {**messages[i], "content": ""}, *messages[i + 1 :]]
        if render(tokenizer, messages, False) != render(tokenizer, instead, False):
            raise ConfigError(f"{said}, which the chat template writes as a word; give a text")
    elif not isinstance(content, list) or str(content) in render(tokenizer, messages, False):
        raise ConfigError(f"{said}, which is no text for the chat template; give one")


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]], begin_answer: bool) -> str:
    """The text of a conversation, with what stands before an answer at its end if `begin_answer`."""
    import jinja2

    if tokenizer.template is None:
        raise ConfigError(
            "the tokenizer has no chat template; put a chat_template.jinja beside it, or give prompts and responses"
        )
    try:
        return _compile(tokenizer.template).render(
            messages=messages, add_generation_prompt=begin_answer, **dict(tokenizer.named)
        )
    except jinja2.TemplateError as error:
        raise ConfigError(f"is refused by the chat template: {error}") from error
    except Exception as error:  # a template is a foreign program, and raises what it likes
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ConfigError(f"cannot be rendered by the chat template: {type(error).__name__}: {reason}") from error


@cache
def _compile(template: str) -> Any:
    """In the sandbox that transformers uses, with the same filters, globals and tags (utils/chat_template_utils.py
    there): a template comes with a checkpoint and may not touch anything.
    """
    import json
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """{% generation %} marks an answer; the text inside is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: object) -> None:
        raise SecurityError(str(message))

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        """Without jinja's escapes of HTML."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


class Packed(NamedTuple):
    """Rows of whole examples, one row after the other, and one more place at the end."""

    ids: np.ndarray  # token ids; padding is 0
    counts: np.ndarray  # 1 for what is a target
    segments: np.ndarray  # the example's number in its row, from 1; padding is 0
    cut: int  # examples that were cut to the length of a row


def pack(examples: Iterable[Example], length: int) -> Packed:
    """Pack examples into rows of `length` tokens. What they do not fill is padding, which counts for nothing.

    First fit: an example goes to the first row that has room among the last 64. One of which no answer is within
    `length` is left out.
    """
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    used: list[int] = []
    cut = 0
    for ids, counts in examples:
        cut += len(ids) > length
        part = np.array(ids[:length], np.uint32), np.array(counts[:length], np.uint8)
        if not part[1].any():
            continue
        at = next((i for i in range(max(len(rows) - 64, 0), len(rows)) if used[i] + len(part[0]) <= length), len(rows))
        if at == len(rows):
            rows.append([])
            used.append(0)
        rows[at].append(part)
        used[at] += len(part[0])
    size = len(rows) * length + 1
    packed = Packed(np.zeros(size, np.uint32), np.zeros(size, np.uint8), np.zeros(size, np.uint16), cut)
    for i, row in enumerate(rows):
        start = i * length
        for number, (ids, counts) in enumerate(row, 1):
            here = slice(start, start + len(ids))
            packed.ids[here], packed.counts[here], packed.segments[here] = ids, counts, number
            start += len(ids)
    return packed
