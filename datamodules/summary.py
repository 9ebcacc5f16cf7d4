"""What the data are like, on one screen and in one picture: lengths, rows, and what truncating would have lost."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.text_source import SplitRows
from lightning_llm.datamodules.windows import Int64Array

_MAX_REFERENCE_BYTES = 1 << 25


class LengthStatistics(NamedTuple):
    """How long documents are, beside a row.

    Attributes:
        num_documents: How many.
        num_tokens: In all of them.
        median: Tokens of the middle document.
        percentile_90: Tokens that nine of ten documents do not exceed.
        longest: Tokens of the longest.
        num_longer: Documents longer than a row.
        tokens_in_longer: Tokens of those.
        tokens_truncated: Tokens beyond a row: what a pipeline that truncates would lose.
        padded_fill: Share of the positions that hold a token, if each document, truncated, is padded to a row.
    """

    num_documents: int
    num_tokens: int
    median: int
    percentile_90: int
    longest: int
    num_longer: int
    tokens_in_longer: int
    tokens_truncated: int
    padded_fill: float


def length_statistics(lengths: Int64Array, max_length: int) -> LengthStatistics:
    """Describe documents.

    Args:
        lengths: (num_documents,) tokens in each, one document at least.
        max_length: Tokens in a row.

    Example:
        >>> statistics = length_statistics(np.array([2, 4, 10]), max_length=4)
        >>> statistics.num_longer, statistics.tokens_truncated, round(statistics.padded_fill, 2)
        (1, 6, 0.83)
    """
    kept = np.minimum(lengths, max_length)
    longer = lengths > max_length
    median, high = np.quantile(lengths, [0.5, 0.9], method="lower").tolist()
    return LengthStatistics(
        num_documents=len(lengths),
        num_tokens=int(lengths.sum()),
        median=int(median),
        percentile_90=int(high),
        longest=int(lengths.max()),
        num_longer=int(longer.sum()),
        tokens_in_longer=int(lengths[longer].sum()),
        tokens_truncated=int((lengths - kept).sum()),
        padded_fill=float(kept.sum() / (len(lengths) * max_length)),
    )


def describe_source(name: str, train: SplitRows, validation: SplitRows | None) -> str:
    """A few lines on the documents of a source and the rows made of them."""
    store, documents, table = train
    length = length_statistics(store.lengths[documents], table.max_length)
    size = store.num_bytes.sum()
    lost = length.tokens_truncated / length.num_tokens
    kept = {"packed": "none is lost here", "wrapped": "none is lost here", "windows": "none is lost here"}
    lines = [
        f"{name}: {store.num_documents:,} documents, {size / 1e6:.1f} MB, {len(store.tokens):,} tokens "
        f"({size / max(len(store.tokens), 1):.2f} bytes a token)",
        f"  lengths     median {length.median:,}, 90% up to {length.percentile_90:,}, longest {length.longest:,}",
        f"  too long    {length.num_longer:,} documents ({length.num_longer / length.num_documents:.0%}) exceed "
        f"{table.max_length:,} tokens and hold {length.tokens_in_longer / length.num_tokens:.0%} of all; truncating "
        f"would lose {length.tokens_truncated:,} tokens ({lost:.0%}), "
        f"{kept.get(table.windowing, 'as it does here')}",
        f"  training    on {len(table):,} rows of {table.max_length} ({table.windowing}, {table.fill:.1%} full; "
        f"truncated and padded documents: {length.padded_fill:.0%}), {table.num_label_tokens:,} label tokens",
    ]
    if validation is not None:
        table = validation.table
        lines.append(
            f"  validating  on {len(table):,} rows ({table.windowing}) of {len(validation.documents):,} documents, "
            f"{table.num_label_tokens:,} label tokens"
        )
    return "\n".join(lines)


def zlib_bits_per_byte(splits: Iterable[SplitRows], tokenizer: PreTrainedTokenizerBase) -> float:
    """What zlib (level 9) needs for documents, at most 32 MiB of them: a yardstick for a model's bits per byte."""
    compressor = zlib.compressobj(9)
    num_bytes = compressed = 0
    for store, documents, _ in splits:
        for document in documents:
            ids = store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).encode()
            num_bytes += len(text)
            compressed += len(compressor.compress(text))
            if num_bytes > _MAX_REFERENCE_BYTES:
                break
    return 8 * (compressed + len(compressor.flush())) / max(num_bytes, 1)


def plot_lengths(lengths: dict[str, Int64Array], max_length: int) -> Any:
    """Draw how long documents are, and where their tokens stand.

    Left: documents by length. Right: the share of all tokens that stand in documents up to a length, and, dashed, the
    share that survives if every document is cut at that length.

    Args:
        lengths: For each source by name, (num_documents,) tokens in each document.
        max_length: Tokens in a row, drawn as a line.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = max(int(each.max(initial=1)) for each in lengths.values())
    bins = np.geomspace(1, max(longest, max_length) * 1.1, 41)
    for index, (name, each) in enumerate(lengths.items()):
        color = f"C{index}"
        left.hist(each, bins=bins, alpha=0.6, color=color, label=name)
        ordered = np.sort(each)
        cumulative = np.cumsum(ordered)
        cuts = np.unique(np.append(bins, max_length).astype(np.int64))
        shorter = np.searchsorted(ordered, cuts, side="right")
        inside = np.append(0, cumulative)[shorter]
        right.plot(cuts, inside / cumulative[-1], color=color, label=f"{name}: in documents up to this length")
        survive = inside + (len(ordered) - shorter) * cuts
        right.plot(cuts, survive / cumulative[-1], "--", color=color, label=f"{name}: kept if cut at this length")
    for axes in (left, right):
        axes.axvline(max_length, color="0.3", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("tokens in a document")
    left.annotate(f" max_length {max_length:,}", (max_length, left.get_ylim()[1] * 0.97), va="top", fontsize=8)
    left.set_ylabel("documents")
    right.set_ylabel("share of all tokens")
    right.set_ylim(0, 1.02)
    right.legend(fontsize=8, loc="upper left")
    if len(lengths) > 1:
        left.legend(fontsize=8)
    return figure
