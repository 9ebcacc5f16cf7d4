"""The loss at the head of a transformers causal language model: chunked, from logits, or by kernels of others."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_llm.chunked_loss import chunked_cross_entropy, chunked_token_nll
from lightning_llm.logit_tiles import LogitMap, LossOptions
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, exact_dtype, shift_labels, token_cross_entropy, token_nll
from lightning_llm.virtual_tokens import beside_prompt, num_virtual_tokens

LossKernel = Literal["chunked", "liger", "cce", "plain"]
HeadFunction = Callable[[Tensor, Tensor, Tensor | None, LogitMap], Tensor]
_MEASURED: WeakKeyDictionary[nn.Module, LogitMap | str] = WeakKeyDictionary()  # by head; else why there is no map
_WARNED: WeakSet[nn.Module] = WeakSet()
_WORTH_A_WARNING = 2**28  # bytes of a batch's logits in float32


def causal_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    loss_kernel: LossKernel = "chunked",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Summed cross-entropy of a transformers causal language model, without its logits in memory.

    A model that :func:`call_head` cannot call, such as one with LoRA on the head, takes the plain way, by logits.

    Args:
        model: With an output head, by itself or in PEFT, DDP or FSDP2.
        inputs: Keyword arguments of its forward, with ``input_ids`` and without ``labels``.
        labels: (batch, seq) int64, unshifted, -100 where there is no target. The model may see (1, batch * seq).
        loss_kernel: ``chunked``; ``plain``, from logits; on a GPU also ``liger`` (of liger-kernel) and ``cce`` (of
            cut-cross-entropy; half types, and by default it leaves out gradients that round to nothing).
        label_smoothing: As in :func:`chunked_cross_entropy`.
        z_loss: As in :func:`chunked_cross_entropy`.

    Raises:
        ValueError: For an unknown kernel, one that needs a GPU or lacks an option.
        ImportError: For a kernel that is not installed.

    Warns:
        UserWarning: As :func:`call_head`.
    """
    if loss_kernel not in ("chunked", "liger", "cce", "plain"):
        raise ValueError(f"`loss_kernel` must be 'chunked', 'liger', 'cce' or 'plain', but got {loss_kernel!r}.")
    labels = beside_prompt(model, labels)

    def of_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: LogitMap) -> Tensor:
        hidden = hidden.reshape(*labels.shape, -1)
        if loss_kernel != "chunked":
            kernel = _liger if loss_kernel == "liger" else _cce
            return kernel(hidden, weight, bias, labels, LossOptions(label_smoothing, z_loss, logits, None))
        return chunked_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=logits.softcap,
            logit_scale=logits.scale,
        ).total

    total = None if loss_kernel == "plain" else call_head(model, inputs, of_head)
    if total is None:
        logits = model(**inputs).logits
        logits = logits.reshape(*labels.shape, logits.shape[-1])
        if label_smoothing == z_loss == 0.0:
            return token_cross_entropy(logits, labels)
        total = _plain_losses(logits, shift_labels(labels), label_smoothing, z_loss).sum()
    return TokenLoss(total, (shift_labels(labels) != IGNORE_INDEX).sum())


