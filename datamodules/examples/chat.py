"""Conversations to fine-tune a language model on, with a loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.collate import Layout, Segment
from lightning_llm.datamodules.examples.chat_templates import with_chat_template
from lightning_llm.datamodules.examples.chat_tokens import ChatEncoder, TrainOn
from lightning_llm.datamodules.examples.conversation_rows import (
    ChatWindowing,
    ConversationDataset,
    LongChats,
    conversation_table,
    targets_of,
)
from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.messages import MessageReader, tools_of
from lightning_llm.datamodules.examples.records import Record
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.shorter_rows import cut_rows
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX


class ChatDataModule(ExampleDataModule):
    """Conversations, for ``LLMModule(task="causal-lm")``: labels stand on the assistant's turns alone.

    A row of the data is a list of messages, ``[{"role": "user", "content": "..."}, ...]``. The tokenizer's chat
    template makes tokens of it, the same as ``tokenizer.apply_chat_template``. Targets are what the assistant generates
    after the template's generation prompt, with the token that ends its turn;
    see :class:`~lightning_llm.datamodules.examples.chat_tokens.ChatEncoder`. ``row_text`` shows them.

    Args:
        data: Jsonl, json, csv (messages as JSON) or parquet files, a data set, or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a row.
        messages_column: The column of the messages.
        role_field: In a message, who speaks; ``from`` in ShareGPT's form.
        content_field: In a message, what; ``value`` in ShareGPT's form.
        role_names: Which of ``system``, ``user``, ``assistant``, ``tool`` other names stand for, beside the usual
            ones (``human``, ``gpt``, ``function``, ...).
        prompt_column: Together with ``completion_column``, instead of messages: a text of the user's, or the first
            messages, which are no targets.
        completion_column: A text of the assistant's, or the last messages.
        tools_column: Tools that the assistant may call, JSON schemas for the template.
        chat_template: Instead of the tokenizer's: ``chatml``, ``gemma``, ``llama-2``, ``llama-3``, ``mistral``,
            ``phi-3``, ``zephyr``, a file, or a Jinja text.
        template_options: What the template may ask for besides, such as ``{"enable_thinking": False}``.
        train_on: ``assistant``: all its turns. ``last_assistant``: the last of each conversation. ``all``: every token.
        windowing: ``packed``: whole conversations packed best-fit into rows of ``max_length``; they do not see each
            other. ``documents``: one conversation a row.
        long: Of conversations beyond ``max_length``: ``cut`` leaves out their ends, with a warning that says how much.
            ``windows`` cuts them into windows; each target is one in exactly one of them.
        stride: For ``windows``: new tokens in each window behind the first, the others are context; None: all but one.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, a tokenizer without a chat template, and for rows that
            cannot be used, naming the row.
    """

    _packs = True

    def __init__(
        self,
        data: Any,
        tokenizer: str | Any,
        max_length: int = 2048,
        *,
        messages_column: str = "messages",
        role_field: str = "role",
        content_field: str = "content",
        role_names: dict[str, str] | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        tools_column: str | None = None,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        train_on: TrainOn = "assistant",
        windowing: ChatWindowing = "packed",
        long: LongChats = "cut",
        stride: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        _check_choices(train_on=(train_on, TrainOn), windowing=(windowing, ChatWindowing), long=(long, LongChats))
        if self.batch_settings.batching == "padded" and windowing == "packed":
            raise ValueError(
                "batching='padded' is for rows of unequal length, but those of windowing='packed' are full. Use "
                "batching='rows' or 'padding_free', or windowing='documents'."
            )
        if stride is not None and (long != "windows" or not 1 <= stride < max_length):
            raise ValueError(
                f"`stride` is the number of new tokens in a window, for long='windows', and lies in "
                f"1..{max_length - 1} (max_length - 1), but got stride={stride} with long={long!r}."
            )
        if (prompt_column is None) != (completion_column is None):
            raise ValueError(
                f"`prompt_column` and `completion_column` belong together, but got {prompt_column!r} and "
                f"{completion_column!r}."
            )
        self.messages_column = messages_column
        self.reader = MessageReader(role_field, content_field, role_names or {})
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.tools_column = tools_column
        self.chat_template = chat_template
        self.template_options = template_options
        self.train_on: TrainOn = train_on
        self.windowing: ChatWindowing = windowing
        self.long: LongChats = long
        self.stride = stride

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def packs_documents(self) -> bool:
        """Whether rows hold several conversations, which the model must keep apart."""
        return self.windowing == "packed" or self.batch_settings.batching == "padding_free"

    def cut_batch(self, batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
        """A training batch in rows of ``length`` tokens at most, every target in one of them; for callbacks."""
        layout: Layout = self.batch_settings.layout or ("packed" if self.windowing == "packed" else "padded")
        return cut_rows(batch, length, layout=layout, pad_token_id=self._pad_token_id())

    def row_text(self, row_id: int, split: Split = "train") -> str:
        """The text of a row, as a batch's ``row_ids`` name it, with what is learnt in ``⟦ ⟧``."""
        dataset = self._dataset(split)
        assert isinstance(dataset, ConversationDataset)
        (segments,) = dataset.row_segments([row_id])
        return "\n\n".join(_shown(self.tokenizer, segment) for segment in segments)

    # ---- what is said of conversations ---------------------------------------------------------------------------

    @cached_property
    def _chats(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, self.template_options)

    def _columns(self) -> Mapping[str, str]:
        tools = {} if self.tools_column is None else {"tools_column": self.tools_column}
        if self.prompt_column is None or self.completion_column is None:
            return {"messages_column": self.messages_column, **tools}
        return {"prompt_column": self.prompt_column, "completion_column": self.completion_column, **tools}

    def _encoding(self) -> Mapping[str, Any]:
        return {
            "template": self._chats.tokenizer.chat_template,
            "options": self.template_options,
            "reader": vars(self.reader),
            "train_on": self.train_on,
        }

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        return [[self._conversation(record, row)] for record, row in zip(records, names, strict=True)]

    def _conversation(self, record: Record, row: str) -> Example:
        tools = None if self.tools_column is None else tools_of(record.get(self.tools_column), self.tools_column, row)
        if self.prompt_column is None or self.completion_column is None:
            messages = self.reader(record.get(self.messages_column), self.messages_column, row)
            first = 0
        else:
            messages = self.reader(record.get(self.prompt_column), self.prompt_column, row, text_is="user")
            first = len(messages)
            completion = record.get(self.completion_column)
            messages = messages + self.reader(completion, self.completion_column, row, text_is="assistant")
        chat = self._chats.encode(messages, row, tools=tools, train_on=self.train_on, first=first)
        return {"input_ids": chat.input_ids, "labels": chat.labels, "_num_open": chat.num_open}

    def _make_dataset(self, split: Split, store: ExampleStore, rows: Int64Array) -> ConversationDataset:
        source = self.records(split).name
        table = conversation_table(
            *(store.offsets["input_ids"], targets_of(store), rows, self.max_length),
            *(self.windowing, self.long, self.stride),
        )
        if not len(table):
            raise ValueError(
                f"No target of {source} ({split}) lies within max_length={self.max_length}. Raise it, or pass "
                f"long='windows'."
            )
        if table.num_cut:
            rank_zero_warn(
                f"{table.num_cut:,} of {len(rows):,} conversations of {source} ({split}) are longer than max_length="
                f"{self.max_length}: {table.segments.num_cut_tokens:,} tokens are left out, "
                f"{table.num_cut_targets:,} of them targets. Raise `max_length`, or pass long='windows'."
            )
        num_open = int(store.values["_num_open"][rows].sum())
        if num_open:
            rank_zero_warn(
                f"{num_open:,} turns of the assistant in {source} ({split}) end with nothing: the chat template has no "
                f"token there that a model could learn to stop at. Pass a chat_template=... that ends turns."
            )
        layout = self.batch_settings.layout if split == "train" else None
        return ConversationDataset(store, table, self._pad_token_id(), layout)

    def _training_identity(self) -> dict[str, Any] | None:
        identity = super()._training_identity()
        if identity is None:
            return None
        settings = {"max_length": self.max_length, "windowing": self.windowing, "long": self.long}
        return {**identity, **settings, "stride": self.stride}

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        return with_chat_template(super()._make_tokenizer(), self.chat_template)


def _check_choices(**choices: tuple[Any, Any]) -> None:
    for name, (value, known) in choices.items():
        if value not in get_args(known):
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, get_args(known)))}, but got {value!r}.")


def _shown(tokenizer: PreTrainedTokenizerBase, segment: Segment) -> str:
    """A conversation's text with brackets around its targets."""
    assert segment.labels is not None
    is_target = np.asarray(segment.labels) != IGNORE_INDEX
    is_target[: max(segment.num_context, 1)] = False
    parts = []
    for begin, end in pairwise([0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(is_target)]):
        text = tokenizer.decode(segment.tokens[begin:end].tolist())
        parts.append(f"\u27e6{text}\u27e7" if is_target[begin] else str(text))
    return "".join(parts)
