"""The loss without logits is that of the logits: value, gradients, types, models; and it takes no room for them."""

import copy
import json
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import TINY_GPT2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm import LLMModule
from lightning_llm.chunked_loss import chunked_cross_entropy, chunked_token_nll
from lightning_llm.head_loss import call_head, causal_lm_loss, causal_lm_token_nll
from lightning_llm.loss import shift_labels, token_cross_entropy, token_nll

PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "logit_scale": 1.0}
OPTIONS = [
    PLAIN,
    PLAIN | {"label_smoothing": 0.1},
    PLAIN | {"z_loss": 1e-2},
    PLAIN | {"softcap": 3.0},
    PLAIN | {"logit_scale": 0.25},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 2.0, "logit_scale": 1.5},
]


def some_inputs(shape=(3, 7), dim=5, vocab=17, ignored=0.4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
    return [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)], labels


def naive_losses(hidden, weight, bias, labels, *, label_smoothing, z_loss, softcap, logit_scale):
    """Each token's loss from logits, by torch and by the formulas."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    targets = shift_labels(labels)
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100, label_smoothing=label_smoothing
    )
    return losses.view(targets.shape) + z_loss * logits.logsumexp(-1).square() * (targets != -100)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sum_and_gradients_equal_those_of_logits_in_float64(options, chunk_size, with_bias):
    (hidden, weight, bias), labels = some_inputs()
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=chunk_size, **options)
    expected = naive_losses(hidden, weight, bias, labels, **options).sum()
    assert loss.num_tokens == (shift_labels(labels) != -100).sum()
    assert relative(loss.total, expected) < 1e-13
    upstream = torch.tensor(-0.7, dtype=torch.float64)
    for found, true in zip(
        torch.autograd.grad(loss.total, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert relative(found, true) < 1e-12


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_token_losses_and_gradients_equal_those_of_logits_in_float64(options, chunk_size):
    inputs, labels = some_inputs()
    hidden, weight, bias = inputs
    losses = chunked_token_nll(hidden, weight, labels, bias=bias, chunk_size=chunk_size, **options)
    expected = naive_losses(hidden, weight, bias, labels, **options)
    assert losses.shape == labels.shape
    assert relative(losses, expected) < 1e-13
    upstream = torch.randn(labels.shape, dtype=torch.float64)  # a weight for each token, as in DPO
    for found, true in zip(
        torch.autograd.grad(losses, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert relative(found, true) < 1e-12


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (4, 1), (2, 33)])
@pytest.mark.parametrize("ignored", [0.0, 0.9])
def test_any_shape_and_any_ignored_labels(shape, ignored):
    inputs, labels = some_inputs(shape, dim=40, ignored=ignored)  # dim 40: the weight's gradient has room for logits
    hidden, weight, bias = inputs
    loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=8)
    expected = naive_losses(hidden, weight, bias, labels, **PLAIN).sum()
    assert abs(loss.total - expected) < 1e-11
    for found, true in zip(torch.autograd.grad(loss.total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)


def test_control_each_option_changes_the_gradient_so_that_leaving_it_out_would_be_seen():
    (hidden, weight, bias), labels = some_inputs()
    plain = torch.autograd.grad(naive_losses(hidden, weight, bias, labels, **PLAIN).sum(), weight)[0]
    for options in OPTIONS[1:]:
        loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, **options).total
        assert relative(torch.autograd.grad(loss, weight)[0], plain) > 1e-3
    other = labels.clone()
    other[0, 3] = (other[0, 3].clamp(min=0) + 1) % len(weight)
    loss = chunked_cross_entropy(hidden, weight, other, bias=bias).total
    assert relative(torch.autograd.grad(loss, weight)[0], plain) > 1e-3


def test_without_a_label_loss_and_gradients_are_zero():
    inputs, labels = some_inputs(ignored=1.1)
    hidden, weight, bias = inputs
    loss = chunked_cross_entropy(hidden, weight, labels, bias=bias)
    losses = chunked_token_nll(hidden, weight, labels, bias=bias)
    assert loss.total == loss.mean == loss.num_tokens == 0
    for value in (loss.mean, losses.sum()):
        for gradient, tensor in zip(torch.autograd.grad(value, inputs), inputs, strict=True):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


def test_strides_do_not_matter():
    (hidden, weight, _), labels = some_inputs()
    strided = [hidden.detach().transpose(0, 1).contiguous().transpose(0, 1), weight.detach().T.contiguous().T]
    for tensor in strided:
        tensor.requires_grad_()
    found = torch.autograd.grad(chunked_cross_entropy(*strided, labels).total, strided)
    expected = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels).total, (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- precision: no worse than logits in the same type ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [PLAIN, OPTIONS[-1]])
@pytest.mark.parametrize("per_token", [False, True])
def test_errors_are_no_larger_than_those_of_logits_in_the_same_type(dtype, options, per_token):
    inputs, labels = some_inputs((2, 129), dim=48, vocab=509, ignored=0.2, dtype=dtype)
    with torch.no_grad():
        inputs[1].mul_(0.2)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    count = (shift_labels(labels) != -100).sum()

    def chunked(hidden, weight, bias):
        if per_token:
            return chunked_token_nll(hidden, weight, labels, bias=bias, chunk_size=64, **options).sum() / count
        return chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=64, **options).mean

    def naive(hidden, weight, bias):
        return naive_losses(hidden, weight, bias, labels, **options).sum() / count

    truth = naive(*exact)
    values = [function(*inputs) for function in (chunked, naive)]
    assert all(value.dtype == torch.float32 for value in values)
    assert relative(values[0], truth) <= relative(values[1], truth) + 1e-6
    true_gradients = torch.autograd.grad(truth, exact)
    ours, theirs = (torch.autograd.grad(value, inputs) for value in values)
    slack = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    for found, naive_found, true, tensor in zip(ours, theirs, true_gradients, inputs, strict=True):
        assert found.dtype == tensor.dtype
        assert relative(found, true) <= relative(naive_found, true) + slack


def test_gradient_of_a_half_type_weight_is_summed_in_float32():
    """Of 4096 tokens in chunks of 16; control: the same sum in bfloat16 is ten times worse."""
    inputs, labels = some_inputs((1, 4097), dim=8, vocab=3, ignored=0.0, dtype=torch.bfloat16)
    hidden, weight, _ = inputs
    exact = [hidden.detach().double(), weight.detach().double().requires_grad_()]
    (true,) = torch.autograd.grad(chunked_cross_entropy(*exact, labels).mean, exact[1])
    (found,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, chunk_size=16).mean, weight)
    in_bfloat16 = torch.zeros_like(weight)
    for begin in range(0, 4096, 16):
        part = [hidden[:, begin : begin + 17].detach(), weight, labels[:, begin : begin + 17]]
        (gradient,) = torch.autograd.grad(chunked_cross_entropy(*part).total / 4096, weight)
        in_bfloat16 += gradient
    assert relative(found, true) < 4e-3
    assert relative(in_bfloat16, true) > 10 * relative(found, true)


def test_float16_gradients_do_not_overflow_before_the_mean_is_taken():
    hidden = torch.full((1, 8193, 4), 60.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(4, 4, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 8193, dtype=torch.int64)
    assert torch.finfo(torch.float16).max < 60 * 8192 * 0.75  # the sum's gradient
    chunked_cross_entropy(hidden, weight, labels).mean.backward()
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -45.0, dtype=torch.float16))


@pytest.mark.parametrize("per_token", [False, True])
def test_autocast_is_no_worse_than_logits_under_autocast_and_keeps_types(per_token):
    inputs, labels = some_inputs((2, 65), dim=48, vocab=257, dtype=torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = naive_losses(*exact, labels, **PLAIN).sum()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = inputs[0].bfloat16()  # as a layer under autocast gives it; the weight stays float32
        function = chunked_token_nll if per_token else (lambda *a, **k: chunked_cross_entropy(*a, **k).total)
        found = function(hidden, inputs[1], labels, bias=inputs[2]).sum()
        naive = naive_losses(hidden, *inputs[1:], labels, **PLAIN).sum()
    assert relative(found, truth) <= relative(naive, truth) + 1e-6
    triples = zip(*(torch.autograd.grad(loss, arguments) for loss, arguments in
                    ((found, inputs), (naive, inputs), (truth, exact))), strict=True)  # fmt: skip
    for ours, theirs, true in triples:
        assert ours.dtype == torch.float32
        assert relative(ours, true) <= relative(theirs, true) + 1e-6


# ---- cost ------------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products, in place or not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def products_of(function):
    with Products() as products:
        function()
    return products.count


def test_only_label_tokens_and_only_needed_gradients_are_computed():
    (hidden, weight, _), _ = some_inputs((4, 65), dim=8, vocab=400, dtype=torch.float32)
    labels = torch.full((4, 65), -100)
    labels[1, 5:25] = 3
    product = 20 * 8 * 400  # 20 tokens; logits of the first 8 are kept where the weight has a gradient

    def products(hidden_grad, weight_grad):
        inputs = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
        return products_of(lambda: chunked_cross_entropy(*inputs, labels, chunk_size=4)) / product

    assert products(True, True) == 1 + (1 - 8 / 20) + 2
    assert products(True, False) == 2
    assert products_of(lambda: chunked_token_nll(hidden, weight.detach(), labels)) == 2 * product
    with_smoothing = partial(chunked_cross_entropy, hidden, weight.detach(), labels, label_smoothing=0.1)
    assert products_of(with_smoothing) == 3 * product
    assert products(False, True) == 1 + (1 - 8 / 20) + 1
    assert products(False, False) == 1
    with torch.no_grad():
        assert products_of(lambda: chunked_cross_entropy(hidden, weight, labels)) == product
        assert not chunked_cross_entropy(hidden, weight, labels).total.requires_grad
    assert products_of(lambda: chunked_token_nll(hidden, weight, labels)) == product


def test_frozen_head_and_frozen_hidden_states_get_no_gradient():
    (hidden, weight, _), labels = some_inputs()
    for loss_of in (lambda h, w: chunked_cross_entropy(h, w, labels).total, lambda h, w: chunked_token_nll(h, w, labels).sum()):  # fmt: skip # noqa: E501
        expected = torch.autograd.grad(loss_of(hidden, weight), (hidden, weight))
        frozen = weight.detach()
        (of_hidden,) = torch.autograd.grad(loss_of(hidden, frozen), hidden)
        (of_weight,) = torch.autograd.grad(loss_of(hidden.detach(), weight), weight)
        torch.testing.assert_close((of_hidden, of_weight), expected, rtol=1e-13, atol=1e-13)
        assert not frozen.requires_grad


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_one_pass_over_a_frozen_head_is_exact(options, chunk_size):
    """Whatever order the largest logits come in, also where all of a tile are minus infinity."""
    (hidden, weight, bias), labels = some_inputs()
    weight, bias = weight.detach() * 20.0, bias.detach()
    for order, forbidden in (("ascending", 0), ("descending", 0), ("ascending", 6)):
        by_size = (hidden.detach().mean((0, 1)) @ weight.T).argsort(descending=order == "descending")
        weight = weight[by_size]
        shut = bias.clone()
        if forbidden and options["softcap"] is None and not options["label_smoothing"]:
            shut[:forbidden] = -torch.inf
            labels = labels.where(labels < 0, labels.clamp(min=forbidden))
        losses = naive_losses(hidden, weight, shut, labels, **options)
        upstream = torch.linspace(-1.0, 2.0, losses.numel(), dtype=torch.float64).view_as(losses)
        (expected,) = torch.autograd.grad((losses * upstream).sum(), hidden, retain_graph=True)
        found = chunked_token_nll(hidden, weight, labels, bias=shut, chunk_size=chunk_size, **options)
        assert relative(found, losses) < 1e-13
        for _ in range(2):  # a second backward is right, too
            (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden, retain_graph=True)
            assert relative(gradient, expected) < 1e-12
        (expected,) = torch.autograd.grad(losses.sum(), hidden)
        total = chunked_cross_entropy(hidden, weight, labels, bias=shut, chunk_size=chunk_size, **options).total
        assert relative(torch.autograd.grad(total, hidden)[0], expected) < 1e-12


def test_one_pass_over_a_frozen_head_does_not_mind_an_infinite_slope_where_there_is_no_target():
    (hidden, weight, _), labels = some_inputs()
    losses = chunked_token_nll(hidden, weight.detach(), labels)
    (gradient,) = torch.autograd.grad(losses.sqrt().sum(), hidden)  # whose slope at 0 is infinite
    assert gradient.isfinite().all()


def peak_beyond_gradients(case, dtype, tokens=256, dim=256, vocab=131072):
    """Of a step, in MiB, in a process of its own."""
    script = Path(__file__).parents[1] / "benchmarks" / "loss.py"
    settings = ["--threads", "1", "--repeat", "1", "--device", "cpu"]
    sizes = ["--tokens", str(tokens), "--dim", str(dim), "--vocab", str(vocab)]
    command = [sys.executable, str(script), *settings, *sizes, "--dtype", dtype, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return (found["peak"] - found["gradients"]) / 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_inputs_and_gradients_and_64_mib_at_a_vocabulary_of_128k():
    assert peak_beyond_gradients("chunked", "float32") <= 64
    assert peak_beyond_gradients("chunked", "bfloat16") <= 64
    assert peak_beyond_gradients("chunked, frozen", "float32") <= 64
    assert peak_beyond_gradients("logits", "float32") > 128  # control: logits alone are 128 MiB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("case", ["chunked", "chunked, per token"])
def test_peak_memory_of_wide_half_precision_states_is_no_larger(case):
    """Tiles are summed in float32, and those of wide states are the largest."""
    assert peak_beyond_gradients(case, "bfloat16", tokens=2048, dim=2048, vocab=32768) <= 64


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused_with_the_way_out():
    (hidden, weight, _), labels = some_inputs()
    for loss in (chunked_cross_entropy(hidden, weight, labels).total, chunked_token_nll(hidden, weight, labels).sum()):
        with pytest.raises(RuntimeError, match=r"no second derivative.*token_cross_entropy\(logits"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_second_backward_is_refused_for_the_sum_and_right_for_tokens():
    (hidden, weight, _), labels = some_inputs()
    total = chunked_cross_entropy(hidden, weight, labels).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has been given away"):
        total.backward()
    losses = chunked_token_nll(hidden, weight, labels).sum()
    first, second = (torch.autograd.grad(losses, weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("label", [17, -1, -101])
@pytest.mark.parametrize("function", [chunked_cross_entropy, chunked_token_nll])
def test_labels_out_of_range_are_an_error(function, label):
    (hidden, weight, _), labels = some_inputs()
    labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"Labels must be in \[0, 17\).*there is {label}"):
        function(hidden, weight, labels)


def test_what_does_not_fit_is_an_error_that_says_so():
    (hidden, weight, bias), labels = some_inputs()
    with pytest.raises(ValueError, match=r"Expected `hidden` \(batch, seq, dim\).*\(3, 7, 5\), \(5, 17\)"):
        chunked_cross_entropy(hidden, weight.T, labels)
    with pytest.raises(ValueError, match=r"Expected .* and None"):
        chunked_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match=r"`bias` \(vocab,\) .* and \(16,\)"):
        chunked_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match=r"one float type, but got torch.float32 and torch.float64"):
        chunked_cross_entropy(hidden.float(), weight, labels)
    with pytest.raises(ValueError, match="`label_smoothing` must be in"):
        chunked_cross_entropy(hidden, weight, labels, label_smoothing=1.5)
    with pytest.raises(ValueError, match="`z_loss` must be 0 or more"):
        chunked_cross_entropy(hidden, weight, labels, z_loss=-1.0)
    with pytest.raises(ValueError, match="`softcap` must be positive"):
        chunked_cross_entropy(hidden, weight, labels, softcap=-30.0)
    with pytest.raises(ValueError, match="`chunk_size` must be positive"):
        chunked_cross_entropy(hidden, weight, labels, chunk_size=0)
    with pytest.raises(ValueError, match=r"`reduction` must be 'sum', but got 'mean'.*\.mean"):
        chunked_cross_entropy(hidden, weight, labels, reduction="mean")


# ---- models ----------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "llama": ({}, None, 1.0),
    "qwen3": ({"tie_word_embeddings": True}, None, 1.0),
    "mistral": ({}, None, 1.0),
    "gpt2": ({"resid_pdrop": 0.3}, None, 1.0),
    "phi": ({}, None, 1.0),  # a head with a bias
    "gemma2": ({"final_logit_softcapping": 5.0}, 5.0, 1.0),
    "gemma3_text": ({"final_logit_softcapping": 4.0}, 4.0, 1.0),
    "cohere": ({"logit_scale": 0.25}, None, 0.25),
    "granite": ({"logits_scaling": 13.0}, None, 1 / 13),
}


def small_model(family, **options):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    fields = SMALL_GPT2 | ids if family == "gpt2" else SMALL
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **options})).double().train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that logits are large enough to be bounded
    return model


def small_batch():
    ids = torch.randint(3, 101, (2, 19), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
    return {"input_ids": ids, "use_cache": False}, labels


def loss_and_gradients(function, model):
    torch.manual_seed(3)  # dropout
    model.zero_grad()
    total = function()
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert relative(found[0], expected[0]) < 1e-12
    assert found[1].keys() == expected[1].keys()
    floor = max(gradient.norm() for gradient in expected[1].values())  # key biases have no gradient but rounding
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * floor)
        assert error < 1e-12, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_loss_and_gradients_are_those_of_its_logits(family):
    options, softcap, scale = FAMILIES[family]
    model = small_model(family, **options)
    inputs, labels = small_batch()
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call_head(model, inputs, lambda hidden, weight, bias, logits: seen.append(logits) or hidden.sum())
    assert seen[0].softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-12))
    assert seen[0].scale == pytest.approx(scale, rel=1e-12)
    expected = loss_and_gradients(lambda: token_cross_entropy(model(**inputs).logits, labels).total, model)
    assert_same(loss_and_gradients(lambda: causal_lm_loss(model, inputs, labels).total, model), expected)
    assert_same(loss_and_gradients(lambda: causal_lm_token_nll(model, inputs, labels).sum(), model), expected)
    assert causal_lm_loss(model, inputs, labels).num_tokens == (shift_labels(labels) != -100).sum()
    assert model(**inputs).logits.shape == (2, 19, 101)  # the model has its head back


def unbounded(hidden, weight, bias, logits, labels):
    return chunked_cross_entropy(hidden, weight, labels, bias=bias).total


def test_control_the_bound_and_the_scale_of_logits_matter():
    for family in ("gemma2", "cohere"):
        model = small_model(family, **FAMILIES[family][0])
        inputs, labels = small_batch()
        right = causal_lm_loss(model, inputs, labels).total
        wrong = call_head(model, inputs, partial(unbounded, labels=labels))
        assert relative(wrong, right) > 1e-2


def test_measuring_the_head_leaves_random_numbers_and_modes_as_they_are():
    model = small_model("gpt2", resid_pdrop=0.5)
    inputs, labels = small_batch()
    torch.manual_seed(5)
    first = causal_lm_loss(model, inputs, labels).total  # measures
    torch.manual_seed(5)
    second = causal_lm_loss(model, inputs, labels).total
    assert first == second
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def warn_of_any_logits(monkeypatch):
    """The models here are small, and their logits too."""
    monkeypatch.setattr("lightning_llm.head_loss._WORTH_A_WARNING", 0)


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_lora_on_the_head_goes_by_logits_and_lora_elsewhere_does_not(target, warn_of_any_logits):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    model = peft.get_peft_model(small_model("llama"), settings).double()
    inputs, labels = small_batch()
    expected = loss_and_gradients(lambda: token_cross_entropy(model(**inputs).logits, labels).total, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_same(loss_and_gradients(lambda: causal_lm_loss(model, inputs, labels).total, model), expected)
    told = [str(warning.message) for warning in caught if "made from its logits" in str(warning.message)]
    assert len(told) == (1 if target == "lm_head" else 0)
    assert any("lora" in name for name in expected[1])


class Odd(torch.nn.Module):
    """A model that makes logits in a way of its own."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change
        self.config = model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + 1.0,
        lambda z: z.bfloat16(),
        lambda z: z[..., :90],
        lambda z: z.clamp(-5.0, 5.0),
        lambda z: z + 0.1 * z.roll(1, -1),
        lambda z: z.log_softmax(-1),
    ],
    ids=["offset", "rounded", "cut", "clamped", "mixed", "normalised"],
)
def test_a_model_with_other_logits_goes_by_its_logits(change, warn_of_any_logits):
    model = Odd(small_model("llama"), change)
    inputs, labels = small_batch()
    labels = labels.clamp(max=89)
    with pytest.warns(UserWarning, match="Odd is made from its logits"):
        found = causal_lm_loss(model, inputs, labels)
    assert found == token_cross_entropy(model(**inputs).logits, labels)
    assert (causal_lm_token_nll(model, inputs, labels) == token_nll(model(**inputs).logits, labels)).all()


