"""Adapters of the package peft: from their fields to a model of which little more than they trains."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_llm.pretrained import is_fresh
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.context_parallel_causal_lm import ContextParallelCausalLM
from lightning_llm.tasks.reference import CHANGES_BASE

AdapterFields = dict[str, Any]  # of a PeftConfig, with `peft_type`

_TASK_TYPES = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
_NOT_SERVED = {
    "CPT": "its loss weighs tokens in a way of its own",
    "SHADOW": "its loss is that of two models",
    "MULTITASK_PROMPT_TUNING": "it needs the number of a task with each row",
    "POLY": "it needs the number of a task with each row",
    "XLORA": "it mixes adapters that are trained before",
    "LILY": "its router takes a mean over the whole batch, so that the gradient depends on how that is cut",
}
_OTHER_NAMES = {
    "DORA": "DoRA is {'peft_type': 'LORA', 'use_dora': True}.",
    "RSLORA": "rsLoRA is {'peft_type': 'LORA', 'use_rslora': True}.",
    "QLORA": "QLoRA is {'peft_type': 'LORA'} on LLMModule(quantization=...).",
}
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")  # keys and values before a row, where other prompts are embeddings
_STEPS_UNKNOWN = 2**31  # AdaLoraAllocation knows better, once there is a Trainer


def adapter_fields(adapter: Any) -> AdapterFields | None:
    """The fields that make an adapter, as hyper-parameters hold them: plain values, those of a person and no others.

    Args:
        adapter: A mapping with ``peft_type`` and fields of that type's configuration, a ``PeftConfig``, or None.

    Raises:
        TypeError: If it is neither.
        ValueError: Without ``peft_type``.

    Example:
        >>> adapter_fields({"peft_type": "lora", "r": 4, "target_modules": {"v_proj", "q_proj"}})
        {'peft_type': 'LORA', 'r': 4, 'target_modules': ['q_proj', 'v_proj']}
    """
    if adapter is None:
        return None
    if dataclasses.is_dataclass(adapter) and hasattr(adapter, "peft_type"):
        given = {
            field.name: getattr(adapter, field.name)
            for field in dataclasses.fields(adapter)
            if field.name == "peft_type" or getattr(adapter, field.name) != _default(field)
            if field.name not in ("peft_version", "auto_mapping")
        }
    elif isinstance(adapter, Mapping):
        given = dict(adapter)
    else:
        raise TypeError(
            f"`peft` must be a mapping with `peft_type` and fields of its configuration, or a PeftConfig, but got "
            f"{type(adapter).__name__}. A built PeftModel is passed as `model`."
        )
    if not given.get("peft_type"):
        raise ValueError(f"`peft` needs a `peft_type`, such as 'LORA' or 'PREFIX_TUNING', but got {sorted(given)}.")
    fields: AdapterFields = _plain(given)
    return fields | {"peft_type": str(fields["peft_type"]).upper()}


def adapter_config(fields: AdapterFields, auto_class: str) -> Any:
    """The ``PeftConfig`` of some fields, for the models that an auto class builds.

    Args:
        fields: As :func:`adapter_fields` gives them.
        auto_class: Of transformers, such as ``AutoModelForCausalLM``.

    Raises:
        ImportError: Without the package peft.
        ValueError: For a type or a field that peft does not know, or that belongs to another task.
    """
    peft = _import_peft()
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    kind = fields["peft_type"]
    if kind not in list(known):
        close = difflib.get_close_matches(kind, [str(name.value) for name in known], n=1)
        hint = _OTHER_NAMES.get(kind) or (f"Did you mean {close[0]!r}?" if close else "")
        raise ValueError(f"peft {peft.__version__} has no `peft_type` {kind!r}. {hint}".strip())
    if kind in _NOT_SERVED:
        raise ValueError(f"LLMModule does not train adapters of the type {kind}: {_NOT_SERVED[kind]}.")
    task_type = _TASK_TYPES.get(auto_class)
    if fields.get("task_type") not in (None, task_type):
        raise ValueError(
            f"`peft` has task_type={fields['task_type']!r}, but the model is an {auto_class}, which is {task_type!r}. "
            f"Leave `task_type` out: it follows from the task."
        )
    fields = {**fields, "task_type": task_type}
    if kind == "ADALORA":
        fields.setdefault("total_step", _STEPS_UNKNOWN)
    names = [field.name for field in dataclasses.fields(known[kind])]
    for name in fields:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"peft's {known[kind].__name__} has no field `{name}`.{hint}")
    return peft.get_peft_config(fields)


def check_adapter(
    fields: AdapterFields,
    source: Any,
    task: Task,
    *,
    gradient_checkpointing: bool,
    sequence_window: Any,
    checkpoint: str | None = None,
) -> None:
    """Refuse what does not go together, before anything is built.

    Args:
        fields: As :func:`adapter_fields` gives them.
        source: What the model is made from.
        task: That trains.
        gradient_checkpointing: Whether activations are recomputed.
        sequence_window: Tokens in a window, ``auto``, or None.
        checkpoint: What a checkpoint holds: ``whole``, ``trainable``, or None for what suits.

    Raises:
        ValueError: With the reason, and what to do instead.
    """
    if isinstance(source, nn.Module):
        raise ValueError("`peft` is for a model that LLMModule builds. A built one: pass peft's `get_peft_model(...)`.")
    kind = fields["peft_type"]
    start = fields.get("init_lora_weights")
    if checkpoint == "trainable" and str(start).lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"checkpoint='trainable' leaves out the base's weights, which init_lora_weights={start!r} changes, by "
            f"random numbers or to the rounding of a machine: they could not be had again. Use checkpoint='whole', or "
            f"another start."
        )
    if not adapter_config(fields, task.auto_class).is_prompt_learning:
        return
    plain = ("causal-lm", "seq2seq", "sequence-classification")
    served = (*plain, "token-classification", "question-answering") if kind in _PREFIXES else plain
    if task.name not in served:
        instead = "LoRA" if kind in _PREFIXES else "LoRA, or PREFIX_TUNING for heads of texts"
        raise ValueError(f"{kind} serves the tasks {', '.join(served)}, not {task.name!r}. Use {instead}.")
    if sequence_window is not None or isinstance(task, ContextParallelCausalLM):
        raise ValueError(
            f"{kind} puts tokens before each row, which then cannot be cut along the sequence: leave out "
            f"`sequence_window` and `context_parallel`, or use LoRA."
        )
    if gradient_checkpointing and kind in _PREFIXES:
        raise ValueError(
            f"{kind} lives in the cache of keys and values, which transformers drops under gradient checkpointing. "
            f"Leave `gradient_checkpointing` out (`offload=True` saves memory too), or use LoRA or PROMPT_TUNING."
        )


def check_sharding(fields: AdapterFields | None, quantization: Any) -> None:
    """Refuse what a sharded model (FSDP2) cannot have.

    Args:
        fields: As :func:`adapter_fields` gives them, or None.
        quantization: How weights are quantised, or None.

    Raises:
        ValueError: For quantised weights; prompts, which peft makes outside of the model's layers; AdaLoRA, whose ranks
            are chosen by whole gradients; and single tokens that train, of which peft's module has two names.
    """
    what = None
    if quantization is not None:
        what = "A quantised model"
    elif fields is not None and (fields.get("trainable_token_indices") or fields["peft_type"] == "TRAINABLE_TOKENS"):
        what = "Training of single tokens"
    elif fields is not None and (
        fields["peft_type"] == "ADALORA" or adapter_config(fields, "AutoModelForCausalLM").is_prompt_learning
    ):
        what = fields["peft_type"]
    if what is not None:
        raise ValueError(
            f"{what} does not work with parameters that are sharded over ranks. Use Trainer(strategy='ddp'), or LoRA, "
            f"DoRA or IA3 on weights that are not quantised."
        )


def add_adapter(model: nn.Module, fields: AdapterFields, auto_class: str) -> nn.Module:
    """Put a fresh adapter into a model and freeze the rest; a classifier's head trains and is saved with it.

    Args:
        model: Of transformers; changed in place.
        fields: As :func:`adapter_fields` gives them.
        auto_class: That built the model.

    Returns:
        The ``PeftModel``. Its parameters are at least as precise as those of the model.

    Raises:
        ValueError: As :func:`adapter_config`; for layers that the model does not have; and for prompts before a
            classifier that looks for its row's end in ``input_ids``.
    """
    config = adapter_config(fields, auto_class)
    is_prompt = config.is_prompt_learning and fields["peft_type"] not in _PREFIXES
    if is_prompt and auto_class == "AutoModelForSequenceClassification" and hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} reads a row's last token, and looks for padding in `input_ids`, in whose place "
            f"{fields['peft_type']} gives embeddings. Use PREFIX_TUNING or LoRA."
        )
    if auto_class.endswith(("Classification", "QuestionAnswering")):
        if not hasattr(config, "modules_to_save"):
            raise ValueError(
                f"{fields['peft_type']} leaves the classifier's head frozen, which is new and has to train. Use an "
                f"adapter whose configuration has `modules_to_save`, such as LoRA."
            )
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *head_names(model)})
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    adapted: nn.Module = _import_peft().get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's initial rank, a number that peft unfreezes where it casts it
            parameter.requires_grad_(False)
        # Prompts are made in float32, whatever the model is in.
        if parameter.requires_grad and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)
    return adapted


def head_names(model: nn.Module) -> list[str]:
    """The modules of a classifier that have to train: those outside its backbone, and what has no pretrained weights.

    Args:
        model: Of transformers.

    Returns:
        Their names, such as ``classifier`` or ``bert.pooler.dense``.
    """
    backbone = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    outside = [name for name in children if name != backbone and any(True for _ in children[name].parameters())]
    outside = outside if backbone in children else []
    fresh = [name.rpartition(".")[0] for name, parameter in model.named_parameters() if is_fresh(parameter)]
    return [*outside, *dict.fromkeys(name for name in fresh if name.partition(".")[0] not in outside)]


def warn_of_fixed_ranks(fields: AdapterFields, trainer: L.Trainer) -> None:
    """Say that AdaLoRA's ranks stay what they are, where no callback chooses them.

    Args:
        fields: As :func:`adapter_fields` gives them.
        trainer: With its callbacks.

    Warns:
        UserWarning: If none of them does.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if fields["peft_type"] == "ADALORA" and not any(hasattr(one, "allocates_ranks") for one in callbacks):
        rank_zero_warn(
            "AdaLoRA without the callback AdaLoraAllocation: no rank is ever given up, and the matrices are not kept "
            "orthogonal. Add it to Trainer(callbacks=...)."
        )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LLMModule(peft=...) needs the package peft: `pip install peft`.") from error
    return peft


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _plain(value: Any) -> Any:
    """Without sets, enumerations and dataclasses, which neither YAML nor a safely loaded checkpoint would hold."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value
