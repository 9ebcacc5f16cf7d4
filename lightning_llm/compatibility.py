"""Does the model fit the data? Questions that are asked before the first step, and answers that say what to do."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lightning_llm.pretrained import max_positions


def check_length(config: PretrainedConfig, length: int, where: str) -> None:
    """Refuse rows that are longer than the model has positions.

    Args:
        config: Of the model.
        length: Tokens in a row.
        where: What has that length, for the message.

    Raises:
        ValueError: If it does not fit.
    """
    limit = max_positions(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"The model has {limit} positions (max_position_embeddings), but {where} has {length} tokens. Lower "
            f"the data module's `max_length`, or choose a model with more positions."
        )


def check_vocabulary(config: PretrainedConfig, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for.

    Raises:
        ValueError: If it does not fit.
    """
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {vocab_size} "
            f"(vocab_size). Use the model's own tokenizer, set `vocab_size: {len(tokenizer)}` in the model's "
            f"configuration, or call `model.resize_token_embeddings({len(tokenizer)})` and pass the built model."
        )


def take_special_tokens(config: PretrainedConfig, tokenizer: Any) -> None:
    """Give the configuration of random weights the tokenizer's special tokens, as such weights know none.

    Args:
        config: Changed in place.
        tokenizer: With ``bos_token_id``, ``eos_token_id``, ``pad_token_id``, or some of them.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name, None))