@pytest.mark.parametrize("change", [lambda z: 0.5 * z, lambda z: 7.0 * torch.tanh(0.2 * z)], ids=["scaled", "bounded"])
def test_a_map_that_no_configuration_names_is_measured(change):
    model = Odd(small_model("llama"), change)
    inputs, labels = small_batch()
    expected = loss_and_gradients(lambda: token_cross_entropy(model(**inputs).logits, labels).total, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(loss_and_gradients(lambda: causal_lm_loss(model, inputs, labels).total, model), expected)


def test_logits_that_take_little_memory_are_worth_no_warning(monkeypatch):
    model = Odd(small_model("llama"), lambda z: z + 1.0)
    inputs, labels = small_batch()  # 2 x 19 tokens, vocabulary 101
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        causal_lm_loss(model, inputs, labels)
        monkeypatch.setattr("lightning_llm.head_loss._WORTH_A_WARNING", 4 * 38 * 101 + 1)
        causal_lm_loss(model, inputs, labels)
    monkeypatch.setattr("lightning_llm.head_loss._WORTH_A_WARNING", 4 * 38 * 101)
    with pytest.warns(UserWarning, match=r"which take 0\.0 GiB in float32"):
        causal_lm_loss(model, inputs, labels)


def test_a_loss_that_is_compiled_as_a_whole_is_made_from_logits():
    """What the compiler traces is the plain loss, in one graph, and no warning."""
    model = small_model("llama").train()
    inputs, labels = small_batch()
    expected = loss_and_gradients(lambda: causal_lm_loss(model, inputs, labels, loss_kernel="plain").total, model)
    compiled = torch.compile(lambda: causal_lm_loss(model, inputs, labels).total, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(loss_and_gradients(compiled, model), expected)


def test_a_compiled_model_goes_by_its_logits(warn_of_any_logits):
    model = small_model("llama")
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    inputs, labels = small_batch()
    with pytest.warns(UserWarning, match="it is compiled"):
        found = causal_lm_loss(compiled, inputs, labels)
    assert relative(found.total, causal_lm_loss(model, inputs, labels).total) < 1e-12


def test_an_error_in_the_loss_leaves_the_model_whole():
    model = small_model("llama")
    inputs, labels = small_batch()
    before = model(**inputs).logits
    labels[0, 3] = 101
    with pytest.raises(ValueError, match="Labels must be in"):
        causal_lm_loss(model, inputs, labels)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", ["chunked", "plain"])
def test_label_smoothing_and_z_loss_of_a_model(kernel):
    model = small_model("gemma2", final_logit_softcapping=5.0)
    inputs, labels = small_batch()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    found = causal_lm_loss(model, inputs, labels, loss_kernel=kernel, **options).total
    head = torch.eye(101, dtype=torch.float64)
    expected = naive_losses(model(**inputs).logits, head, None, labels, **{**PLAIN, **options}).sum()
    assert relative(found, expected) < 1e-12


def test_rows_that_the_model_sees_end_to_end_keep_their_own_labels():
    model = small_model("llama")
    inputs, labels = small_batch()
    positions = torch.arange(19).repeat(2, 1)
    flat = {"input_ids": inputs["input_ids"].view(1, -1), "position_ids": positions.view(1, -1), "use_cache": False}
    separate = causal_lm_loss(model, {**inputs, "position_ids": positions}, labels)
    together = causal_lm_loss(model, flat, labels)
    assert together.num_tokens == separate.num_tokens
    assert relative(together.total, separate.total) < 1e-6  # transformers computes rotary embeddings in float32


@pytest.mark.parametrize("kernel", ["liger", "cce"])
def test_kernels_of_others_are_refused_without_a_gpu(kernel):
    model = small_model("llama")
    inputs, labels = small_batch()
    with pytest.raises(ValueError, match=f"loss_kernel='{kernel}' needs a GPU, but the model is on cpu"):
        causal_lm_loss(model, inputs, labels, loss_kernel=kernel)


def test_an_unknown_kernel_is_refused():
    inputs, labels = small_batch()
    with pytest.raises(ValueError, match="'chunked', 'liger', 'cce' or 'plain', but got 'fast'"):
        causal_lm_loss(small_model("llama"), inputs, labels, loss_kernel="fast")


# ---- wrappers whose hooks must run -----------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one rank: wrappers run their hooks as in a larger one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_hooks_of_ddp_run(one_rank, tied):
    model = small_model("llama", tie_word_embeddings=tied)
    inputs, labels = small_batch()
    expected = loss_and_gradients(lambda: causal_lm_loss(model, inputs, labels).total, model)
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    for _ in range(2):  # the second forward finds out whether the first backward was complete
        reduced.clear()
        found = loss_and_gradients(lambda: causal_lm_loss(wrapped, inputs, labels).total, wrapped)
    assert sum(reduced) == sum(parameter.numel() for parameter in model.parameters())
    assert_same((found[0], {name.removeprefix("module."): g for name, g in found[1].items()}), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_alone", [False, True])
def test_sharded_weights_are_whole_where_the_loss_is_made(one_rank, tied, head_alone):
    if tied and head_alone:
        pytest.skip("a tied head cannot be sharded by itself")
    model = small_model("llama", tie_word_embeddings=tied)
    inputs, labels = small_batch()
    expected = loss_and_gradients(lambda: causal_lm_loss(model, inputs, labels).total, model)
    sharded = copy.deepcopy(model)
    for layer in [*sharded.model.layers, *([sharded.lm_head] if head_alone else [])]:
        torch.distributed.fsdp.fully_shard(layer, mesh=one_rank)
    torch.distributed.fsdp.fully_shard(sharded, mesh=one_rank)
    with pytest.raises(ValueError, match="sharded"):
        chunked_cross_entropy(torch.zeros(2, 19, 32, dtype=torch.float64), sharded.lm_head.weight, labels)
    for loss_of in (lambda: causal_lm_loss(sharded, inputs, labels).total, lambda: causal_lm_token_nll(sharded, inputs, labels).sum()):  # fmt: skip # noqa: E501
        total, gradients = loss_and_gradients(loss_of, sharded)
        assert_same((total, {name: gradient.full_tensor() for name, gradient in gradients.items()}), expected)


# ---- in the module ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3])
def test_a_module_trains_and_scores_alike_with_and_without_logits(padding):
    batch = {"input_ids": torch.arange(24).view(2, 12) % 7, "row_ids": torch.arange(2)}
    batch["labels"] = batch["input_ids"].clone()
    if padding:
        batch["labels"][1, -padding:] = -100
        batch["attention_mask"] = (batch["labels"] != -100).long()
    results = []
    for loss_kernel in ("plain", "chunked"):
        torch.manual_seed(0)
        module = LLMModule(TINY_GPT2, loss_kernel=loss_kernel, dtype="float64")
        module.configure_model()
        out = module.training_step(batch, 0)
        out["loss"].backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([out["loss"].detach(), out["num_tokens"], *module.predict_step(batch, 0).values(), *gradients])
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-14)


def test_a_module_refuses_kernels_that_there_are_not():
    with pytest.raises(ValueError, match="`loss_kernel` must be 'chunked', 'plain', 'liger' or 'cce', but got 'fused'"):
        LLMModule(TINY_GPT2, loss_kernel="fused")
    with pytest.raises(ValueError, match="Windows compute a loss of their own"):
        LLMModule(TINY_GPT2, loss_kernel="liger", sequence_window=8)


def test_a_module_trains_without_logits_unless_told_otherwise(monkeypatch):
    made = []
    monkeypatch.setattr(
        "lightning_llm.head_loss.chunked_cross_entropy",
        lambda *a, **k: made.append(1) or chunked_cross_entropy(*a, **k),
    )
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
    for options, number in (({}, 1), ({"loss_kernel": "plain"}, 0)):
        made.clear()
        module = LLMModule(TINY_GPT2, **options)
        module.configure_model()
        module.training_step(batch, 0)
        assert len(made) == number


def test_a_module_says_what_second_derivatives_and_second_backwards_need():
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
    module = LLMModule(TINY_GPT2, attn_implementation="eager")
    module.configure_model()
    parameters = [p for p in module.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match=r"`create_graph=True`.*LLMModule\(loss_kernel='plain'\)"):
        torch.autograd.grad(module.training_step(batch, 0)["loss"], parameters, create_graph=True)
    loss = module.training_step(batch, 0)["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward.*LLMModule\(loss_kernel='plain'\)"):
        loss.backward()
    plain = LLMModule(TINY_GPT2, attn_implementation="eager", loss_kernel="plain")
    plain.configure_model()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(plain.training_step(batch, 0)["loss"], parameters, create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()
    assert all(parameter.grad is not None for parameter in parameters)
