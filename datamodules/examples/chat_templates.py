"""Chat templates: a tokenizer's own, those of well-known formats by name, a file's, or a Jinja text."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def _turns(header: str, end: str, between: str = "''", *, first: str = "''", content: str = "message.content") -> str:
    """Jinja of turns that have all the same form, with what an assistant generates marked; each a Jinja expression."""
    return (
        f"{{{{ {first} }}}}"
        "{% for message in messages %}{% set role = message.role %}"
        f"{{{{ {header} }}}}"
        "{% if role == 'assistant' %}"
        f"{{% generation %}}{{{{ {content} + {end} }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {content} + {end} }}}}{{% endif %}}"
        f"{{{{ {between} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{% set role = 'assistant' %}}{{{{ {header} }}}}{{% endif %}}"
    )


def _instructions(begin: str, system: str, *, always_begins: bool) -> str:
    """Jinja of ``[INST] user [/INST] assistant`` with the system's message in the first instruction."""
    again = begin if always_begins else "''"
    return (
        "{% set opening = messages[0].content if messages[0].role == 'system' else none %}"
        "{% for message in messages if message.role != 'system' %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns, and the user begins') }}{% endif %}"
        "{% if message.role == 'user' %}"
        f"{{{{ {begin} if loop.first else {again} }}}}{{{{ '[INST] ' }}}}"
        f"{{% if loop.first and opening is not none %}}{{{{ {system} }}}}{{% endif %}}"
        "{{ message.content | trim + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
    )


CHAT_TEMPLATES = {
    "chatml": _turns("'<|im_start|>' + role + '\\n'", "'<|im_end|>'", "'\\n'"),
    "gemma": _turns(
        "'<start_of_turn>' + ('model' if role == 'assistant' else role) + '\\n'",
        *("'<end_of_turn>'", "'\\n'"),
        first="bos_token",
        content="message.content | trim",
    ),
    "llama-2": _instructions("bos_token", "'<<SYS>>\\n' + opening + '\\n<</SYS>>\\n\\n'", always_begins=True),
    "llama-3": _turns(
        "'<|start_header_id|>' + role + '<|end_header_id|>\\n\\n'",
        "'<|eot_id|>'",
        first="bos_token",
        content="message.content | trim",
    ),
    "mistral": _instructions("bos_token", "opening + '\\n\\n'", always_begins=False),
    "phi-3": _turns("'<|' + role + '|>\\n'", "'<|end|>'", "'\\n'"),
    "zephyr": _turns("'<|' + role + '|>\\n'", "eos_token", "'\\n'"),
}


def read_chat_template(template: str) -> str:
    """The Jinja text of a template that is named, stands in a file, or is given.

    Raises:
        ValueError: If it is none of these.
        FileNotFoundError: If there is no such file.
    """
    if template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[template]
    if "{%" in template or "{{" in template:
        return template
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix:
        raise FileNotFoundError(f"There is no chat template at {path}.")
    raise ValueError(
        f"`chat_template` must be one of {', '.join(CHAT_TEMPLATES)}, a file, or a Jinja text, but got {template!r}."
    )


def with_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer with another chat template, which it is saved with; itself without one.

    Args:
        tokenizer: It is not changed.
        template: See :func:`read_chat_template`; None keeps the tokenizer's own.
    """
    if template is None:
        return tokenizer
    changed: PreTrainedTokenizerBase = copy.copy(tokenizer)
    changed.chat_template = read_chat_template(template)
    return changed
