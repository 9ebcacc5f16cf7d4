"""Pairs of answers, of which one is preferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.examples.chat_templates import with_chat_template
from lightning_llm.datamodules.examples.chat_tokens import ChatEncoder, EncodedChat, TextTokens
from lightning_llm.datamodules.examples.data_module import ExampleDataModule
from lightning_llm.datamodules.examples.dataset import ExampleTable
from lightning_llm.datamodules.examples.messages import Message, MessageReader, tools_of
from lightning_llm.datamodules.examples.preference_pairs import common_messages, fit_pair
from lightning_llm.datamodules.examples.records import Record, RecordError, Records
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import text_of
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")


class PreferenceDataModule(ExampleDataModule):
    """Prompts with a chosen and a rejected answer, for ``LLMModule(task="dpo")``.

    Batches have ``chosen_input_ids``, ``chosen_attention_mask`` and ``chosen_labels`` (pairs, seq), and the same of
    ``rejected``: prompt and answer together, with labels on the answer alone. A row that is too long loses the
    beginning of its prompt, the same on both sides; only answers that do not fit by themselves lose their ends.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens of prompt and answer at most; a warning says how much is cut.
        prompt_column: The column of the prompts, texts or lists of messages. None: ``chosen`` and ``rejected`` hold
            whole conversations, and what they have in common at their beginning is the prompt.
        chosen_column: Of the better answers.
        rejected_column: Of the others.
        texts: What texts are. ``chat``: a prompt is the user's message and an answer the assistant's, in the words of
            the chat template. ``plain``: the answer follows the prompt as it stands, and the end-of-text token ends it.
        tools_column: Tools that the assistant may call, JSON schemas for the template.
        chat_template: Instead of the tokenizer's: a name such as ``chatml``, a file, or a Jinja text;
            see :class:`~lightning_llm.datamodules.ChatDataModule`.
        template_options: What the template may ask for besides.
        role_field: In a message, who speaks.
        content_field: In a message, what.
        role_names: Which of ``system``, ``user``, ``assistant``, ``tool`` other names stand for.
        reference_logps: Whether rows have the reference model's ``ref_chosen_logps`` and ``ref_rejected_logps``.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    _why_left_out = " Each has the same answer twice, and there is nothing to prefer."
    _instead_of_cutting = (
        "Prompts lose their beginnings, and answers their ends where they do not fit by themselves. Raise "
        "`max_length`, where the model allows it."
    )

    def __init__(
        self,
        data: Any,
        tokenizer: str | Any,
        max_length: int = 1024,
        *,
        prompt_column: str | None = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        texts: Literal["chat", "plain"] = "chat",
        tools_column: str | None = None,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        role_field: str = "role",
        content_field: str = "content",
        role_names: dict[str, str] | None = None,
        reference_logps: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        if texts not in ("chat", "plain"):
            raise ValueError(f"`texts` must be 'chat' or 'plain', but got {texts!r}.")
        if texts == "plain" and (prompt_column is None or chat_template is not None):
            raise ValueError(
                f"texts='plain' needs the column of the prompts and no chat template, but got prompt_column="
                f"{prompt_column!r} and chat_template={chat_template!r}."
            )
        if max_length < 3:
            raise ValueError(f"`max_length` must be 3 at least, for a prompt and an answer, but got {max_length}.")
        self.prompt_column = prompt_column
        self.chosen_column = chosen_column
        self.rejected_column = rejected_column
        self.texts = texts
        self.tools_column = tools_column
        self.chat_template = chat_template
        self.template_options = template_options
        self.reader = MessageReader(role_field, content_field, role_names or {})
        self.reference_logps = reference_logps
        self._same: list[str] = []  # rows whose answers are the same

    @cached_property
    def _chats(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, self.template_options)

    def _columns(self) -> Mapping[str, str]:
        columns = {
            "prompt_column": self.prompt_column,
            "chosen_column": self.chosen_column,
            "rejected_column": self.rejected_column,
            "tools_column": self.tools_column,
            **({name: name for name in _LOGPS} if self.reference_logps else {}),
        }
        return {argument: column for argument, column in columns.items() if column is not None}

    def _encoding(self) -> Mapping[str, Any]:
        return {
            "template": None if self.texts == "plain" else self._chats.tokenizer.chat_template,
            "options": self.template_options,
            "reader": vars(self.reader),
            "texts": self.texts,
        }

    def _examples(self, records: Records, unknown: Sequence[str] = ()) -> Iterator[Example]:
        self._same = []
        yield from super()._examples(records, unknown)
        if self._same:
            rank_zero_warn(
                f"{len(self._same):,} rows of {records.name} have the same answer twice, within max_length="
                f"{self.max_length}, and are left out, for there is nothing to prefer: the first is {self._same[0]}."
            )

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        return [self._pair(record, row) for record, row in zip(records, names, strict=True)]

    def _pair(self, record: Record, row: str) -> list[Example]:
        chosen, rejected = self._plain(record, row) if self.texts == "plain" else self._chat(record, row)
        chosen, rejected, num_cut = fit_pair(chosen, rejected, self.max_length, self.tokenizer.bos_token_id)
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            self._same.append(row)
            return []
        sides = {"chosen": chosen, "rejected": rejected}
        example: dict[str, Any] = {}
        for name, side in sides.items():
            example |= {f"{name}_input_ids": side.input_ids, f"{name}_labels": side.labels}
        if self.reference_logps:
            example |= {name: _number(record.get(name), name, row) for name in _LOGPS}
        return [{**example, "_num_cut": num_cut}]

    def _chat(self, record: Record, row: str) -> tuple[EncodedChat, EncodedChat]:
        columns = (self.chosen_column, self.rejected_column)
        tools = None if self.tools_column is None else tools_of(record.get(self.tools_column), self.tools_column, row)
        if self.prompt_column is None:
            wholes = [self.reader(record.get(column), column, row) for column in columns]
            num_common = common_messages(*wholes)
            if num_common == len(wholes[0]) == len(wholes[1]):
                num_common -= 1  # the same answer twice
            prompt, answers = wholes[0][:num_common], [whole[num_common:] for whole in wholes]
        else:
            prompt = self.reader(record.get(self.prompt_column), self.prompt_column, row, text_is="user")
            answers = [self.reader(record.get(column), column, row, text_is="assistant") for column in columns]
        sides = []
        for answer, column in zip(answers, columns, strict=True):
            if not any(map(_says_something, answer)):
                raise _no_answer(row, column)
            sides.append(self._chats.encode([*prompt, *answer], row, tools=tools, first=len(prompt)))
        return sides[0], sides[1]

    def _plain(self, record: Record, row: str) -> tuple[EncodedChat, EncodedChat]:
        assert self.prompt_column is not None
        prompt = text_of(record, self.prompt_column, row)
        return self._continued(prompt, record, self.chosen_column, row), self._continued(
            prompt, record, self.rejected_column, row
        )

    def _continued(self, prompt: str, record: Record, column: str, row: str) -> EncodedChat:
        """A prompt with an answer behind it, and the end of the text."""
        text = prompt + text_of(record, column, row)
        tokens = TextTokens.of(self.tokenizer, text, add_special_tokens=True)
        labels = tokens.labels([(len(prompt), len(text))])
        if not (labels != IGNORE_INDEX).any():
            raise _no_answer(row, column)
        ids, end = tokens.ids, self.tokenizer.eos_token_id
        if end is not None and ids[-1] != end:
            ids, labels = np.append(ids, end), np.append(labels, end)
        return EncodedChat(ids, labels)

    def _empty(self) -> Example:
        one = super()._empty()
        return {
            **{f"{side}_{name}": value for side in ("chosen", "rejected") for name, value in one.items()},
            **({name: np.float64(0.0) for name in _LOGPS} if self.reference_logps else {}),
        }

    def _table(self, store: ExampleStore, rows: Int64Array) -> ExampleTable:
        """Both sides run as rows of one width."""
        longer = np.maximum(store.lengths("chosen_input_ids"), store.lengths("rejected_input_ids"))
        return ExampleTable(2 * longer[rows], np.ones(len(rows), np.int64))

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        return with_chat_template(super()._make_tokenizer(), self.chat_template)


def _says_something(message: Message) -> bool:
    content = message.get("content")
    is_text = content.strip() if isinstance(content, str) else content
    return message["role"] == "assistant" and bool(is_text or message.get("tool_calls"))


def _no_answer(row: str, column: str) -> RecordError:
    return RecordError(
        f"{row}: column {column!r} holds no answer of the assistant behind the prompt. Give the row one, or leave it "
        f"out; where {column!r} holds the prompt too, pass prompt_column=None."
    )


def _number(value: Any, column: str, row: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecordError(f"{row}: column {column!r} should hold a number, but holds {value!r}.") from None
