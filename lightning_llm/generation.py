"""Continue a text with a model folder."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from lightning_llm.pretrained import build_model, resolve_config, resolve_dtype


def continue_text(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> str:
    """Load a causal language model with its tokenizer, continue a prompt, return prompt and continuation.

    Args:
        model: Local folder or hub id.
        prompt: Text to continue; an empty one starts from the beginning-of-text token.
        max_new_tokens: Tokens to add at most.
        temperature: Of the sampling; 0 takes the most likely token each time.
        top_p: Sample from the most likely tokens that hold this much probability.
        seed: Of the sampling.
        trust_remote_code: Run model code that comes with the model.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no weights.
    """
    config = resolve_config(model, trust_remote_code=trust_remote_code)
    network = build_model(
        model,
        config,
        "AutoModelForCausalLM",
        dtype=resolve_dtype(str(config.dtype).removeprefix("torch.") if config.dtype else None),
        trust_remote_code=trust_remote_code,
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    encoded = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    generate = network.generate
    with torch.no_grad():
        tokens = generate(  # type: ignore[operator]
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
