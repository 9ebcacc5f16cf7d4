"""Plans for an ``LLMModule``: by hand, or at the start of a run with ``sequence_window="auto"``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from lightning_llm.planning.memory_size import free_memory, parse_size
from lightning_llm.planning.plan import Plan, make_plan
from lightning_llm.planning.simulation import Step
from lightning_llm.pretrained import ModelSource, build_model, resolve_dtype

if TYPE_CHECKING:
    import lightning as L

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "64-true": (torch.float64, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
"""Of Lightning: the type of the parameters, and that of autocast."""


def plan_source(
    source: ModelSource,
    config: PretrainedConfig,
    auto_class: str,
    max_length: int,
    memory: str | float | None = None,
    *,
    precision: str = "32-true",
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    micro_batch_size: int = 1,
    shards: int = 1,
    optimizer: bool = True,
    offload: bool = True,
    with_logits: bool = True,
) -> Plan:
    """Plan for a model that is not built: its architecture is made on the meta device.

    Args:
        source: As ``LLMModule`` takes it.
        config: Its configuration.
        auto_class: Name of the transformers auto class.
        max_length: Tokens in a row.
        memory: Of the device, such as ``"16GB"``; if None, what is free on this machine's.
        precision: The Trainer's.
        dtype: Type of the parameters; what ``precision`` asks for if None.
        attn_implementation: As ``LLMModule`` takes it.
        trust_remote_code: As ``LLMModule`` takes it.
        micro_batch_size: Rows in a micro-batch.
        shards: Ranks among which FSDP2 divides the parameters.
        optimizer: Whether AdamW's state counts.
        offload: Whether keys and values may be kept in host memory.
        with_logits: Whether the loss from logits is shown, for comparison.

    Raises:
        ValueError: For arguments that are not understood, and for models that cannot be planned.
    """
    if auto_class != "AutoModelForCausalLM":
        raise ValueError(
            f"Plans choose between ways to train decoders (causal-lm), but this is an {auto_class}. Its rows are run "
            f"as a whole: gradient_checkpointing=True makes them cheaper, and DynamicBatchScaler finds how many fit."
        )
    for name, value in (("max_length", max_length), ("micro_batch_size", micro_batch_size), ("shards", shards)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number, at least 1, but got {value!r}.")
    size = free_memory(default_device()) if memory is None else parse_size(memory)
    of_parameters, autocast = parse_precision(precision)
    resolved = of_parameters if dtype is None else resolve_dtype(dtype)

    model = (
        source
        if isinstance(source, nn.Module)
        else _architecture(source, config, auto_class, resolved, attn_implementation, trust_remote_code)
    )
    step = Step(rows=micro_batch_size, autocast=autocast, optimizer=optimizer, shards=shards)
    return make_plan(model, max_length, size, step, offload=offload, with_logits=with_logits)


def _architecture(
    source: ModelSource,
    config: PretrainedConfig,
    auto_class: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> nn.Module:
    with torch.device("meta"):
        return build_model(
            source,
            config,
            auto_class,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            load_weights=False,
        )


def parse_precision(precision: Any) -> tuple[torch.dtype, torch.dtype | None]:
    """The type of the parameters, and that of autocast, of a Trainer's ``precision``.

    Raises:
        ValueError: For a precision that is not known here.

    Example:
        >>> parse_precision("bf16-mixed")
        (torch.float32, torch.bfloat16)
    """
    short = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}
    name = short.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(f"A plan knows precision {', '.join(PRECISIONS)}, but got {precision!r}.")
    return PRECISIONS[name]


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def plan_of_trainer(module: Any, trainer: L.Trainer) -> Plan:
    """Plan for the run that begins: the data module's rows in the memory of this rank's device.

    The smallest memory of all ranks counts, so that all choose the same.

    Raises:
        ValueError: If there is no data module with a ``max_length``, or nothing fits.
    """
    datamodule = getattr(trainer, "datamodule", None)
    length = getattr(datamodule, "max_length", None)
    if length is None:
        raise ValueError(
            "`sequence_window='auto'` needs a data module with a `max_length`, but the Trainer has "
            f"{'none' if datamodule is None else type(datamodule).__name__ + ' without one'}. Pass a number of tokens "
            "as `sequence_window`; LLMModule.plan(max_length, memory) says which."
        )
    device = trainer.strategy.root_device
    memory = trainer.strategy.reduce(torch.tensor(float(free_memory(device)), device=device), reduce_op="min")
    size = float(memory) / (1 if device.type != "cpu" else _ranks_on_host(trainer))
    plan: Plan = module.plan(
        length,
        size,
        precision=str(trainer.precision),
        micro_batch_size=_rows(datamodule),
        shards=trainer.world_size if module.device_mesh is not None else 1,
        offload=device.type == "cuda",
        with_logits=False,
    )
    if plan.chosen is None:
        raise ValueError(f"`sequence_window='auto'`: {plan.reason} Shorten rows, or lower `micro_batch_size`.")
    return plan


def _ranks_on_host(trainer: L.Trainer) -> int:
    return max(1, trainer.world_size // max(1, trainer.num_nodes))


def _rows(datamodule: Any) -> int:
    """Rows in a micro-batch, as a data module's hyper-parameters say; of a budget of tokens, as many as fill it."""
    settings = {**getattr(datamodule, "hparams", {}), **vars(datamodule)}
    tokens, rows = settings.get("micro_batch_tokens"), settings.get("micro_batch_size")
    if isinstance(tokens, int):
        return max(1, -(-tokens // int(datamodule.max_length)))
    return rows if isinstance(rows, int) and rows > 0 else 1
