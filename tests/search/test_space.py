"""Search spaces: readable forms, and refusals that name what may have been meant."""

import optuna
import pytest
import yaml

from lightning_llm.search.keys import differences, find, put
from lightning_llm.search.space import Choice, Range, load_yaml, read_parameter, read_space, read_space_file
from lightning_llm.search.trial_config import with_values

CONFIG = {
    "seed_everything": True,
    "model": {"model": {"hidden_size": 8}, "learning_rate": 1e-3, "optimizer_options": None},
    "data": {"class_path": "some.Data", "init_args": {"max_length": 64}},
    "trainer": {"callbacks": [{"class_path": "some.Scaling", "init_args": {"power": 1.0}}], "max_epochs": 1},
}


@pytest.mark.parametrize(
    ("spec", "parameter"),
    [
        ("{log_uniform: [1e-5, 1e-2]}", Range("k", 1e-5, 1e-2, log=True)),
        ("{uniform: [0, 0.3], step: 0.1}", Range("k", 0, 0.3, step=0.1)),
        ("{int: [4, 64], log: true}", Range("k", 4, 64, whole=True, log=True)),
        ("{int: [4, 64], step: 4}", Range("k", 4, 64, whole=True, step=4)),
        (
            "{choice: [5%, null, [a, b], {r: 4}, 1e-3, true]}",
            Choice("k", ("5%", None, ["a", "b"], {"r": 4}, 1e-3, True)),
        ),
    ],
)
def test_every_form_is_read_drawn_and_written_again(spec, parameter):
    assert read_parameter("k", load_yaml(spec, "spec")) == parameter
    assert read_parameter("k", parameter.spec()) == parameter
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        value = parameter.draw(trial)
        assert parameter.value_of(trial.params["k"]) == value
        if isinstance(parameter, Choice):
            assert value in parameter.choices
        else:
            assert parameter.low <= value <= parameter.high
            assert isinstance(value, int if parameter.whole else float)
        study.tell(trial, 0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"log_unifrom": [1, 2]}, "Did you mean `log_uniform`"),
        ({"uniform": [1, 2], "int": [1, 2]}, "is searched by"),
        (3, "is searched by"),
        ({"uniform": [2, 1]}, "low < high"),
        ({"uniform": ["a", 1]}, "two numbers"),
        ({"uniform": [1]}, "two numbers"),
        ({"int": [1.5, 3]}, "two whole numbers"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"log_uniform": [1, 2], "step": 1}, "beside `log_uniform` there may be nothing"),
        ({"int": [1, 9], "log": True, "step": 2}, "cannot go with a logarithmic scale"),
        ({"int": [1, 9], "step": 0}, "positive number"),
        ({"int": [1, 9], "log": "yes"}, "true or false"),
        ({"choice": []}, "list of values"),
        ({"choice": [1, 1]}, "stands twice"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_key(spec, message):
    with pytest.raises(ValueError, match="`model.x`.*") as error:
        read_parameter("model.x", spec)
    assert message in str(error.value)


def test_space_is_nested_or_dotted_but_no_key_stands_twice(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("model:\n  peft:\n    r: {int: [4, 64]}\nmodel.warmup: {choice: [1%]}\n")
    assert [parameter.key for parameter in read_space(read_space_file(path))] == ["model.peft.r", "model.warmup"]
    with pytest.raises(ValueError, match="stands twice"):
        read_space({"model": {"a": {"int": [1, 2]}}, "model.a": {"int": [1, 2]}})
    with pytest.raises(ValueError, match="A search space maps"):
        read_space({})
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_space_file(path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_space_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.learning_rate", ["model", "learning_rate"]),
        ("model.model.hidden_size", ["model", "model", "hidden_size"]),
        ("model.optimizer_options.momentum", ["model", "optimizer_options", "momentum"]),
        ("data.max_length", ["data", "init_args", "max_length"]),
        ("data.init_args.max_length", ["data", "init_args", "max_length"]),
        ("trainer.callbacks.Scaling.power", ["trainer", "callbacks", 0, "init_args", "power"]),
    ],
)
def test_keys_lead_through_sections_classes_lists_and_mappings(key, path):
    assert find(CONFIG, key) == path
    config = with_values(CONFIG, {key: 7}, seed=3)
    node = config
    for part in path:
        node = node[part]
    assert node == 7
    assert config["seed_everything"] == 3  # not left to chance
    assert find(CONFIG, key) == path  # the base is as it was


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.learning_rat", "`model.learning_rate`"),
        ("learning_rate", "`model.learning_rate`"),
        ("model.learning_rate.x", "`model.learning_rate`"),
        ("data.max_lenght", "`data.max_length`"),
        ("trainer.callbacks.Scalling.power", "`trainer.callbacks.Scaling.power`"),
        ("mdel.learning_rate", "`model.learning_rate`"),
        ("", "--print_config"),
    ],
)
def test_unknown_keys_are_refused_with_those_that_are_near(key, hint):
    with pytest.raises(ValueError, match="The configuration has no key") as error:
        find(CONFIG, key)
    assert hint in str(error.value)


def test_differences_name_keys_and_a_new_argument_without_value_is_none():
    other = yaml.safe_load(yaml.safe_dump(CONFIG))
    other["model"]["new"] = None
    assert [*differences(CONFIG, other)] == []
    put(other, ["trainer", "callbacks", 0, "init_args", "power"], 2.0)
    assert [*differences(CONFIG, other)] == ["trainer.callbacks"]
