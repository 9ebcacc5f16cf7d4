"""Windows give the value and the gradient of the uncut sequence, for every family, window and form."""

import pytest
from windowed_models import FAMILIES, batch_of, build, full_float64, uncut, windowed, worst_error

from lightning_llm.sequence_windows import cache

EXACT = 1e-12


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    full_float64(monkeypatch)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_parameter_equals_the_uncut_one(family, when):
    model = build(family)
    ids, labels = batch_of()
    truth_loss, truth = uncut(model, ids, labels)
    for window, keep in ((16, 1), (7, 0), (11, 3)):
        loss, grads = windowed(model, ids, labels, window=window, keep=keep, when=when)
        assert loss == pytest.approx(truth_loss, rel=EXACT)
        assert worst_error(grads, truth) < EXACT


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_any_window_from_one_token_to_the_whole_row_gives_the_same_gradient(family):
    model = build(family)
    ids, labels = batch_of(rows=1, length=13)
    _, truth = uncut(model, ids, labels)
    for window in [*range(1, 14), 100]:
        assert worst_error(windowed(model, ids, labels, window=window)[1], truth) < EXACT, window


def test_without_the_gradient_of_keys_and_values_it_is_wrong(monkeypatch):
    model = build("llama")
    ids, labels = batch_of()
    _, truth = uncut(model, ids, labels)
    cut = cache.KeyValueStore.hand_over
    monkeypatch.setattr(
        cache.KeyValueStore, "hand_over", lambda self, grad, first, begin, end: grad[:, :, begin - first :]
    )
    assert worst_error(windowed(model, ids, labels, window=16)[1], truth) > 0.1
    monkeypatch.setattr(cache.KeyValueStore, "hand_over", cut)
    assert worst_error(windowed(model, ids, labels, window=16)[1], truth) < EXACT
