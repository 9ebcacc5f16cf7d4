"""Two answers to a prompt in as many tokens as a row may have; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_llm.datamodules.examples.chat_tokens import EncodedChat
from lightning_llm.datamodules.examples.messages import Message
from lightning_llm.loss import IGNORE_INDEX


def fit_pair(
    chosen: EncodedChat, rejected: EncodedChat, max_length: int, bos_token_id: int | None = None
) -> tuple[EncodedChat, EncodedChat, int]:
    """Cut a pair to ``max_length`` tokens: prompts at their beginning, both by as much, so that answers stay whole.

    A token that begins every text stays, and so does the last one of the prompt, for it predicts the answer. Only
    what is too long even so loses its end.

    Args:
        chosen: Prompt and answer; the answer begins with the first target.
        rejected: Likewise.
        max_length: Tokens of each, 3 at least.
        bos_token_id: Of the token that begins every text, if there is one.

    Returns:
        Both, and how many tokens are cut.

    Example:
        >>> chosen = EncodedChat(np.arange(1, 7), np.array([-100, -100, -100, -100, 5, 6]))
        >>> rejected = EncodedChat(np.array([1, 2, 3, 4, 9]), np.array([-100, -100, -100, -100, 9]))
        >>> chosen, rejected, num_cut = fit_pair(chosen, rejected, max_length=4)
        >>> chosen.input_ids.tolist(), rejected.input_ids.tolist(), num_cut
        ([3, 4, 5, 6], [3, 4, 9], 4)
    """
    sides = (chosen, rejected)
    excess = max(len(side.input_ids) for side in sides) - max_length
    if excess <= 0:
        return chosen, rejected, 0
    kept = int(all(side.input_ids[0] == bos_token_id for side in sides))
    prompt = min(int(np.argmax(side.labels != IGNORE_INDEX)) for side in sides)
    cut = max(min(excess, prompt - 1 - kept), 0)
    index = [np.r_[0:kept, kept + cut : len(side.input_ids)][:max_length] for side in sides]
    short = [EncodedChat(side.input_ids[i], side.labels[i]) for side, i in zip(sides, index, strict=True)]
    return short[0], short[1], sum(len(side.input_ids) - len(i) for side, i in zip(sides, index, strict=True))


def common_messages(one: Sequence[Message], other: Sequence[Message]) -> int:
    """With how many messages two conversations begin in common.

    Example:
        >>> question = {"role": "user", "content": "Why?"}
        >>> common_messages([question, {"role": "assistant", "content": "So."}], [question, {"role": "assistant"}])
        1
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
