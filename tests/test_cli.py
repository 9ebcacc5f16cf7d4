"""The command line: help at once, every argument documented, wrong keys named, and a whole run from YAML."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_llm.cli import main

ROOT = Path(__file__).parents[1]


def run_command(*arguments, expect=0):
    command = [sys.executable, "-m", "lightning_llm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code != 0
    return f"{capsys.readouterr().err}{stop.value.code}"


@pytest.fixture
def config(tmp_path, tiny_llama):
    """The quickstart's configuration, made tiny."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (tmp_path / "text").mkdir()
    for index in range(20):
        (tmp_path / "text" / f"{index}.txt").write_text(f"Some words of the text with number {index}. " * 10)
    settings["model"]["model"] = tiny_llama
    settings["data"].update(
        data=str(tmp_path / "text"), vocab_size=300, max_length=64, cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
    )  # fmt: skip
    settings["trainer"].update(max_steps=4, val_check_interval=4, log_every_n_steps=1)
    settings["trainer"]["default_root_dir"] = settings["trainer"]["logger"]["init_args"]["save_dir"] = str(
        tmp_path / "runs"
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_help_lists_the_commands_without_heavy_imports():
    begin = time.perf_counter()
    text = run_command("--help")
    assert time.perf_counter() - begin < 5
    for command in ("fit", "validate", "test", "predict", "generate", "quantize"):
        assert f"\n  {command} " in text
    code = "import sys, lightning_llm.cli as c; c.main(['--help']); print([m for m in ('torch',) if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "[]\n"
    )


def test_every_argument_of_model_and_data_is_documented(capsys):
    import inspect

    from lightning_llm import LLMModule
    from lightning_llm.datamodules import TextDataModule

    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for prefix, cls in (("model", LLMModule), ("data", TextDataModule)):
        for name in list(inspect.signature(cls).parameters):
            _, _, entry = text.rpartition(f"--{prefix}.{name} ")
            description, found, _ = entry.partition("(type: ")
            if not found:
                description, _, _ = entry.partition("(required, type: ")
            assert len(description.split()) > 3, f"{prefix}.{name}: {entry[:200]}"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("learning_rate:", "learning_rat:", "model.learning_rat"),
        ("max_length: 64", "max_length: long", "data.max_length"),
        ("windowing: packed", "windowing: sliding", "data.windowing"),
        ("max_steps: 4", "max_step: 4", "trainer.max_step"),
    ],
)
def test_wrong_key_or_value_in_yaml_is_named(config, capsys, old, new, named):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    assert named in fails(capsys, "fit", "--config", str(config))


def test_wrong_field_of_the_models_configuration_is_named(config):
    config.write_text(config.read_text().replace("hidden_size", "hiden_size"))
    with pytest.raises(ValueError, match="no field `hiden_size`. Did you mean `hidden_size`"):
        main(["fit", "--config", str(config)])


def test_missing_file_and_unknown_command_are_named(capsys):
    assert "nofile.yaml" in fails(capsys, "fit", "--config", "nofile.yaml")
    assert "but got 'train'" in fails(capsys, "train")
    assert "learning_rat" in fails(capsys, "fit", "--model.learning_rat", "3")  # no abbreviations


def test_version_is_printed(capsys):
    from lightning_llm import __version__

    main(["--version"])
    assert capsys.readouterr().out == f"lightning-llm {__version__}\n"


def test_fit_validate_test_predict_and_generate_from_one_file(config, tmp_path, capsys):
    main(["fit", "--config", str(config)])
    out = capsys.readouterr().out
    assert "Training report: 4 optimizer steps" in out
    run = tmp_path / "runs" / "version_0"
    metrics = (run / "metrics.csv").read_text()
    assert "train/tokens_per_s" in metrics.splitlines()[0]
    assert "val/bits_per_byte" in metrics.splitlines()[0]
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]

    main(["validate", "--config", str(config), *checkpoint])
    assert "val/bits_per_byte" in capsys.readouterr().out
    main(["test", "--config", str(config), *checkpoint])
    assert "test/bits_per_byte" in capsys.readouterr().out
    main(["predict", "--config", str(config), *checkpoint])
    path = Path(capsys.readouterr().out.strip().rsplit("  ", 1)[1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row_id"] for row in rows] == list(range(len(rows)))
    assert all(row["nll"] > 0 and row["num_tokens"] > 0 for row in rows)

    folder = str(run / "huggingface" / "last")
    options = ["--prompt", "Some words", "--max_new_tokens", "5"]
    main(["generate", "--model", folder, *options])
    first = capsys.readouterr().out
    assert first.startswith("Some words")
    main(["generate", "--model", folder, *options])
    assert capsys.readouterr().out == first
    main(["generate", "--model", folder, *options, "--temperature", "0"])
    assert capsys.readouterr().out.startswith("Some words")


def test_resume_from_the_command_line_goes_on(config, tmp_path):
    main(["fit", "--config", str(config)])
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    main(["fit", "--config", str(config), "--ckpt_path", str(last), "--trainer.max_steps", "6"])
    steps = [line for line in (tmp_path / "runs" / "version_1" / "metrics.csv").read_text().splitlines() if line]
    assert len(steps) > 1


def test_generate_refuses_what_it_cannot_do(capsys, tmp_path):
    assert "no model folder at" in fails(capsys, "generate", "--model", str(tmp_path / "none"), "--prompt", "x")
    assert "--max_new_tokens must be 1 or more" in fails(
        capsys, "generate", "--model", "x", "--prompt", "x", "--max_new_tokens", "0"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_parses(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert "learning_rate" in capsys.readouterr().out


def test_lora_runs_from_its_config_and_writes_plain_weights(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_llm import LLMModule

    folder = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", "--config", str(ROOT / "configs" / "lora.yaml"), folder, "--trainer.max_steps", "2"])
    (exported,) = tmp_path.rglob("huggingface/last")
    (path,) = tmp_path.rglob("last.ckpt")
    loaded = LLMModule.load_from_checkpoint(path, weights_only=True).eval()
    ids = torch.tensor([[5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.allclose(merged(ids).logits, loaded.model(ids).logits, atol=1e-5)


def test_another_data_module_is_named_by_its_class_path(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"document {n} " * 9}) + "\n" for n in range(60)))
    (tmp_path / "stream.yaml").write_text(
        f"""
model:
  model: {{model_type: llama, vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2}}
data:
  class_path: lightning_llm.datamodules.StreamingTextDataModule
  init_args: {{data: {tmp_path}/data.jsonl, tokenizer: bytes, max_length: 32, micro_batch_size: 2, num_streams: 2}}
trainer:
  {{accelerator: cpu, enable_checkpointing: false, enable_progress_bar: false, log_every_n_steps: 1,
    default_root_dir: {tmp_path},
    logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, name: run}}}}}}
"""
    )
    main(["fit", "--config", str(tmp_path / "stream.yaml"), "--trainer.max_steps", "2"])
    header, *steps = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/loss" in header
    assert len(steps) == 2
