"""Questions whose answers stand in a context, which may be longer than the model reads."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_llm.datamodules.examples.dataset import Collate, ExampleTable, PaddedColumns
from lightning_llm.datamodules.examples.record_windows import RecordWindowsDataModule
from lightning_llm.datamodules.examples.records import UNKNOWN, Record, RecordError
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.examples.texts import check_fast, encode_texts, text_of
from lightning_llm.datamodules.questions.answers import Answer, Logits, best_answers
from lightning_llm.datamodules.questions.question_answering import encode_questions
from lightning_llm.datamodules.questions.question_windows import QuestionWindow
from lightning_llm.datamodules.questions.scores import score_answers
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.rows import EMPTY_ROW
from lightning_llm.datamodules.text_settings import check_numbers
from lightning_llm.datamodules.windows import Int64Array


class QuestionAnsweringDataModule(RecordWindowsDataModule):
    """Questions with contexts and answers, for ``LLMModule(task="question-answering")``.

    A long context becomes several rows, windows that share ``doc_stride`` tokens, each with its question. Batches have
    ``input_ids``, ``attention_mask``, where the tokenizer makes them ``token_type_ids``, ``start_positions``,
    ``end_positions`` (batch,), the token for "no answer" where a window does not hold it, and ``example_ids`` (batch,):
    the number of the record that a window is of, -1 for an empty row. Validation holds out whole records.

    By these, ``char_begins`` and ``char_ends`` (batch, seq), the characters of the context that a token stands for, and
    ``null_positions`` (batch,), the token for "no answer", the task measures answers to whole questions. -1 stands in
    ``char_begins`` where no answer may begin, as where another window has more context, and in ``char_ends`` where none
    may end.

    Args:
        data: Jsonl, json, csv or parquet files, a data set, or a list of mappings.
        tokenizer: A fast tokenizer, its hub id or local folder, or ``bytes``.
        max_length: Tokens in a window: question, context and special tokens.
        doc_stride: Context tokens that a window shares with the one before it.
        question_column: The column of the questions.
        context_column: Of the contexts.
        answers_column: Of the answers: ``{"text": [...], "answer_start": [...]}`` as in SQuAD, a list of mappings with
            ``text`` and ``answer_start``, either of them as JSON, or one text, with ``answer_start_column``. Nothing,
            or no text, means that there is no answer.
        answer_start_column: Of the first characters of answers that are texts.
        skip_mismatched: Leave out answers that the context does not have where they say, with a warning; otherwise such
            a row is an error.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: str | Any,
        max_length: int = 384,
        *,
        doc_stride: int = 128,
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        answer_start_column: str | None = None,
        skip_mismatched: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, max_length, **options)
        check_numbers(doc_stride=doc_stride)
        self.doc_stride = doc_stride
        self.question_column = question_column
        self.context_column = context_column
        self.answers_column = answers_column
        self.answer_start_column = answer_start_column
        self.skip_mismatched = skip_mismatched

    # ---- what others may ask -------------------------------------------------------------------------------------

    def context_of(self, example: int) -> str:
        """The context of the record of this number, one of a batch's ``example_ids``."""
        record, row = self.record_of(example)
        return text_of(record, self.context_column, row)

    def answers_of(self, example: int) -> list[str]:
        """Its right answers; none where the context has no answer."""
        record, row = self.record_of(example)
        return [text for text in self._example(record, row)["answers"]["text"] if text]

    def best_answers(
        self,
        row_ids: Sequence[int],
        start_logits: Logits,
        end_logits: Logits,
        split: Split = "validation",
        **options: Any,
    ) -> dict[str, Answer]:
        """The answers to a split's questions, each chosen among all windows of its context.

        Args:
            row_ids: Rows of the split, in any order, all of a question; -1 is passed over.
            start_logits: One row of logits for each, padding on the right is ignored.
            end_logits: Likewise.
            split: Of the rows.
            **options: Of :func:`~lightning_llm.datamodules.questions.answers.best_answers`.

        Returns:
            An answer to each question, by its ``id``, else by the name of its row.

        Raises:
            ValueError: If windows of a question are missing.
        """
        found = {int(row): number for number, row in enumerate(row_ids) if int(row) != EMPTY_ROW}
        rows = sorted(found)
        examples, windows, missing = self._windows_of(rows, split)
        if missing:
            raise ValueError(
                f"An answer is chosen among all windows of its context, but there are no logits of {len(missing)} rows "
                f"of the {split} split: {missing[:5]}. Collect those of all batches and ranks."
            )
        starts, ends = ([logits[found[row]] for row in rows] for logits in (start_logits, end_logits))
        return best_answers(examples, windows, starts, ends, **options)

    def score_answers(self, answers: Mapping[str, Answer | str], split: Split = "validation") -> dict[str, float]:
        """``exact_match`` and ``f1`` of answers to all questions of a split, as :meth:`best_answers` gives them.

        Raises:
            ValueError: If the split has no right answers, or a question is not answered.
        """
        self.check_labelled(split)
        texts = {name: answer if isinstance(answer, str) else answer.text for name, answer in answers.items()}
        examples, _, _ = self._windows_of(range(len(self._dataset(split))), split)
        return score_answers(texts, {each["id"]: [t for t in each["answers"]["text"] if t] for each in examples})

    # ---- what a data module of examples says ---------------------------------------------------------------------

    def _columns(self) -> Mapping[str, str]:
        start = {} if self.answer_start_column is None else {"answer_start_column": self.answer_start_column}
        return {
            "question_column": self.question_column,
            "context_column": self.context_column,
            "answers_column": self.answers_column,
            **start,
        }

    def _target_columns(self) -> Collection[str]:
        return [column for column in (self.answers_column, self.answer_start_column) if column is not None]

    def _encoding(self) -> Mapping[str, Any]:
        return {"doc_stride": self.doc_stride, "skip_mismatched": self.skip_mismatched}

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        check_fast(self.tokenizer)
        examples = [{**self._example(record, row), "id": row} for record, row in zip(records, names, strict=True)]
        encoded: list[list[Example]] = [[] for _ in examples]
        for window in self._question_windows(examples):
            types, places = window.token_type_ids, (window.start_position, window.end_position)
            if records[window.example].get(self.answers_column) is UNKNOWN:
                places = (self.max_length, self.max_length)
            begins, ends = window.characters
            encoded[window.example].append(
                {
                    "input_ids": window.input_ids,
                    **({} if types is None else {"token_type_ids": types}),
                    **dict(zip(("start_positions", "end_positions"), places, strict=True)),
                    "char_begins": begins,
                    "char_ends": ends,
                    "null_positions": window.null_position,
                }
            )
        return encoded

    def _empty(self) -> Example:
        """Its answer lies behind the row, so that it is no target."""
        example = encode_texts(self.tokenizer, [""], [""], self.max_length)[0]
        del example["_num_cut"]
        places = {"start_positions": self.max_length, "end_positions": self.max_length}
        no_characters = np.full(len(example["input_ids"]), -1)
        return {**example, **places, "char_begins": no_characters, "char_ends": no_characters, "null_positions": 0}

    def _collate(self) -> Collate:
        return PaddedColumns(self._pad_token_id(), {"char_begins": -1, "char_ends": -1})

    def _table(self, store: ExampleStore, rows: Int64Array) -> ExampleTable:
        return ExampleTable(store.lengths("input_ids")[rows], np.full(len(rows), 2, np.int64))

    # ---- details -------------------------------------------------------------------------------------------------

    def _example(self, record: Record, row: str) -> dict[str, Any]:
        return {
            "question": text_of(record, self.question_column, row),
            "context": text_of(record, self.context_column, row),
            "answers": answers_of(record, self.answers_column, row, self.answer_start_column),
        }

    def _question_windows(self, examples: Sequence[Mapping[str, Any]]) -> list[QuestionWindow]:
        settings = {"skip_mismatched": self.skip_mismatched}
        return encode_questions(examples, self.tokenizer, self.max_length, self.doc_stride, **settings)

    def _windows_of(
        self, rows: Sequence[int], split: Split
    ) -> tuple[list[dict[str, Any]], list[QuestionWindow], list[int]]:
        """The records that rows are of, all their windows in order, and the rows of those that are not among them."""
        dataset = self._dataset(split)
        windows = [dataset.examples_of(row)[0] for row in range(len(dataset))]
        record_of = np.asarray(dataset.store.values["_record"])[windows]
        numbers = np.unique(record_of[np.asarray(rows, np.int64)])
        examples = []
        for number in numbers.tolist():
            name = self.records(split).row_name(number)
            record = self.records(split)[number]
            examples.append({**self._example(record, name), "id": str(record.get("id", name))})
        belongs = np.flatnonzero(np.isin(record_of, numbers))
        return examples, self._question_windows(examples), np.setdiff1d(belongs, np.asarray(rows)).tolist()


