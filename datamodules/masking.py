"""Which tokens of a row are hidden, and by what: a pure function of seed, epoch and row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class Masking:
    """How tokens are hidden, as BERT hides them.

    Attributes:
        mask_token_id: Stands for a hidden token.
        random_ids: (n,) the tokens that may stand for another: all but special ones.
        probability: Share of a row's tokens that are targets; one at least.
        mask_share: Of the targets, those that the mask token stands for.
        random_share: Of the targets, those that a random token stands for; the others stay in sight.
        seed: Of the choice.
        begins_word: (vocab,) bool, the tokens that words begin with: then words are hidden as a whole. None: tokens.

    References:
        Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, 2019, appendix A.1.
    """

    mask_token_id: int
    random_ids: Int64Array
    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    seed: int = 0
    begins_word: npt.NDArray[np.bool_] | None = None

    def num_targets(self, num_tokens: Int64Array) -> Int64Array:
        """Targets among so many tokens that may be hidden; fewer where whole words do not fit.

        Example:
            >>> Masking(9, np.arange(9), probability=0.25).num_targets(np.array([0, 1, 10])).tolist()
            [0, 1, 2]
        """
        targets: Int64Array = np.rint(num_tokens * self.probability).astype(np.int64)
        return np.minimum(np.maximum(targets, 1), num_tokens)

    def hide(
        self, tokens: Int64Array, may_hide: npt.NDArray[np.bool_], row: int, epoch: int | None
    ) -> tuple[Int64Array, Int64Array]:
        """Hide tokens of a row.

        Args:
            tokens: (n,) the row.
            may_hide: (n,) which of them may be targets.
            row: Its number.
            epoch: Each hides others; None for evaluation, where always the same are hidden.

        Returns:
            (n,) the row with tokens hidden, and (n,) labels, -100 for all but targets.
        """
        key = [self.seed, 0, 0, row] if epoch is None else [self.seed, 1, epoch, row]
        random = np.random.default_rng(key)
        chosen = self._chosen(tokens, may_hide, random.random(len(tokens)))
        action = random.random(len(tokens))
        others = self.random_ids[random.integers(0, len(self.random_ids), len(tokens))]
        labels = np.where(chosen, tokens, IGNORE_INDEX)
        hidden = np.where(chosen & (action < self.mask_share), self.mask_token_id, tokens)
        is_random = chosen & (action >= self.mask_share) & (action < self.mask_share + self.random_share)
        return np.where(is_random, others, hidden), labels

    def _chosen(
        self, tokens: Int64Array, may_hide: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.bool_]:
        """The tokens, or words, of the lowest scores, as many as there are to be targets."""
        chosen = np.zeros(len(tokens), bool)
        number = int(self.num_targets(np.array(may_hide.sum(), np.int64)))
        places = np.flatnonzero(may_hide)
        if self.begins_word is None or not number:
            chosen[places[np.argsort(scores[places])[:number]]] = True
            return chosen
        is_begin = self.begins_word[tokens[places]]
        is_begin |= np.diff(places, prepend=-2) > 1  # after what may not be hidden
        words = np.split(places, np.flatnonzero(is_begin)[1:] if is_begin[0] else np.flatnonzero(is_begin))
        count = 0
        for word in sorted(words, key=lambda word: scores[word[0]]):
            if count + len(word) <= number or not count:
                chosen[word] = True
                count += len(word)
        return chosen


def word_begins(tokens: list[str]) -> npt.NDArray[np.bool_]:
    r"""Which tokens of a vocabulary begin a word, by the marks of WordPiece, byte-level BPE and SentencePiece.

    Example:
        >>> word_begins(["play", "##ing"]).tolist(), word_begins(["\u0120play", "ing", "\u010a"]).tolist()
        ([True, False], [True, False, True])
    """
    if any(token.startswith("##") for token in tokens):
        return np.array([not token.startswith("##") for token in tokens])
    return np.array([token[:1] in ("\u0120", "\u010a", "\u0109", "\u2581") for token in tokens])
