"""The loss is the float64 truth to rounding, whatever is ignored."""

import pytest
import torch

from lightning_llm.loss import TokenLoss, shift_labels, token_cross_entropy, token_nll


def plain_nll(logits, labels):
    """The definition, one token at a time, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            target = int(labels[row, position + 1])
            if target != -100:
                total = total - logits[row, position].double().log_softmax(-1)[target]
                count += 1
    return total, count


def some_batch(shape=(3, 7), vocab_size=11, ignored=0.4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, vocab_size, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(0, vocab_size, shape, generator=generator)
    return logits, labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (4, 1), (2, 33)])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_token_cross_entropy_equals_the_definition_in_float64(shape, ignored):
    logits, labels = some_batch(shape, ignored=ignored)
    logits.requires_grad_()
    loss = token_cross_entropy(logits, labels)
    truth, count = plain_nll(logits, labels)
    torch.testing.assert_close(loss.total, truth, rtol=1e-14, atol=1e-14)
    assert loss.num_tokens == count
    (gradient,) = torch.autograd.grad(loss.total, logits)
    if count:
        (true_gradient,) = torch.autograd.grad(truth, logits)
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-13, atol=1e-14)
    else:
        assert loss.total == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_summed_in_float32(dtype):
    logits, labels = some_batch((8, 65), vocab_size=257, dtype=dtype)
    truth, _ = plain_nll(logits, labels)
    naive = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    loss = token_cross_entropy(logits, labels).total
    assert loss.dtype == torch.float32
    error, naive_error = (loss.double() - truth).abs(), (naive.double() - truth).abs()
    assert error <= naive_error + 1e-6 * truth


def test_mean_without_a_label_is_zero_and_has_a_graph():
    logits, labels = some_batch(ignored=1.0)
    logits.requires_grad_()
    loss = token_cross_entropy(logits, labels)
    loss.mean.backward()
    assert loss.mean == 0
    assert loss.num_tokens == 0
    assert not logits.grad.any()


def test_token_nll_stands_at_the_position_of_the_prediction_and_sums_to_the_loss():
    logits, labels = some_batch()
    nll = token_nll(logits, labels)
    assert nll.shape == labels.shape
    assert ((nll != 0) == (shift_labels(labels) != -100)).all()
    torch.testing.assert_close(nll.sum(), token_cross_entropy(logits, labels).total)


def test_loss_equals_transformers_own_loss():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(token_cross_entropy(output.logits, labels).mean, output.loss)


def test_mean_divides_by_the_tokens():
    assert TokenLoss(torch.tensor(6.0), torch.tensor(4)).mean == 1.5


def test_second_derivatives_are_those_of_torch():
    torch.manual_seed(0)
    labels = torch.tensor([[1, 2, -100, 0, 3]])
    found = []
    for function in (lambda z: token_cross_entropy(z, labels).total, lambda z: token_nll(z, labels).sum()):
        logits = torch.randn(1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        logits.requires_grad_()
        loss = function(logits)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (loss + 10 * gradient.square().sum()).backward()
        found.append(logits.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [4, -1, -101])
def test_labels_out_of_range_are_an_error(label):
    with pytest.raises((IndexError, RuntimeError)):
        token_cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[0, label, 1]]))


def test_logits_of_any_strides_are_read_right():
    logits = torch.randn(4, 3, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    labels = torch.tensor([[0, 1, 2], [3, -100, 1]])
    token_cross_entropy(logits, labels).total.backward()
    gradient, logits.grad = logits.grad, None
    token_nll(logits, labels).sum().backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-12)
