"""Tokenizers for chats, the templates of real models, and what is learnt of a conversation, as text."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from lightning_llm.datamodules.examples.chat_tokens import ChatEncoder
from lightning_llm.datamodules.tokenizer import train_bpe

SPECIAL = re.compile(
    r"<\|[a-zA-Z_]+\|>|<(?:start|end)_of_turn>|<\uff5c[^\uff5c<>]+\uff5c>|<turn\|>|<\|turn>|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|</?think>|<end_of_utterance>"
)
CHATS = {
    "one turn": [("user", "What is 2+2?"), ("assistant", "4.")],
    "several turns": [
        ("user", "Hi"),
        ("assistant", "  Hello \U0001f600 there!  "),
        ("user", "Und dann?\n"),
        ("assistant", "Gr\u00fc\u00dfe,\n\n    bis dann. \u4f60\u597d"),
        ("user", "Hello there"),
        ("assistant", "y"),
    ],
    "says nothing": [("user", "Hi"), ("assistant", ""), ("user", "again"), ("assistant", "ok")],
    "system": [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "<b>"), ("assistant", "4.")],
}


def trl_templates() -> Path:
    """The folder of real models' chat templates, and of their authors' marked variants, that TRL has."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL, whose templates these are, is not installed")
    return Path(spec.origin).parent / "chat_templates"


@functools.cache
def bpe(*, trims: bool = False) -> Any:
    """A byte-level BPE with the marks of all templates; ``trims``: offsets leave out spaces, as GPT-2's do."""
    words = "the quick brown fox, Hello there. What is Python?\n\n    code 'x' user assistant system \n" * 40
    tokenizer = train_bpe([words] * 3, 330)
    spec = importlib.util.find_spec("trl")
    texts = ["<|im_start|><|im_end|><start_of_turn><end_of_turn><|eot_id|><|end|>"]
    if spec is not None and spec.origin is not None:
        texts += [path.read_text() for path in (Path(spec.origin).parent / "chat_templates").glob("*.jinja")]
    found = sorted({mark for text in texts for mark in SPECIAL.findall(text)})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": found})
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def messages_of(chat: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in chat]


def encode(tokenizer: Any, template: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    """With a template; the tokens must be those of ``apply_chat_template``."""
    tokenizer.chat_template = template
    extra = options.pop("template_options", None)
    encoded = ChatEncoder(tokenizer, extra).encode(messages, "row 7", **options)
    own = tokenizer.apply_chat_template(messages, tools=options.get("tools"), **(extra or {}))["input_ids"]
    assert encoded.input_ids.tolist() == own
    return encoded


def learnt(tokenizer: Any, encoded: Any) -> list[str]:
    """The texts of the stretches of targets."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True):
        assert label in (token, -100)
        if label == -100:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]
