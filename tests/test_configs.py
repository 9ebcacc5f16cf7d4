"""The configurations that need nothing but this repository run as they are, and export what can be used."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from lightning_llm.cli import main

ROOT = Path(__file__).parents[1]


def run(name, folder, monkeypatch):
    """Two steps of a configuration; its tokenizer as it was exported."""
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings["data"]["init_args"] |= {"cache_dir": str(folder / "cache")}
    settings["trainer"] |= {"default_root_dir": str(folder / "runs"), "enable_progress_bar": False}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(ROOT)  # where the data are named from
    main(["fit", "--config", str(path), "--trainer.max_steps", "2"])
    (exported,) = {file.parent for file in folder.rglob("tokenizer_config.json")}
    return AutoTokenizer.from_pretrained(exported)


@pytest.mark.parametrize("name", ["chat", "dpo", "embedding"])
def test_a_configuration_trains_and_exports(name, tmp_path, monkeypatch):
    tokenizer = run(name, tmp_path, monkeypatch)
    assert tokenizer("ab")["input_ids"]
    if name != "embedding":
        asked = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
