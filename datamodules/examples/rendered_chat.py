"""A conversation as a chat template writes it, and which of its characters are what the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_llm.datamodules.examples.messages import Message
from lightning_llm.datamodules.examples.records import RecordError
from lightning_llm.datamodules.windows import Int64Array

Span = tuple[int, int]  # characters of a text, from and to

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = "\ue0f7"  # stands for a message's text where that is looked for: a character that no text uses


class RenderedChat:
    """A conversation in a template's words.

    Args:
        tokenizer: Whose template it is.
        messages: One at least.
        row: The row's name, for messages of errors.
        tools: See :meth:`ChatEncoder.encode`.
        options: What else the template may ask for.

    Attributes:
        text: The conversation.

    Raises:
        RecordError: If the template refuses the conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        row: str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.messages = list(messages)
        self.row = row
        self._tools = None if tools is None else list(tools)
        self._options = dict(options or {})
        text = self._render(self.messages)
        if isinstance(text, Exception):
            raise RecordError(
                f"{row}: the chat template refuses the conversation (roles "
                f"{[message['role'] for message in messages]}): {type(text).__name__}: {text}. Mend the row, leave it "
                f"out, or pass another chat_template=..."
            ) from text
        self.text = text

    @cached_property
    def is_marked(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        return bool(_GENERATION.search(self._template))

    def marked(self, turns: Sequence[int]) -> list[Span]:
        """What the template says that the assistant generates, in some of its turns.

        Raises:
            RecordError: If it does not show the messages that divide those turns from others.
        """
        render: Any = render_jinja_template  # which has two results, whatever its annotation says
        _, spans = render(
            conversations=[self.messages],
            tools=self._tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self._options},
        )
        generated: list[Span] = [(begin, end) for begin, end in spans[0]]
        if len(turns) == sum(message["role"] == "assistant" for message in self.messages):
            return generated
        chosen = []
        for turn in turns:
            before = [self._place(self.messages, n) for n in range(turn)]
            behind = [self._place(self.messages, n) for n in range(turn + 1, len(self.messages))]
            begin = max((place[1] for place in before if place), default=0)
            end = min((place[0] for place in behind if place), default=len(self.text))
            chosen += [span for span in generated if begin <= span[0] and span[1] <= end]
        return chosen

    def turn(self, turn: int, token_ends: Int64Array) -> Span:
        """What an assistant's turn is: from the end of a generation prompt to the end of what ends the turn.

        Args:
            turn: Number of the message.
            token_ends: (tokens,) where the tokens of the text end.

        Raises:
            RecordError: If the template does not let it be told.
        """
        begin, end = self._begin(turn), self._end(turn, token_ends)
        if begin >= end:
            raise self._unclear(turn, "it shows nothing of it")
        if not self.is_open(turn, (begin, end)):
            end = begin + len(self.text[begin:end].rstrip())
        return begin, end

    def is_open(self, turn: int, span: Span) -> bool:
        """Whether nothing but white space follows the message's text in its turn."""
        said, shown = self.messages[turn].get("content"), self.text[slice(*span)]
        if not isinstance(said, str) or self.messages[turn].get("tool_calls"):
            return False
        begin = shown.find(said.strip())
        return begin >= 0 and not shown[begin + len(said.strip()) :].strip()

    # ---- details -------------------------------------------------------------------------------------------------

    def _begin(self, turn: int) -> int:
        prompt = self._render(self.messages[:turn], generates=True)
        if isinstance(prompt, str) and self.text.startswith(prompt):
            return len(prompt)
        own = self._place(self.messages, turn)
        before = self._place(self.messages, turn - 1) if turn else (0, 0)
        if own is None or before is None:
            raise self._unclear(turn, "the conversation up to it is not written as the whole begins, nor is its text")
        if isinstance(prompt, Exception):  # the template has no prompt without a user's message
            return self._first_prompt(turn, before[1], own[0])
        place = self._place(self.messages[:turn], turn - 1, generates=True)
        if place is not None:
            tail = prompt[place[1] :]
            begin = before[1] + _num_common(self.text[before[1] :], tail)
            if not tail[begin - before[1] :].strip():
                return begin
            if begin >= own[0]:  # the prompt goes on with what is left out here, such as an empty reasoning
                return own[0]
        raise self._unclear(turn, "a generation prompt in its place is written otherwise than in the whole")

    def _first_prompt(self, turn: int, begin: int, end: int) -> int:
        """Where the generation prompt ends that stands between two places."""
        asked = self._render(self.messages[: turn + 1], generates=True)
        told = self._render(self.messages[: turn + 1])
        if isinstance(asked, str) and isinstance(told, str) and len(asked) > len(told) and asked.startswith(told):
            prompt = asked[len(told) :]
            found = self.text.find(prompt, begin, end)
            if found >= 0:
                return found + len(prompt)
        raise self._unclear(turn, "no user's message stands before it, and there the template has no generation prompt")

    def _end(self, turn: int, token_ends: Int64Array) -> int:
        messages = self.messages[: turn + 1]
        if len(messages) == len(self.messages):
            return len(self.text)
        cut = self._render(messages)
        if isinstance(cut, str) and self.text.startswith(cut):
            return len(cut)
        own, place = self._place(self.messages, turn), self._place(messages, turn)
        if own is None or place is None or not isinstance(cut, str):
            raise self._unclear(turn, "the conversation up to its end is not written as the whole begins")
        tail = cut[place[1] :]
        end = own[1] + _num_common(self.text[own[1] :], tail)
        if end - own[1] < len(tail):  # what follows may begin with the same characters, but not with the same token
            end = max(int(token_ends[token_ends <= end].max(initial=0)), own[1])
        return end

    def _place(self, messages: list[Message], number: int, *, generates: bool = False) -> Span | None:
        """Where a message's text stands; None if the template does not show it, or more than once."""
        content = messages[number].get("content", "")
        mark: Any = [{"type": "text", "text": _MARK}] if isinstance(content, list) else _MARK
        others = [*messages[:number], {**messages[number], "content": mark}, *messages[number + 1 :]]
        text, other = self._render(messages, generates=generates), self._render(others, generates=generates)
        if not isinstance(text, str) or not isinstance(other, str) or other.count(_MARK) != 1:
            return None
        begin = _num_common(text, other)
        return begin, len(text) - _num_common(text[begin:][::-1], other[::-1])

    def _render(self, messages: list[Message], *, generates: bool = False) -> str | Exception:
        """The template's text, or what it raises: errors of its own, or of what it does with a message's fields."""
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                tools=self._tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=generates,
                **self._options,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            return error
        return str(text)

    @cached_property
    def _template(self) -> str:
        return self.tokenizer.get_chat_template(tools=self._tools)  # type: ignore[arg-type]

    def _unclear(self, turn: int, why: str) -> RecordError:
        return RecordError(
            f"{self.row}: the chat template does not let the assistant's message {turn} be told from the others: "
            f"{why}. Put {{% generation %}} and {{% endgeneration %}} around what the assistant says in the template "
            f"and pass it as chat_template=..., or leave the row out."
        )


def _num_common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
