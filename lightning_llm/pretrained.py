"""From what a user names (hub id, folder, configuration, built model) to a transformers model."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from lightning_llm.quantization import QuantizationFields, check_quantized, quantization_config

ModelSource = str | Path | dict[str, Any] | PretrainedConfig | nn.Module

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Models of RoBERTa's kind: a row's first token has the position after that of padding.
_COUNTS_FROM_PADDING = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "data2vec-text"),
    *("longformer", "mpnet", "ibert", "luke", "layoutlmv3", "markuplm", "lilt"),
}
# Of every configuration, though no signature and no dictionary of theirs names them.
_KNOWN_KEYS = {"attn_implementation", "_attn_implementation", "num_labels", "decoder_start_token_id"}


def resolve_config(source: ModelSource, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Find the configuration of a model without loading a weight.

    Args:
        source: A hub id, a local folder, a mapping with ``model_type`` and the configuration's fields, a
            ``PretrainedConfig``, or a built model with a ``config``.
        trust_remote_code: Run the model code that the hub repository or the folder brings along.

    Raises:
        FileNotFoundError: If a path does not exist or is no model folder.
        ValueError: If a mapping lacks ``model_type`` or has a field that the configuration does not know.
        TypeError: If ``source`` is none of the above.
    """
    if isinstance(source, nn.Module):
        if not hasattr(source, "config"):
            raise TypeError(
                f"A built model needs a transformers `config`, but {type(source).__name__} has none. Pass a "
                f"PreTrainedModel or a PeftModel, a configuration, a local folder or a hub id."
            )
        return source.config  # type: ignore[return-value]
    if isinstance(source, PretrainedConfig):
        return source
    if isinstance(source, dict):
        return _config_from_mapping(source)
    if isinstance(source, (str, Path)):
        _check_folder(source)
        config: PretrainedConfig = AutoConfig.from_pretrained(_location(source), trust_remote_code=trust_remote_code)
        return config
    raise TypeError(
        f"`model` must be a hub id, a local folder, a configuration (mapping or PretrainedConfig) or a built model, "
        f"but got {type(source).__name__}."
    )


def build_model(
    source: ModelSource,
    config: PretrainedConfig,
    auto_class: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    load_weights: bool = True,
    fresh_head: bool = False,
    quantization: QuantizationFields | None = None,
) -> nn.Module:
    """Build the model on the current default device: pretrained weights from a folder or the hub, else random ones.

    Weights are read from safetensors only; nothing is unpickled.

    Args:
        source: As in :func:`resolve_config`.
        config: What :func:`resolve_config` found.
        auto_class: Name of the transformers auto class, for instance ``AutoModelForCausalLM``.
        dtype: Type of the parameters.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; transformers' choice if None.
        trust_remote_code: As in :func:`resolve_config`.
        load_weights: If False, only the architecture (for sharded set-up on the meta device).
        fresh_head: Whether a head of another size than the configuration asks for is replaced by a random one; one that
            is missing always is. transformers names what it made anew.
        quantization: How pretrained weights are quantised; see :func:`~lightning_llm.quantization.quantization_config`.

    Raises:
        FileNotFoundError: If the folder holds no safetensors weights.
        ImportError: If the package that quantises is not there.
        ValueError: If nothing can be quantised.
    """
    if isinstance(source, nn.Module):
        return source
    auto = getattr(transformers, auto_class)
    if isinstance(source, (str, Path)) and load_weights:
        _check_weights(source)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "config": config}
        if fresh_head:
            options["ignore_mismatched_sizes"] = True
        if quantization is not None:
            if dtype == torch.float64:
                raise ValueError("Weights are quantised from float32, bfloat16 or float16: pass another `dtype`.")
            options["quantization_config"] = quantization_config(quantization)
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
        model, info = auto.from_pretrained(_location(source), **options)
        _mark_fresh(model, {*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])})
        if quantization is not None:
            check_quantized(model, quantization)
        return model  # type: ignore[no-any-return]
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)  # type: ignore[no-any-return]


def check_model_folder(source: str | Path) -> None:
    """Refuse what is no local folder with a model's configuration and safetensors weights.

    Raises:
        FileNotFoundError: Saying what is missing.
    """
    if not Path(source).expanduser().exists():
        raise FileNotFoundError(f"There is no model folder at {Path(source).expanduser()}. Check the path.")
    _check_folder(source)
    _check_weights(source)


