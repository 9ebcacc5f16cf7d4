"""Every file in configs/ is understood by the command line, and runs two optimizer steps without a network."""

import json
import os
from pathlib import Path

import lightning as L
import pytest
import yaml
from transformers import AutoTokenizer

from lightning_llm.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}

# What a file needs beside the arguments below: another command than `fit`, and changes to its settings, such as a tiny
# model in place of one on the hub.
DIFFERENT = {
    "finetune": {
        "model": {"model": TINY_LLAMA},
        "data": {"data": "docs/", "validation_data": "README.md", "tokenizer": "bytes", "max_length": 64},
        "trainer": {"precision": "32-true", "accumulate_grad_batches": 2, "accelerator": "cpu"},
    },
    "multi_task": {  # one batch would be of one task, and val/loss is of all
        "arguments": ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "1.0"],
    },
    "quickstart": {
        "model": {"model": {"vocab_size": 512}},
        "data": {"data": "docs/", "validation_data": "README.md", "vocab_size": 512},
        "arguments": [],  # it has a progress bar of its own
    },
}

QUICK = {
    "max_steps": 2,
    "limit_val_batches": 1,
    "val_check_interval": 1,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 1,
}


def joined(settings, changes):
    """Settings with changes, mapping by mapping; a mapping of another kind of model replaces the name of one."""
    for name, value in changes.items():
        is_deeper = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = joined(settings[name], value) if is_deeper else value
    return settings


def prepared(path, folder):
    """The command and the file, changed to be quick and to write into a folder."""
    changes = dict(DIFFERENT.get(path.stem, {}))
    command = changes.pop("command", ["fit"])
    arguments = changes.pop("arguments", None)
    settings = joined(yaml.safe_load(path.read_text()), changes)
    if command == ["fit"]:
        settings["trainer"] |= {**QUICK, "default_root_dir": str(folder)}
        settings["trainer"]["logger"] = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder)},
        }
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(settings))
    return command, copy, arguments


def test_there_are_files_to_test():
    assert {"quickstart", "text_classification", "masked_lm"} <= {path.stem for path in CONFIGS}
    assert set(DIFFERENT) <= {path.stem for path in CONFIGS}


@pytest.fixture
def steps(monkeypatch):
    """The optimizer steps of each run."""
    found = []
    fit = L.Trainer.fit

    def spy(trainer, *arguments, **options):
        fit(trainer, *arguments, **options)
        found.append(trainer.global_step)

    monkeypatch.setattr(L.Trainer, "fit", spy)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_runs_two_steps(path, tmp_path, monkeypatch, steps):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-llm"])
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path / "cache"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    command, copy, arguments = prepared(path, tmp_path)
    if arguments is None:
        arguments = ["--trainer.enable_progress_bar", "false"]
    main([*command, "--config", str(copy), *arguments])
    if command == ["fit"]:
        assert steps == [2]
        exported = next(tmp_path.rglob("config.json"))
        assert json.loads(exported.read_text())["model_type"]


@pytest.mark.parametrize("name", ["chat", "dpo"])
def test_a_chat_template_goes_with_the_exported_tokenizer(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path / "cache"))
    command, copy, _ = prepared(ROOT / "configs" / f"{name}.yaml", tmp_path)
    main([*command, "--config", str(copy), "--trainer.enable_progress_bar", "false"])
    (exported,) = {file.parent for file in tmp_path.rglob("tokenizer_config.json")}
    asked = [{"role": "user", "content": "Hi"}]
    text = AutoTokenizer.from_pretrained(exported).apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_what_it_is_for(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 40