def answers_of(record: Record, column: str, row: str, start_column: str | None = None) -> dict[str, list[Any]]:
    """The answers of a record in SQuAD's form: ``text`` and ``answer_start``, lists of the same length.

    Raises:
        RecordError: If it has something else.

    Example:
        >>> answers_of({"answers": [{"text": "Bob", "answer_start": 10}]}, "answers", "row 0")
        {'text': ['Bob'], 'answer_start': [10]}
    """
    value = None if record.get(column) is UNKNOWN else record.get(column)
    if start_column is not None:
        value = {"text": value or [], "answer_start": record.get(start_column) if value else []}
    elif isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if isinstance(value, list):
        entries = [entry if isinstance(entry, Mapping) else {} for entry in value]
        value = {name: [entry.get(name) for entry in entries] for name in ("text", "answer_start")}
    value = value or {"text": [], "answer_start": []}
    columns = [value.get(name) for name in ("text", "answer_start")] if isinstance(value, Mapping) else [None, None]
    texts, starts = ([each] if isinstance(each, (str, int)) else each for each in columns)
    if isinstance(texts, (list, tuple)) and isinstance(starts, (list, tuple)) and len(texts) == len(starts):
        starts = [int(start) if isinstance(start, str) and start.strip().isdecimal() else start for start in starts]
        if all(isinstance(text, str) for text in texts) and all(isinstance(start, int) for start in starts):
            return {"text": list(texts), "answer_start": starts}
    raise RecordError(
        f"{row}: column {column!r} should hold the answers, {{'text': [...], 'answer_start': [...]}} with the first "
        f"character of each text in the context, but holds {str(record.get(column))[:80]!r}. A single text has its "
        f"place in a column of its own: answer_start_column=..."
    )
