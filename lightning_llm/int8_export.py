"""A trained model with its linear layers in int8, a quarter of float32, as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, TorchAoConfig

from lightning_llm.pretrained import check_model_folder

Activations = Literal["float", "int8"]

_OWN_FILES = ("config.json", "generation_config.json")  # written anew; the rest is the tokenizer's or processor's


def export_int8(
    model: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    activations: Activations = "float",
    skip: str | Sequence[str] = (),
) -> Path:
    """Quantize a model's linear layers and write it as a folder, with the tokenizer that lies beside it.

    Each row of a weight becomes int8 numbers and one scale, w = scale * q. ``from_pretrained(output)``, ``pipeline``
    and ``lightning-llm generate`` load the folder wherever torchao is installed. Embeddings, norms, biases and what
    lies outside the base model, the head, stay as they are.

    Args:
        model: Folder that ``save_pretrained`` or ``HuggingFaceCheckpoint`` wrote, or a model.
        output: Folder to write; it appears when it is whole.
        activations: ``float``: weights are widened in each product. ``int8``: what goes into a layer is rounded to int8
            too, row by row as it comes, and the product is one of integers.
        skip: Regular expressions, one or several, searched in the names of linear layers: those stay as they are too.

    Returns:
        The folder.

    Raises:
        ImportError: If torchao is not installed.
        FileNotFoundError: If the folder does not exist or is no model's.
        FileExistsError: If the output exists.
        TypeError: For a module that is no PreTrainedModel.
        ValueError: If nothing can be quantized, or the model is not one of transformers' own classes.

    References:
        torchao, ``Int8WeightOnlyConfig`` and ``Int8DynamicActivationInt8WeightConfig``; Dettmers et al., LLM.int8()
        (2022).
    """
    if activations not in get_args(Activations):
        raise ValueError(f"`activations` must be 'float' or 'int8', but got {activations!r}.")
    recipe = _recipe(activations)
    target = Path(output).expanduser()
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already. Remove it, or choose another folder.")
    skip = [skip] if isinstance(skip, str) else skip
    if isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a folder or a PreTrainedModel, but got {type(model).__name__}. Pass what it has as "
            f"`.model`; of a model with an adapter, what `merge_and_unload()` returns."
        )
    if isinstance(model, PreTrainedModel):
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return _export(Path(folder), recipe, skip, target)
    check_model_folder(model)
    return _export(Path(model).expanduser(), recipe, skip, target)


def _recipe(activations: Activations) -> Any:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError(
            "int8 export needs torchao, which is not installed: pip install 'lightning-llm[quantization]', or pip "
            "install torchao."
        ) from error
    return Int8WeightOnlyConfig() if activations == "float" else Int8DynamicActivationInt8WeightConfig()


def _export(source: Path, recipe: Any, skip: Sequence[str], target: Path) -> Path:
    config = AutoConfig.from_pretrained(source)
    model_class = _class_of(config, source)
    quantization = TorchAoConfig(recipe, modules_to_not_convert=_layers_to_keep(model_class, config, skip))
    model = model_class.from_pretrained(str(source), quantization_config=quantization, device_map="cpu")
    if not any(_is_quantized(parameter) for parameter in model.parameters()):
        kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "weight")})
        raise ValueError(
            f"Nothing in {type(model).__name__} can be quantized: torchao takes nn.Linear within the base model, "
            f"except what skip={list(skip)} names, but its layers are {kinds}. (GPT-2's Conv1D is not supported; "
            f"Llama, Qwen, BERT and their kin are.)"
        )
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(str(unfinished))
        for path in source.iterdir():
            if path.is_file() and path.name not in _OWN_FILES and not _holds_weights(path):
                shutil.copy2(path, unfinished / path.name)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _class_of(config: PretrainedConfig, source: Path) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} holds a quantized model already. Start from the one that it was made of.")
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if len(names) == 1 else None
    if found is None:
        raise ValueError(
            f"The config.json of {source} names `architectures` {names}, but one class of transformers is expected, as "
            f"`save_pretrained` writes it."
        )
    return found


def _layers_to_keep(model_class: Any, config: PretrainedConfig, skip: Sequence[str]) -> list[str]:
    """Names of the linear layers that stay: those outside the base model, and what is asked for.

    By itself transformers keeps the module of the last parameter, and takes a bias for one: a classifier would not.
    """
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    base = model.base_model
    inside = set(base.modules()) if base is not model else set(model.modules()) - {model.get_output_embeddings()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module not in inside or any(re.search(part, name) for part in skip))
    ]


def _is_quantized(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "qdata")  # of torchao's tensors: the integers


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".ckpt") or path.name.endswith(".index.json")