def causal_lm_token_nll(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Loss of each label token of a causal language model, (batch, seq); the arguments are :func:`causal_lm_loss`'s.

    After a prompt that trains, its positions come first: (batch, virtual tokens + seq).
    """
    labels = beside_prompt(model, labels)

    def of_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: LogitMap) -> Tensor:
        hidden = hidden.reshape(*labels.shape, -1)
        return chunked_token_nll(hidden, weight, labels, bias=bias, softcap=logits.softcap, logit_scale=logits.scale)

    losses = call_head(model, inputs, of_head)
    if losses is None:
        logits = model(**inputs).logits
        losses = token_nll(logits.reshape(*labels.shape, logits.shape[-1]), labels)
    return losses


def call_head(model: nn.Module, inputs: Mapping[str, Any], of_head: HeadFunction) -> Tensor | None:
    """Call a causal language model with ``of_head(hidden, weight, bias, logit_map)`` in place of its output head.

    The model is called as usual, so that the hooks of DDP and FSDP2 run, and ``of_head`` within it, where sharded
    weights are whole. What it returns takes the place of ``logits`` in the model's output.

    How the model makes logits of its head's output is measured once, with eight tokens of the first batch: the head is
    made to return known numbers, and the logits must be ``softcap * tanh(scale * number / softcap)``.

    Args:
        model: As in :func:`causal_lm_loss`.
        inputs: As in :func:`causal_lm_loss`.
        of_head: Gets hidden (batch, seq, dim), weight (vocab, dim), bias (vocab,) or None, and the measured map.

    Returns:
        What ``of_head`` returned; None, and the model was not called, if the model cannot be called so.

    Warns:
        UserWarning: Once for a model that cannot be called so, with the reason, if its logits take 256 MiB or more.
    """
    if torch.compiler.is_compiling():  # the compiler sees what logits are for; it would stumble over what follows
        return None
    base = unwrapped(model)
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    logit_map: LogitMap | str | None = _reason_against(model, base, head)
    if logit_map is None:
        if head not in _MEASURED:
            _MEASURED[head] = _measure(model, head, inputs)
        logit_map = _MEASURED[head]
    if isinstance(logit_map, str):
        num_bytes = _logit_bytes(base, inputs)
        if model not in _WARNED and num_bytes >= _WORTH_A_WARNING:
            _WARNED.add(model)
            warnings.warn(
                f"The loss of {type(base).__name__} is made from its logits, which take {num_bytes / 2**30:.1f} GiB in "
                f"float32: {logit_map}. loss_kernel='plain' does so without this warning.",
                stacklevel=3,
            )
        return None
    known = logit_map
    made: list[Tensor] = []

    def replaced(hidden: Tensor) -> Tensor:
        made.append(of_head(hidden, head.weight, head.bias, known))
        return made[-1]

    def put(module: nn.Module, args: Any, output: Any) -> None:
        output.logits = made[-1]

    # Before the hooks of FSDP2, which look in the output for what needs a gradient.
    handle = base.register_forward_hook(put, prepend=True)
    try:
        with head_as(head, replaced):
            result: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return result


def unwrapped(model: nn.Module) -> Any:
    """The transformers model in DDP and PEFT, or by itself."""
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def known_logit_map(head: nn.Module) -> LogitMap | None:
    """What a model does to the output of its head, if that has been measured and is such a map."""
    found = _MEASURED.get(head)
    return found if isinstance(found, LogitMap) else None


def assume_logit_map(head: nn.Module, logit_map: LogitMap) -> None:
    """Say what a model does to the output of its head, so that it is not measured.

    Args:
        head: The model's output head.
        logit_map: From the head's output to logits.
    """
    _MEASURED[head] = logit_map


@contextmanager
def head_as(head: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a layer computes something else."""
    head.forward = forward  # its hooks still run: FSDP2 may have sharded it by itself
    try:
        yield
    finally:
        del head.forward


def _reason_against(model: nn.Module, base: Any, head: Any) -> str | None:
    if head is None:
        return "it has no output head"
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"its head is {type(head).__name__}, not a plain linear layer"
    if {name for name, _ in head.named_parameters()} - {"weight", "bias"}:
        return "its head computes its weight"
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in (model, base)):
        return "it is compiled"
    return None


def _logit_bytes(base: Any, inputs: Mapping[str, Any]) -> int:
    """Of a batch's logits in float32; 0 where the model does not tell its vocabulary."""
    input_ids = inputs.get("input_ids")
    config: Any = getattr(base, "config", None)
    if not isinstance(input_ids, Tensor) or not hasattr(config, "get_text_config"):
        return 0
    return 4 * input_ids.numel() * int(getattr(config.get_text_config(), "vocab_size", None) or 0)


