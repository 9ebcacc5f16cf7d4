"""Models are found, or refused with what was expected, what came and what to do."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from lightning_llm.pretrained import build_model, max_positions, resolve_config, resolve_dtype


def build(source, **options):
    config = resolve_config(source)
    return build_model(source, config, "AutoModelForCausalLM", **{"dtype": torch.float32, **options})


def test_mapping_becomes_a_random_model_with_its_fields(tiny_gpt2):
    model = build(tiny_gpt2)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.n_embd == 32


def test_folder_gives_its_weights_bit_for_bit(tiny_gpt2, tmp_path):
    model = build(tiny_gpt2)
    model.save_pretrained(tmp_path)
    loaded = build(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_dtype_and_attention_reach_the_model(tiny_llama):
    model = build(tiny_llama, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_built_model_is_taken_as_it_is(tiny_gpt2):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2))
    assert build(model) is model


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"vocab_size": 3}, ValueError, "needs `model_type`"),
        ({"model_type": "lama"}, ValueError, "'lama' is not one that transformers knows"),
        (
            {"model_type": "llama", "hiden_size": 3},
            ValueError,
            "no field `hiden_size`. Did you mean `hidden_size`",
        ),
        ("./no/such/folder", FileNotFoundError, "no model folder at no/such/folder"),
        (torch.nn.Linear(2, 2), TypeError, "needs a transformers `config`"),
        (3, TypeError, "`model` must be a hub id"),
    ],
)
def test_what_is_no_model_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        resolve_config(source)


def test_folder_without_configuration_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no config.json, but holds \['notes.txt'\]"):
        resolve_config(str(tmp_path))


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file"):
        resolve_config(str(tmp_path / "model.safetensors"))


def test_folder_without_weights_is_refused_with_the_way_to_random_weights(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights .*AutoConfig.from_pretrained"):
        build(str(tmp_path))


def test_pickled_weights_are_not_loaded(tiny_gpt2, tmp_path):
    model = build(tiny_gpt2)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="unpickling can run code"):
        build(str(tmp_path))


def test_unknown_hub_id_says_that_it_was_not_found():
    with pytest.raises(OSError, match="no-such-owner/no-such-model|connect"):
        resolve_config("no-such-owner/no-such-model")


def test_code_that_comes_with_a_model_is_not_run(tiny_gpt2, tmp_path):
    """A folder that names its own code is refused unless it is trusted by name."""
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        resolve_config(str(folder))
    assert not (tmp_path / "ran").exists()


def test_positions_come_from_the_configuration(tiny_gpt2, tiny_llama):
    assert max_positions(resolve_config(tiny_gpt2)) == 64
    assert max_positions(resolve_config(tiny_llama)) == 64
    assert max_positions(resolve_config({"model_type": "mamba"})) is None


def test_stretched_rotary_embeddings_reach_further(tiny_llama):
    def limit(**rope):
        return max_positions(resolve_config({**tiny_llama, "rope_parameters": {"rope_theta": 10000.0, **rope}}))

    assert limit(rope_type="default") == 64
    assert limit(rope_type="linear", factor=4.0) == 256
    assert limit(rope_type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    assert limit(rope_type="yarn", factor=4.0, original_max_position_embeddings=16) == 64


def test_home_folder_is_expanded(tiny_gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build(tiny_gpt2).save_pretrained(tmp_path / "model")
    assert build("~/model").config.n_embd == 32


def test_adapter_without_its_model_is_explained(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds an adapter without its model.*merge_and_unload"):
        resolve_config(str(tmp_path))


def test_dtype_by_name_or_default():
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("torch.float64") == torch.float64
    assert resolve_dtype(None) == torch.float32
    for bad in ("float31", "int8"):
        with pytest.raises(ValueError, match=f"floating-point type .* but got '{bad}'"):
            resolve_dtype(bad)


def test_fields_of_every_configuration_are_known_though_no_class_declares_them():
    config = resolve_config({"model_type": "t5", "num_labels": 3, "decoder_start_token_id": 0})
    assert (config.num_labels, config.decoder_start_token_id) == (3, 0)
