"""Do packed documents see each other? Packed is compared with separate, for the model at hand.

Whether restarting ``position_ids`` keep documents apart depends on the model, on its attention and on how it is called.
Many models ignore them in silence, and transformers ignores them with a cache or a two-dimensional attention mask. So
isolation is measured, not assumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_llm.document_masks import document_ids, is_encoder, packed_encoder_inputs
from lightning_llm.pretrained import max_positions
from lightning_llm.tasks.causal_lm import CausalLM

Run = Callable[[nn.Module, Mapping[str, Any]], Tensor]

_SPECIAL_TOKENS = ("pad_token_id", "image_token_id")  # models may treat these in ways of their own


class PackingLeakError(ValueError):
    """The model lets packed documents see each other."""


class PackingError(NamedTuple):
    """How far packed documents are from separate ones, each relative to the largest separate output.

    Attributes:
        difference: Largest |packed - separate|; rounding differs, as the shapes do.
        crosstalk: Largest change of a document's outputs when only the other documents in its row change. The shapes
            are the same, so it is 0 in any precision if documents are apart.
        sensitivity: Largest change of a document's other outputs when its own first token changes. If it is 0, the
            model does not look at context yet and nothing was tested.
        resolution: ``difference`` that rounding may explain in the precision that the model ran in.

    Example:
        >>> PackingError(difference=2e-3, crosstalk=0.0, sensitivity=0.3, resolution=0.1).is_leak()  # bfloat16 rounds
        False
        >>> PackingError(difference=8e-3, crosstalk=5e-3, sensitivity=5e-3, resolution=0.1).is_leak()
        True
    """

    difference: float
    crosstalk: float
    sensitivity: float
    resolution: float

    def is_leak(self, tolerance: float | None = None) -> bool:
        """Whether the difference is above the tolerance, or there is more crosstalk than rounding explains.

        What leaks from other documents is about as large as what a document's own tokens do; rounding (kernels that
        depend on the data, in mixtures of experts) is smaller, unless the model hardly looks at context yet.
        """
        allowed = self.resolution if tolerance is None else tolerance
        crosstalk = min(allowed / 20, max(allowed / 100, self.sensitivity / 4))
        return self.difference > allowed or self.crosstalk > crosstalk


def verify_packing(
    model: nn.Module,
    run: Run | None = None,
    *,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
) -> float:
    """Refuse a model that lets packed documents see each other.

    Documents of unequal lengths run packed in two rows with different boundaries, and each by itself; both must agree.
    It also catches positions that are not handled as in a document by itself. About 300 tokens, no gradients. The
    model's modes and the state of random generators stay as they are. Of a sharded model all ranks must call it.

    Args:
        model: A transformers model, or any whose ``config`` has a ``vocab_size``.
        run: Called as ``run(model, batch)``, returns outputs (batch, seq, features), for instance logits. A packed
            batch has ``input_ids`` and ``position_ids``, (batch, seq); one of separate documents has ``input_ids``
            alone. If None, encoders run with ``packed_attention_mask``, all others as ``LLMModule`` runs them.
        device: Where the model is; if None, where its first parameter is.
        tolerance: Largest difference to allow, relative to the largest output; if None, by precision: 1e-5 in float64,
            1e-3 in float32, 1e-2 with TF32, 0.1 in half precision. For a change of other documents, which changes
            nothing if documents are apart, the limit is between a hundredth and a twentieth of that.

    Returns:
        The largest |packed - separate|, relative to the largest separate output.

    Raises:
        PackingLeakError: If packed and separate documents differ by more. It is a ValueError.
        ValueError: If the outputs are not finite.

    Warns:
        UserWarning: If a document's outputs hardly depend on its earlier tokens, so that nothing can be told.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> config = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> verify_packing(model) < 1e-5
        True
        >>> verify_packing(model, lambda model, batch: model(**batch).logits)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lightning_llm.isolation.PackingLeakError: GPT2LMHeadModel lets packed documents see each other: ...
    """
    error = packing_error(model, run, device=device)
    allowed = error.resolution if tolerance is None else tolerance
    name = type(model).__name__
    if error.is_leak(tolerance):
        raise PackingLeakError(
            f"{name} lets packed documents see each other: packed, their outputs differ by {error.difference:.1e} of "
            f"the largest output from those of the documents by themselves (rounding explains {allowed:.0e} at most), "
            f"and by {error.crosstalk:.1e} when only the other documents in the row change (0 if they are apart). Use "
            f"TextDataModule(windowing='windows') or 'documents', one document a row, or "
            f"LLMModule(leaking_packs='unpack'), which takes packed rows apart. If the model is called with a cache or "
            f"a two-dimensional attention mask, leave these out."
        )
    if error.sensitivity <= allowed / 100:
        warnings.warn(
            f"Whether {name} keeps packed documents apart cannot be told: its outputs hardly depend on earlier tokens "
            f"({error.sensitivity:.1e} of the largest output). Call verify_packing(model) again when it has learned.",
            stacklevel=2,
        )
    return error.difference


def check_mask(batch: Mapping[str, Any]) -> None:
    """Refuse packed rows with a two-dimensional attention mask, with which transformers overlooks the restarts.

    Args:
        batch: With ``position_ids`` and ``attention_mask``, (rows, seq).

    Raises:
        PackingLeakError: If positions restart between two tokens that the mask lets in.
    """
    mask, ids = batch["attention_mask"], document_ids(batch["position_ids"])
    if mask.ndim != 2:
        return
    inside = mask.bool()[:, 1:] & mask.bool()[:, :-1]
    if bool(((ids.diff(dim=1) > 0) & inside).any()):
        raise PackingLeakError(
            "A batch has `position_ids` that restart within a row, and an `attention_mask` of shape (rows, seq): with "
            "that mask, transformers lets packed documents see each other. Leave `attention_mask` out of packed "
            "batches; padding at a row's end can be a document of its own."
        )


def packing_error(
    model: nn.Module, run: Run | None = None, *, device: torch.device | str | None = None
) -> PackingError:
    """Measure how far packed documents are from separate ones; the arguments are those of :func:`verify_packing`.

    Raises:
        ValueError: If the outputs are not finite.
    """
    run = run or (_run_encoder if is_encoder(getattr(model, "config", None)) else CausalLM().outputs)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    rows, others = (_documents(model, seed) for seed in (0, 1))
    changed = [[other[0], row[1], other[2]] for row, other in zip(rows, others, strict=True)]  # all but the middle
    own = [torch.cat([other[1][:1], row[1][1:]]) for row, other in zip(rows, others, strict=True)]  # its first token
    with _undisturbed(model, device), torch.no_grad():
        packed = run(model, _pack(rows + changed, device))
        separate = _run_each(run, model, [*rows[0], *rows[1], *own], device)
    expected = torch.stack([torch.cat(separate[:3]), torch.cat(separate[3:6])])
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else expected.new_tensor(torch.nan)
    if packed.isnan().any() or scale.isnan():
        raise ValueError(
            f"Whether {type(model).__name__} keeps packed documents apart cannot be told: its outputs are not finite "
            f"numbers. Look at its weights."
        )
    packed = packed.to(expected.dtype)
    middle = [slice(len(row[0]), len(row[0]) + len(row[1])) for row in rows]
    return PackingError(
        difference=_largest_change(packed[:2], expected, scale),
        crosstalk=max(_largest_change(packed[i + 2, m], packed[i, m], scale) for i, m in enumerate(middle)),
        sensitivity=max(_largest_change(separate[i + 6][1:], separate[3 * i + 1][1:], scale) for i in (0, 1)),
        resolution=_resolution(model, device, packed.dtype),
    )


def _run_encoder(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    outputs = model(**packed_encoder_inputs(model, batch))
    tensor: Tensor = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return tensor


def _documents(model: nn.Module, seed: int) -> list[list[Tensor]]:
    """Random documents of two rows: three lengths in one order and in the other."""
    config: Any = model.config
    limit = max_positions(config) or 48
    unit = min(3, (limit - (getattr(config, "pad_token_id", None) or 0) - 1) // 16)  # RoBERTa begins after padding
    lengths = [5 * unit, 8 * unit, 3 * unit] if unit > 0 else [2, 3, 1]
    special = {getattr(config, name, None) for name in _SPECIAL_TOKENS}
    vocabulary = range(min(config.get_text_config().vocab_size, 4096))
    plain = [token for token in vocabulary if token not in special]
    tokens = torch.tensor(plain if len(plain) > 1 else vocabulary)
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return tokens[torch.randint(len(tokens), (length,), generator=generator)]

    return [[draw(length) for length in lengths], [draw(length) for length in reversed(lengths)]]


def _pack(rows: list[list[Tensor]], device: torch.device) -> dict[str, Tensor]:
    positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
    input_ids = torch.stack([torch.cat(row) for row in rows])
    return {"input_ids": input_ids.to(device), "position_ids": torch.stack(positions).to(device)}


def _run_each(run: Run, model: nn.Module, documents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Outputs (length, features) of each document by itself; those of one length share a batch, without padding."""
    outputs: dict[int, Tensor] = {}
    for length in sorted({len(document) for document in documents}):
        indices = [index for index, document in enumerate(documents) if len(document) == length]
        out = run(model, {"input_ids": torch.stack([documents[index] for index in indices]).to(device)})
        outputs |= dict(zip(indices, out if out.dtype == torch.float64 else out.float(), strict=True))
    return [outputs[index] for index in range(len(documents))]


def _largest_change(values: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Infinite values, by which a model forbids a token, count where only one of the two has them."""
    change = (values - expected).abs().masked_fill(values == expected, 0.0)
    return float(change.max() / scale.clamp(min=1e-30))


def _resolution(model: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    parameters = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if torch.is_autocast_enabled(device.type) or any(kind.itemsize < 4 for kind in [dtype, *parameters]):
        return 0.1
    if dtype == torch.float64:
        return 1e-5  # not 1e-12: transformers computes norms and rotary embeddings in float32
    return {"highest": 1e-3, "high": 1e-2, "medium": 0.1}[torch.get_float32_matmul_precision()]


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode that it was in, and no random number is used."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