@torch.no_grad()
def _measure(model: nn.Module, head: Any, inputs: Mapping[str, Any]) -> LogitMap | str:
    """Let the head return known numbers, look at what the model makes of them; or say why that is no logit map."""
    if not isinstance(inputs.get("input_ids"), Tensor):
        return "its batches have no `input_ids` with which its head could be tried"
    input_ids = inputs["input_ids"][:1, :8]
    shape = torch.Size((len(input_ids), num_virtual_tokens(model) + input_ids.shape[1]))
    numbers = _numbers((*shape, head.out_features), input_ids.device)
    called: list[torch.Size] = []

    def known(hidden: Tensor) -> Tensor:
        called.append(hidden.shape[:-1])
        return numbers

    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"), head_as(head, known):
        logits = getattr(model(input_ids=input_ids, use_cache=False), "logits", None)
    if called != [shape] or not isinstance(logits, Tensor) or logits.shape != numbers.shape:
        return "its logits are not what its head returns, a row for each token"
    if logits.dtype.itemsize < 4:
        return f"it rounds what its head returns to {logits.dtype}"
    scale, bounded = (logits / numbers)[0, 0, :2].tolist()  # of a tiny and of a huge number
    softcap = None if abs(bounded - scale) <= 1e-6 * abs(scale) else float(logits[0, 0, 1].abs())
    expected = numbers * scale if softcap is None else softcap * torch.tanh(numbers * scale / softcap)
    scale = 1.0 if abs(scale - 1.0) < 1e-12 else scale
    tolerance = 1e-12 if logits.dtype == torch.float64 else 1e-5
    if scale == 0.0 or not torch.allclose(logits.to(numbers.dtype), expected, rtol=tolerance, atol=0.0):
        return "its logits are not softcap(scale * (hidden @ weight.T + bias))"
    return LogitMap(softcap, scale)


def _numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """From 1e-3 to 1e3, of both signs; the first two are powers of two, so that quotients are exact."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    numbers = sign * 10.0 ** (6.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3.0)
    numbers[0, 0, 0], numbers[0, 0, 1] = 2.0**-30, 2.0**40
    return numbers.to(device, exact_dtype(device))


# ---- kernels of others -----------------------------------------------------------------------------------------------


def _plain_losses(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    has_target = targets.flatten() != IGNORE_INDEX
    return losses + z_loss * logits.flatten(0, -2).logsumexp(-1).square().masked_fill(~has_target, 0.0)


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions) -> Tensor:
    transformers = _import_kernel("liger", "liger_kernel.transformers", "liger-kernel", hidden)
    loss = transformers.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX,
        lse_square_scale=options.z_loss,
        label_smoothing=options.label_smoothing,
        reduction="sum",
        softcap=options.logits.softcap,
        accum_dtype=torch.float32,
    )
    hidden, bias = _scaled(hidden, bias, options.logits.scale)
    total: Tensor = loss(weight, hidden.flatten(0, -2), shift_labels(labels).flatten(), bias)
    return total


def _cce(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions) -> Tensor:
    if options.label_smoothing or options.z_loss:
        raise ValueError("loss_kernel='cce' has neither `label_smoothing` nor `z_loss`. Use 'chunked' or 'liger'.")
    cce = _import_kernel("cce", "cut_cross_entropy", "cut-cross-entropy", hidden)
    hidden, bias = _scaled(hidden, bias, options.logits.scale)
    total: Tensor = cce.linear_cross_entropy(
        hidden,
        weight.to(hidden.dtype),
        shift_labels(labels),
        bias=bias,
        ignore_index=IGNORE_INDEX,
        softcap=options.logits.softcap,
        reduction="sum",
    )
    return total


def _scaled(hidden: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """These kernels have no factor of the logits: scale (h W^T + b) = (scale h) W^T + scale b."""
    return (hidden, bias) if scale == 1.0 else (hidden * scale, None if bias is None else bias * scale)


def _import_kernel(kernel: str, module: str, package: str, hidden: Tensor) -> Any:
    if hidden.device.type != "cuda":
        raise ValueError(f"loss_kernel={kernel!r} needs a GPU, but the model is on {hidden.device}. Use 'chunked'.")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"loss_kernel={kernel!r} needs `pip install {package}`; 'chunked' needs nothing.") from error
