"""Extractive question answering over long contexts: questions, contexts and answers become labelled windows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.questions.question_windows import (
    EncodedPair,
    Int32Array,
    QuestionWindow,
    example_name,
    max_context_window,
)
from lightning_llm.datamodules.windows import window_table

EXAMPLES_AT_ONCE = 1000  # what the tokenizer returns for them is many times larger than their arrays

log = logging.getLogger(__name__)


def encode_questions(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    doc_stride: int = 128,
    *,
    skip_mismatched: bool = False,
) -> list[QuestionWindow]:
    """Encode questions, each with all windows of its context; no token of a context is lost.

    Two windows that follow each other share ``doc_stride`` tokens (Hugging Face's meaning; in BERT's code it is the
    step). So any span of at most ``doc_stride + 1`` context tokens lies whole in some window. With answers, a window
    is labelled with the first answer that lies whole in it, else with "no answer".

    Args:
        examples: Rows of SQuAD's form: ``question`` (white space before it is ignored), ``context``, an ``id`` (else
            the row's number), and for training ``answers``, {"text": [...], "answer_start": [...]}, the latter in
            characters. No text, or empty text, means that there is no answer.
        tokenizer: A fast tokenizer.
        max_length: Tokens in a window: question, context and special tokens.
        doc_stride: Context tokens that a window shares with the one before it.
        skip_mismatched: Leave out answers that the context does not have where they say, and examples all of whose
            answers are such; a warning tells how many. Otherwise such an answer is an error.

    Returns:
        The windows in order; an empty context has one, without a context token.

    Raises:
        ValueError: If the tokenizer is a slow one, an example has no question or context, a question leaves no room
            for its context, or an answer does not match.

    Example:
        Bytes for tokens: windows of the four bytes of the question and eight of the context, three of them shared.

        >>> from lightning_llm.datamodules.tokenizer import byte_tokenizer
        >>> answers = {"text": ["Bob"], "answer_start": [10]}
        >>> example = {"question": "Who?", "context": "Ann, then Bob", "answers": answers}
        >>> windows = encode_questions([example], byte_tokenizer(), max_length=12, doc_stride=3)
        >>> [(window.start, window.length, window.start_position, window.end_position) for window in windows]
        [(0, 8, 0, 0), (5, 8, 9, 11)]
    """
    if not tokenizer.is_fast:
        raise ValueError(f"Expected a fast tokenizer (one with a tokenizer.json), but got {type(tokenizer).__name__}.")
    if doc_stride < 0:
        raise ValueError(f"`doc_stride` is the number of tokens that two windows share, but got {doc_stride}.")
    windows: list[QuestionWindow] = []
    mismatches: list[str] = []
    num_left_out = 0
    for index, (example, pair) in enumerate(zip(examples, _encode_pairs(examples, tokenizer), strict=True)):
        name = example_name(example, index)
        spans, problems = answer_token_spans(example["context"], example.get("answers"), pair.offsets)
        mismatches += [f"Example {name}: {problem}." for problem in problems]
        if mismatches and not skip_mismatched:
            raise ValueError(
                f"{mismatches[0]} Mend the data (was the context changed after the answers were found?), or "
                "leave such answers out with skip_mismatched=True."
            )
        room = _room_for_context(name, pair, max_length, doc_stride)
        if problems and not spans:
            num_left_out += 1
        else:
            windows += _windows_of_pair(index, example["context"], pair, spans, room, doc_stride, tokenizer)
    if mismatches:
        log.warning(
            "%d answers do not match their context and are left out, with %d examples that have no other answer. %s",
            len(mismatches),
            num_left_out,
            mismatches[0],
        )
    return windows


def _encode_pairs(examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[EncodedPair]:
    for first in range(0, len(examples), EXAMPLES_AT_ONCE):
        part = [examples[index] for index in range(first, min(first + EXAMPLES_AT_ONCE, len(examples)))]
        for index, example in enumerate(part, start=first):
            if not all(isinstance(example.get(field), str) for field in ("question", "context")):
                raise ValueError(
                    f"Example {example_name(example, index)}: expected the texts `question` and `context`, but got "
                    f"{ {key: type(value).__name__ for key, value in example.items()} }."
                )
        encoding = tokenizer(
            [example["question"].lstrip() for example in part],
            [example["context"] for example in part],
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for row, ids in enumerate(encoding["input_ids"]):
            of_context = np.array([sequence == 1 for sequence in encoding.sequence_ids(row)], dtype=bool)
            begin = int(of_context.argmax()) if of_context.any() else len(ids)
            end = begin + int(of_context.sum())
            types = np.array(encoding["token_type_ids"][row], np.int32) if "token_type_ids" in encoding else None
            offsets = np.array(encoding["offset_mapping"][row][begin:end], np.int32).reshape(-1, 2)
            yield EncodedPair(np.array(ids, np.int32), types, begin, end, offsets)


def _room_for_context(name: str, pair: EncodedPair, max_length: int, doc_stride: int) -> int:
    num_context = len(pair.offsets)
    num_other = len(pair.input_ids) - num_context
    room = max_length - num_other
    if num_context > room and room <= doc_stride:
        raise ValueError(
            f"Example {name}: its question and the special tokens take {num_other} of max_length={max_length} tokens, "
            f"but its context of {num_context} tokens needs windows with more than doc_stride={doc_stride} of them. "
            "Raise `max_length`, lower `doc_stride`, or shorten the question."
        )
    return room


def answer_token_spans(
    context: str, answers: Mapping[str, Any] | None, offsets: npt.NDArray[np.integer[Any]]
) -> tuple[list[tuple[int, int]], list[str]]:
    """Find the tokens that hold at least one character of each answer.

    Args:
        context: The text.
        answers: {"text": [...], "answer_start": [...]}, in characters; empty texts are passed over.
        offsets: (num_tokens, 2) characters [begin, end) of each token.

    Returns:
        The first and last token of each answer, and what is wrong with the others, in words.

    Example:
        >>> offsets = np.array([[0, 3], [4, 7], [7, 9]])
        >>> answer_token_spans("The catty", {"text": ["catt", "dog"], "answer_start": [4, 4]}, offsets)
        ([(1, 2)], ["the answer 'dog' should begin at character 4, but there the context reads 'cat'"])
    """
    spans, problems = [], []
    answers = answers or {"text": [], "answer_start": []}
    for text, begin in zip(answers["text"], answers["answer_start"], strict=True):
        end = begin + len(text)
        tokens = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))
        if not text:
            continue
        if begin < 0 or context[begin:end] != text:
            found = context[max(begin, 0) : max(end, 0)]
            problems.append(
                f"the answer {text!r} should begin at character {begin}, but there the context reads {found!r}"
            )
        elif not len(tokens):
            problems.append(f"the tokenizer makes no token of the answer {text!r}")
        else:
            spans.append((int(tokens[0]), int(tokens[-1])))
    return spans, problems


def _windows_of_pair(
    index: int,
    context: str,
    pair: EncodedPair,
    spans: list[tuple[int, int]],
    room: int,
    doc_stride: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[QuestionWindow]:
    num_context = len(pair.offsets)
    table = window_table([max(num_context, 1)], max(room, 1), max(room - doc_stride, 1), right_align=False)
    lengths = np.minimum(table.length, num_context)  # an empty context has one window all the same
    owner = max_context_window(table.start, table.start + lengths, num_context)
    has_text = np.array([bool(context[begin:end].strip()) for begin, end in pair.offsets.tolist()], dtype=bool)
    for number, (start, length) in enumerate(zip(table.start.tolist(), lengths.tolist(), strict=True)):
        part = slice(start, start + length)
        window = QuestionWindow(index, pair, start, length, (owner[part] == number) & has_text[part])
        null = _null_position(window.input_ids, tokenizer)
        shift = pair.context_begin - start  # from the context to the window's input
        held = [(first + shift, last + shift) for first, last in spans if start <= first and last < start + length]
        first, last = held[0] if held else (null, null)
        yield replace(window, null_position=null, start_position=first, end_position=last)


def _null_position(input_ids: Int32Array, tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        is_token = input_ids == token
        if np.any(is_token):
            return int(np.argmax(is_token))
    return 0
