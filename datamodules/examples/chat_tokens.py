"""From conversations to token ids and labels: a tokenizer's chat template, and what the assistant says in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.examples.messages import Message
from lightning_llm.datamodules.examples.records import RecordError
from lightning_llm.datamodules.examples.rendered_chat import RenderedChat, Span
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

TrainOn = Literal["assistant", "last_assistant", "all"]


class EncodedChat(NamedTuple):
    """A conversation in tokens.

    Attributes:
        input_ids: (tokens,) int64, those of ``tokenizer.apply_chat_template``.
        labels: (tokens,) int64, the token where it is a target and -100 elsewhere. The first one never is.
        num_open: Turns that the template ends with nothing: a model does not learn from them to end its own.
    """

    input_ids: Int64Array
    labels: Int64Array
    num_open: int = 0


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template, and finds what the assistant generates.

    A turn's targets begin where the template's generation prompt ends, and reach to the end of the token that ends the
    turn: what a model must generate there. White space behind that token is none of it.

    Templates that mark it (``{% generation %}``) are believed. With others, a conversation is rendered up to each turn
    with a generation prompt, and with the turn. Where these are beginnings of the whole, they say where the turn is.
    Where they are not, as some templates leave out of earlier turns what they show of the last one (reasoning, an end
    of the text), message texts are found by putting a mark in their place, and the text behind them is compared.

    Args:
        tokenizer: With a chat template, and fast, for it must say which characters a token is of.
        options: What the template may ask for beside messages and tools, such as ``{"enable_thinking": False}``.

    Raises:
        ValueError: For a tokenizer without a template, or that is not fast.

    References:
        https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template, as those "
                f"of base models have none. Pass chat_template=... (chatml, llama-3, a file or a Jinja text), or take "
                f"the tokenizer of the chat model."
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token is of, so an assistant's tokens "
                f"cannot be told from others. Expected a fast tokenizer (`tokenizer.json`)."
            )
        self.tokenizer = tokenizer
        self.options = dict(options or {})

    def encode(
        self,
        messages: Sequence[Message],
        row: str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        train_on: TrainOn = "assistant",
        first: int = 0,
    ) -> EncodedChat:
        """Encode a conversation.

        Args:
            messages: With ``role`` and ``content``.
            row: The row's name, for messages of errors.
            tools: That the assistant may call.
            train_on: ``assistant``: its turns are targets. ``last_assistant``: the last of them. ``all``: every token.
            first: Number of the first message that may be a target.

        Raises:
            RecordError: If no turn is the assistant's, or the template refuses or garbles the conversation.
        """
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= first]
        if not turns:
            raise RecordError(
                f"{row}: the conversation has no assistant's turn{' behind the prompt' if first else ''}, and so "
                f"nothing to learn: its roles are {[message['role'] for message in messages]}. Leave the row out, or "
                f"name the roles with role_names=..."
            )
        chat = RenderedChat(self.tokenizer, messages, row, tools=tools, options=self.options)
        tokens = TextTokens.of(self.tokenizer, chat.text)
        if train_on == "all":
            return EncodedChat(tokens.ids, _without_first(tokens.ids.copy()))
        turns = turns[-1:] if train_on == "last_assistant" else turns
        spans = chat.marked(turns) if chat.is_marked else [chat.turn(turn, tokens.ends) for turn in turns]
        num_open = sum(chat.is_open(*each) for each in zip(turns, spans, strict=False) if not chat.is_marked)
        labels = tokens.labels(spans)
        if not (labels != IGNORE_INDEX).any():
            raise RecordError(f"{row}: the chat template shows nothing of the assistant's turns. Leave the row out.")
        return EncodedChat(tokens.ids, labels, num_open)


class TextTokens(NamedTuple):
    """The tokens of a text and the characters that each is of.

    Attributes:
        ids: (tokens,) int64.
        begins: (tokens,) int64, first character.
        ends: (tokens,) int64, ascending, behind the last one; equal to ``begins`` for tokens that are of none.
    """

    ids: Int64Array
    begins: Int64Array
    ends: Int64Array

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> TextTokens:
        """Encode a text.

        Tokenizers leave white space out of a token's characters: all of it, if the token is nothing else. So a token
        is also of the characters between the token before it and itself.
        """
        encoding = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False, verbose=False
        )
        offsets = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        ends = np.maximum.accumulate(offsets[:, 1])
        before = np.append(0, ends)[:-1]
        has_some = offsets[:, 1] > offsets[:, 0]
        begins = np.where(has_some, np.minimum(offsets[:, 0], before), before)
        return cls(np.asarray(encoding["input_ids"], np.int64), begins, ends)

    def labels(self, spans: Sequence[Span]) -> Int64Array:
        """(tokens,) int64, the tokens that have a character of the spans, -100 for others and for the first token.

        Example:
            >>> tokens = TextTokens(np.array([5, 6, 7]), np.array([0, 2, 5]), np.array([2, 5, 6]))
            >>> tokens.labels([(3, 5)]).tolist()
            [-100, 6, -100]
        """
        is_target = np.zeros(len(self.ids), bool)
        for begin, end in spans:
            is_target |= (self.begins < end) & (self.ends > begin) & (self.ends > self.begins)
        return _without_first(np.where(is_target, self.ids, IGNORE_INDEX))


def _without_first(labels: Int64Array) -> Int64Array:
    labels[:1] = IGNORE_INDEX
    return labels