def is_fresh(parameter: nn.Parameter) -> bool:
    """Whether a parameter of a model with pretrained weights was not among them, and is random."""
    return getattr(parameter, "_is_fresh", False)


def weights_beside(source: ModelSource, prefix: str) -> dict[str, torch.Tensor]:
    """What a folder holds beside the weights of transformers' own model.

    Args:
        source: As in :func:`resolve_config`; only of a local folder is there anything.
        prefix: Of the names; it is taken off them.
    """
    found: dict[str, torch.Tensor] = {}
    if isinstance(source, (str, Path)):
        for path in sorted(Path(source).expanduser().glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                found |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return found


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Read a parameter type by name; None is torch's default type, which Lightning's ``precision`` sets.

    Raises:
        ValueError: If the name is no floating-point type of torch.
    """
    resolved = torch.get_default_dtype() if dtype is None else dtype
    if isinstance(resolved, str):
        resolved = getattr(torch, resolved.removeprefix("torch."), None)  # type: ignore[assignment]
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point type such as 'float32' or 'bfloat16', but got {dtype!r}.")
    return resolved


def is_complete(source: ModelSource) -> bool:
    """Whether a mapping is what ``config.to_dict()`` gave, as checkpoints hold it, and not a person's few fields."""
    return isinstance(source, dict) and "transformers_version" in source


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens that the configuration has positions for; None where it names no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not positions or not getattr(text, "position_biased_input", True):  # DeBERTa: distances alone, of any length
        return None
    if text.model_type in _COUNTS_FROM_PADDING:
        return int(positions) - 1 - (text.pad_token_id or 0)
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if isinstance(factor, (int, float)):  # a stretched rotary embedding: YaRN, linear, llama3, ...
        positions = max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))
    return int(positions)


def _mark_fresh(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter._is_fresh = True  # type: ignore[attr-defined]


def _location(source: str | Path) -> str:
    folder = Path(source).expanduser()
    return str(folder if folder.exists() else source)


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def _check_folder(source: str | Path) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            names = sorted(path.name for path in folder.iterdir())[:8]
            if "adapter_config.json" in names:
                raise FileNotFoundError(
                    f"{folder} holds an adapter without its model. Load both with peft's `PeftModel.from_pretrained`; "
                    f"`merge_and_unload().save_pretrained(...)` then writes a folder that stands alone."
                )
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no config.json, but holds {names or 'nothing'}. Expected what "
                f"`model.save_pretrained(...)` writes."
            )
    elif folder.is_file():
        raise FileNotFoundError(f"`model` must name a folder, but {folder} is a file. Pass the folder that holds it.")
    elif _looks_like_path(source):
        raise FileNotFoundError(f"There is no model folder at {folder}. Check the path, or pass a hub id 'owner/name'.")


def _check_weights(source: str | Path) -> None:
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise FileNotFoundError(
            f"{folder} holds pickled weights only ({', '.join(pickled)}), and unpickling can run code. Convert them "
            f"once with `AutoModel.from_pretrained(...).save_pretrained(...)`, which writes safetensors."
        )
    raise FileNotFoundError(
        f"{folder} has a config.json but no weights (*.safetensors). To train this architecture from random weights, "
        f"pass its configuration: `LLMModule(AutoConfig.from_pretrained({str(folder)!r}))`."
    )


def _config_from_mapping(fields: dict[str, Any]) -> PretrainedConfig:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"A model given as a mapping needs `model_type` (for instance 'llama' or 'gpt2'), but got {sorted(fields)}."
        )
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"`model_type` {model_type!r} is not one that transformers knows.") from error
    known = _field_names(config)
    # What a configuration wrote itself may hold more fields than its class declares; what a person wrote is checked.
    for name in () if is_complete(fields) else fields:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"{type(config).__name__} has no field `{name}`.{hint}")
    for name in _SPECIAL_TOKENS:  # defaults of the original vocabulary, where another one is asked for
        default = getattr(config, name, None)
        if name not in fields and isinstance(default, int) and default >= fields.get("vocab_size", default + 1):
            fields[name] = None
    return AutoConfig.for_model(model_type, **fields)


def _field_names(config: PretrainedConfig) -> set[str]:
    """The configuration's fields: transformers keeps a misspelt one as an attribute without a word."""
    parameters = {name for base in type(config).__mro__[:-1] for name in inspect.signature(base).parameters}
    return parameters | set(config.to_dict()) | set(config.attribute_map) | _KNOWN_KEYS
