"""Chats, and prompts with completions: from the rows of a data set to tokens, and which tokens are completion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fxcalib.errors import DataError

Message = Mapping[str, Any]
"""`role` and `content`, and what else a chat template reads."""

_SHARE_GPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles of rows with `from` and `value`, which are usual in a column `conversations`."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN = 60


@dataclass(frozen=True)
class Chat:
    """Messages of several roles; the assistant's are completion."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both, parted by a new line where none of them has white space there."""
        apart = not self.prompt or not self.completion or self.prompt[-1].isspace() or self.completion[0].isspace()
        return self.prompt + ("" if apart else "\n") + self.completion


Document = str | Chat | Completion


class Tokens(NamedTuple):
    """A document for a model."""

    ids: list[int]
    completion: list[bool] | None
    """Which of `ids` are completion; None for plain text."""


def is_empty(document: Document) -> bool:
    """Whether there is nothing but white space in it."""
    if isinstance(document, Chat):
        return not any(message.get("content") for message in document.messages)
    return not (document.text if isinstance(document, Completion) else document).strip()


def characters(document: Document) -> int:
    """How long it is; of a chat only what is plain text."""
    if isinstance(document, Chat):
        contents = [message.get("content") for message in document.messages]
        return sum(len(content) for content in contents if isinstance(content, str))
    return len(document.text if isinstance(document, Completion) else document)


def messages_of(value: Sequence[Any], name: str) -> tuple[Message, ...]:
    """The messages in a column `messages` or `conversations`; `name` says where it is.

    Raises:
        DataError: an item that is no message.
    """
    return tuple(_message(item, name) for item in value)


def _message(item: object, name: str) -> Message:
    if isinstance(item, Mapping) and "role" in item:
        return item
    if isinstance(item, Mapping) and {"from", "value"} <= item.keys():
        return {"role": _SHARE_GPT.get(item["from"], item["from"]), "content": item["value"]}
    found = f"keys {', '.join(map(repr, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    raise DataError(
        f"{name} holds {found} where a message was expected; write {{'role': 'user', 'content': '...'}}, or name a "
        "column of text"
    )


def chat_template(processor: Any) -> str | None:
    """The chat template of a tokenizer or processor, else that of the tokenizer in it."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None


class ChatTokenizer:
    """Tokens of documents by a tokenizer and its chat template.

    Args:
        tokenizer: of transformers.
        template: in Jinja; None refuses chats.
        marked: whether to find out which tokens are completion.
    """

    def __init__(self, tokenizer: Any, template: str | None, *, marked: bool = False) -> None:
        self._tokenizer, self._template, self._marked = tokenizer, template, marked

    def __call__(self, document: Document, *, special_tokens: bool) -> Tokens:
        """Tokens of a document; `special_tokens` as the tokenizer adds them: a chat template writes its own.

        Raises:
            DataError: a chat without a template, or one that the template refuses.
        """
        if isinstance(document, Chat):
            return self._chat(document.messages)
        if isinstance(document, str):
            return Tokens(self._encode(document, special_tokens), None)
        ids = self._encode(document.text, special_tokens)
        if not self._marked:
            return Tokens(ids, None)
        prompt = document.text[: len(document.text) - len(document.completion)]
        first = _shared(self._encode(prompt, special_tokens), ids) if prompt else 0
        return Tokens(ids, [position >= first for position in range(len(ids))])

    def _chat(self, messages: Sequence[Message]) -> Tokens:
        if self._template is None:
            raise DataError(
                "the data holds chats, but the tokenizer has no chat template to write them as text: take the model's "
                "chat version, set tokenizer.chat_template, or name columns of plain text"
            )
        if not self._marked:
            return Tokens(self._encode(self._render(messages), False), None)
        if _GENERATION.search(self._template):
            marks = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            found = self._apply(messages, **marks)
            return Tokens(list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]])
        return self._by_prefixes(messages)

    def _by_prefixes(self, messages: Sequence[Message]) -> Tokens:
        """A turn is what the chat up to its end has more than the chat up to its beginning."""
        text = self._render(messages)
        ids = self._encode(text, False)
        completion = [False] * len(ids)
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._before(messages, position, text)
                first = _shared(self._encode(before, False), ids) if before else 0
                last = _shared(self._encode(self._render(messages[: position + 1]), False), ids)
                completion[first:last] = [True] * max(0, last - first)
        return Tokens(ids, completion)

    def _before(self, messages: Sequence[Message], position: int, text: str) -> str:
        """What stands before a turn, with the head of the turn where the template can tell it."""
        if position == 0:
            return ""
        for prompted in (True, False):
            before = self._render(messages[:position], add_generation_prompt=prompted)
            if text.startswith(before):
                return before
        raise DataError(
            f"the chat template writes the beginning of the chat {_shown(messages)} in another way when more follows, "
            "so the assistant's tokens cannot be told: put {% generation %} around them in the template"
        )

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        return str(self._apply(messages, tokenize=False, **options))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            chat = [dict(message) for message in messages]
            return self._tokenizer.apply_chat_template(chat, chat_template=self._template, **options)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"the chat template refuses the chat {_shown(messages)}: {error}; leave such rows out, or give a "
                "tokenizer whose template takes them"
            ) from error

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)


def _shared(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    differing = (i for i, (one, other) in enumerate(zip(prefix, ids, strict=False)) if one != other)
    return next(differing, min(len(prefix), len(ids)))


def _shown(messages: Sequence[Message]) -> str:
    content = str(messages[0].get("content")) if messages else ""
    return repr(content if len(content) <= _SHOWN else content[:_SHOWN] + "...")
