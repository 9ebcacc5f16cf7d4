"""A study: draws that depend on the seed and on what is finished only, whatever stops it in between."""

import math

import pytest

from lightning_llm.search.picture import plot_study
from lightning_llm.search.space import read_space
from lightning_llm.search.study import SearchStudy, alone, make_pruner
from lightning_llm.search.summary import counts, table, token_warning

SPACE = {"x": {"log_uniform": [1e-4, 1.0]}, "n": {"int": [1, 8]}, "c": {"choice": ["a", [1, 2], None]}}


def make_study(path, **options):
    return SearchStudy(str(path), "s", "minimize", read_space(SPACE), **options)


def objective(values):
    return (math.log10(values["x"]) + 2) ** 2 + 0.1 * values["n"] + (values["c"] is None)


def run(path, num_trials, seed=0, dies_at=()):
    """Values of the trials that finish; in some of them the process dies, as it were, and another one goes on."""
    drawn, deaths = [], set(dies_at)
    study = make_study(path, seed=seed)
    while len(drawn) < num_trials:
        trial, values = study.next_trial()
        if len(drawn) in deaths:
            deaths.remove(len(drawn))
            trial.report(0.0, 10)
            study = make_study(path, seed=seed)
            assert study.abandon_stale() == 1
            continue
        drawn.append(values)
        study.complete(trial, objective(values))
    return drawn


def test_draws_depend_on_the_seed_alone_even_if_the_search_dies_on_the_way(tmp_path):
    plain = run(tmp_path / "plain.db", 12)
    assert run(tmp_path / "killed.db", 12, dies_at=(0, 4, 11)) == plain  # TPE proper begins at the tenth
    assert run(tmp_path / "other.db", 1, seed=1)[0] != plain[0]
    assert len({values["x"] for values in plain}) == 12  # no draw is made twice
    study = make_study(tmp_path / "killed.db")
    assert len(study.finished()) == 12
    assert len(study.trials()) == 15
    assert "12 trials (12 completed, 3 interrupted and not counted)" in counts(study)
    assert table(study, "loss").count("interrupted") == 3
    best = min(plain, key=objective)
    assert study.values_of(study.best()) == best
    assert set(study.importances()) == set(SPACE)


def test_failures_count_and_have_their_reason_but_errors_do_not_count(tmp_path):
    study = make_study(tmp_path / "study.db")
    trial, _ = study.next_trial()
    study.fail(trial, "out of memory: 2 GiB")
    trial, first = study.next_trial()
    study.abandon(trial, "ValueError: no such column")
    assert len(study.finished()) == 1
    assert study.best() is None
    trial, again = study.next_trial()
    assert first == again
    trial.report(3.0, 25)
    study.prune(trial)
    text = table(study, "loss")
    assert "trial 0 failed, out of memory: 2 GiB" in text
    assert "trial 1 interrupted, ValueError: no such column" in text
    assert counts(study) == "2 trials (1 pruned, 1 failed, 1 interrupted and not counted)"
    plot_study(study, tmp_path / "study.png", "loss")  # without a completed trial
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_study_goes_on_under_the_same_settings_only(tmp_path):
    path = tmp_path / "study.db"
    make_study(path, settings={"config": {"model": {"task": "a"}}})
    study = make_study(path, settings={"config": {"model": {"task": "b"}}})  # nothing had finished: a new one
    trial, values = study.next_trial()
    study.complete(trial, objective(values))
    same = {"config": {"model": {"task": "b", "new_argument": None}}}
    assert len(make_study(path, settings=same, pruner="none").finished()) == 1
    with pytest.raises(ValueError, match="other settings.*differ in config.model.task. Give --study another name"):
        make_study(path, settings={"config": {"model": {"task": "a"}}})
    with pytest.raises(ValueError, match="differ in config.*, space.n"):
        SearchStudy(str(path), "s", "minimize", read_space({**SPACE, "n": {"int": [1, 9]}}))


def test_one_process_works_on_a_study(tmp_path):
    path = str(tmp_path / "study.db")
    with alone(path, "s", tmp_path):
        with pytest.raises(ValueError, match="Another process works on the study 's'"), alone(path, "s", tmp_path):
            pass
        with alone(path, "other", tmp_path):
            pass
    with alone(path, "s", tmp_path):
        pass


def test_pruners_compare_at_equal_shares_and_wait_for_the_first_one(tmp_path):
    study = make_study(tmp_path / "study.db", pruner="median", prune_after=0.3)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        trial, _ = study.next_trial()
        for percent in (20, 40):
            trial.report(value, percent)
        study.complete(trial, value)
    good, _ = study.next_trial()
    bad, _ = study.next_trial()
    for percent, is_pruned in ((20, False), (40, True)):
        good.report(2.5, percent)
        bad.report(3.5, percent)
        assert not good.should_prune()
        assert bool(bad.should_prune()) is is_pruned
    with pytest.raises(ValueError, match="median, hyperband or none"):
        make_pruner("mean", 0.1)
    with pytest.raises(ValueError, match="share of the run"):
        make_pruner("median", 10)


def test_unequal_tokens_are_told(tmp_path):
    study = make_study(tmp_path / "study.db")
    for tokens in (1000, 1040):
        trial, _ = study.next_trial()
        trial.set_user_attr("tokens", tokens)
        study.complete(trial, 1.0)
    assert token_warning(study) is None
    trial, _ = study.next_trial()
    trial.set_user_attr("tokens", 2000)
    study.complete(trial, 1.0)
    assert "1,000 to 2,000 label tokens" in token_warning(study)
