"""Weights that are quantised as they are loaded, through transformers: torchao, bitsandbytes and others."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

QuantizationFields = dict[str, Any]  # of a transformers quantization configuration, with `quant_method`

_PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "hqq": "hqq", "quanto": "optimum.quanto"}


def quantization_config(fields: QuantizationFields) -> Any:
    """The configuration that transformers has of a way to quantise.

    Args:
        fields: With ``quant_method``. Of torchao, ``quant_type`` is the name of one of its configurations, alone or in
            a mapping with its arguments: ``{"name": "Int8WeightOnlyConfig", "group_size": 32}``.

    Raises:
        ImportError: If the package that quantises is not installed.
        ValueError: For a method or a type that is not known.
    """
    fields = dict(fields)
    method = fields.get("quant_method")
    if fields.get("load_in_8bit") or fields.get("load_in_4bit"):
        method = fields["quant_method"] = "bitsandbytes"
    if method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
        raise ValueError(
            f"`quantization` needs a `quant_method` that transformers knows, such as 'torchao' or 'bitsandbytes', but "
            f"got {method!r}."
        )
    package = _PACKAGES.get(str(method))
    if package is not None and importlib.util.find_spec(package.split(".")[0]) is None:
        raise ImportError(f"quantization with {method!r} needs its package: `pip install {package.split('.')[0]}`.")
    if method != "torchao":
        return AutoQuantizationConfig.from_dict(fields)
    from transformers import TorchAoConfig

    fields.pop("quant_method")
    return TorchAoConfig(_torchao_type(fields.pop("quant_type", None)), **fields)


def check_quantization(fields: QuantizationFields | None, source: Any, checkpoint: str | None) -> None:
    """Refuse, before anything is built, what cannot be quantised.

    Args:
        fields: As in :func:`quantization_config`; None for a model as it is.
        source: What the model is made from.
        checkpoint: What a checkpoint is to hold; None for what suits.

    Raises:
        ImportError: As in :func:`quantization_config`.
        TypeError: For objects in place of plain values.
        ValueError: For random weights, a built model, or a checkpoint of everything.
    """
    if fields is None:
        return
    kind = fields.get("quant_type") if isinstance(fields, Mapping) else None
    if not isinstance(fields, Mapping) or not (kind is None or isinstance(kind, (str, Mapping))):
        what = "`quantization` must be a mapping" if kind is None else "`quant_type` must be a name or a mapping"
        raise TypeError(
            f"{what}, which YAML and checkpoints can hold, such as {{'quant_method': 'torchao', 'quant_type': "
            f"'Int8WeightOnlyConfig'}} or {{'quant_method': 'bitsandbytes', 'load_in_4bit': True}}, but got "
            f"{type(fields if kind is None else kind).__name__}."
        )
    quantization_config(fields)
    if isinstance(source, (dict, PretrainedConfig, nn.Module)):
        what = "a built model" if isinstance(source, nn.Module) else "random weights"
        raise ValueError(
            f"`quantization` is for weights that are read from the hub or a folder, but `model` is {what}. Save it "
            f"with `save_pretrained`, and pass the folder."
        )
    if checkpoint == "whole":
        raise ValueError(
            "Quantised weights are of types that a safely loaded checkpoint does not hold: leave `checkpoint` out, or "
            "say 'trainable'."
        )


def check_training(fields: QuantizationFields | None, has_adapter: bool) -> None:
    """Refuse, before a run begins, quantised weights through or on which nothing learns.

    Args:
        fields: As in :func:`quantization_config`, or None.
        has_adapter: Whether something trains beside the quantised weights.

    Raises:
        ValueError: With what to do instead.
    """
    if fields is None:
        return
    if not has_adapter:
        raise ValueError("Quantised weights do not train: add an adapter, such as peft={'peft_type': 'LORA'}.")
    if "Activation" in str(fields.get("quant_type")):
        raise ValueError(
            f"No gradient flows through activations that are quantised too ({fields['quant_type']}). Use a type of "
            f"weights alone, such as 'Int8WeightOnlyConfig'."
        )


def check_quantized(model: nn.Module, fields: QuantizationFields) -> None:
    """Refuse a model of which not one weight was quantised: torchao leaves those that do not fit as they are.

    Raises:
        ValueError: If all parameters are ordinary ones.
    """
    if all(type(parameter) is nn.Parameter for parameter in model.parameters()):
        raise ValueError(
            f"Not one weight of {type(model).__name__} was quantised by {fields}. Does its `group_size` divide the "
            f"width of the layers (of Int4WeightOnlyConfig 128 where nothing is said)?"
        )


def _torchao_type(given: Any) -> Any:
    from torchao import quantization
    from torchao.core.config import AOBaseConfig

    if isinstance(given, AOBaseConfig):
        return given
    options = {"name": given} if isinstance(given, str) else dict(given or {})
    found = getattr(quantization, str(options.pop("name", None)), None)
    if not (isinstance(found, type) and issubclass(found, AOBaseConfig)):
        names = sorted(n for n in vars(quantization) if n.endswith("WeightOnlyConfig"))
        raise ValueError(
            f"`quant_type` must name a configuration of torchao, such as {', '.join(names)}, or be a mapping with its "
            f"`name` and its arguments, but got {given!r}."
        )
    return found(**options)
