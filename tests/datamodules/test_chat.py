"""ChatDataModule: each conversation's targets once, in rows that keep conversations apart, on any layout."""

import json
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_tokenizers import trl_templates
from chat_training import GPT2, chats, conversations, train
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.datamodules import ChatDataModule
from lightning_llm.datamodules.examples.records import RecordError
from lightning_llm.datamodules.tokenizer import byte_tokenizer

LAYOUTS = {
    "packed": {},
    "a conversation a row": {"windowing": "documents"},
    "padded": {"windowing": "documents", "batching": "padded", "micro_batch_tokens": 600},
    "without padding": {"batching": "padding_free", "micro_batch_tokens": 600},
}


def batches_of(data):
    data.setup("fit")
    return list(data.train_dataloader())


def documents_of(batch):
    """(token ids, labels) of each conversation in a batch, padding left out."""
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        labels = batch["labels"][row]
        if "position_ids" in batch:
            begins = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        else:
            begins = [0]
            ids = ids[: int(batch["attention_mask"][row].sum())]
        edges = [*begins, len(ids)]
        found += [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in zip(edges, edges[1:], strict=False)]
    return [(ids, labels) for ids, labels in found if any(label != -100 for label in labels)]


def said_by(conversation):
    return "".join(f"{m['content']}<|im_end|>" for m in conversation["messages"] if m["role"] == "assistant")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_conversation_stands_in_an_epoch_once_with_what_the_assistant_says(tmp_path, layout):
    data = chats(tmp_path, **LAYOUTS[layout])
    tokenizer = data.tokenizer
    documents = [document for batch in batches_of(data) for document in documents_of(batch)]
    found = sorted(
        (tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100]))
        for ids, labels in documents
    )
    expected = sorted(
        (tokenizer.apply_chat_template(row["messages"], tokenize=False), said_by(row)) for row in conversations()
    )
    assert found == expected
    assert data._dataset("train").table.num_label_tokens == sum(
        label != -100 for _, labels in documents for label in labels
    )


def test_packed_rows_are_full_and_named_by_their_conversations(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    data = chats(tmp_path, str(path))
    data.setup("fit")
    table = data._dataset("train").table
    assert table.segments.fill > 0.85
    assert len(table) < len(conversations()) / 2
    names = [name for row in range(len(table)) for name in data.row_name(row).split("; ")]
    assert sorted(names) == sorted(f"{path}, line {n + 1}" for n in range(len(conversations())))
    assert "\u27e6" in data.row_text(0)
    assert sum(data.row_text(row).count("<|im_end|>\u27e7") for row in range(len(table))) == sum(
        message["role"] == "assistant" for row in conversations() for message in row["messages"]
    )


def test_packed_conversations_do_not_see_each_other(tmp_path):
    """Sum of the loss and its gradient are those of each conversation by itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2)).to(torch.float64)
    (batch,) = batches_of(chats(tmp_path, conversations(9), micro_batch_size=64))

    def loss_and_gradient(ids, labels, **inputs):
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return [total.detach(), *torch.autograd.grad(total, list(model.parameters()))]

    each = [loss_and_gradient(torch.tensor([ids]), torch.tensor([labels])) for ids, labels in documents_of(batch)]
    assert len(each) == 9 > len(batch["input_ids"])
    separate = [sum(parts) for parts in zip(*each, strict=True)]
    packed = loss_and_gradient(batch["input_ids"], batch["labels"], position_ids=batch["position_ids"])
    leaking = loss_and_gradient(batch["input_ids"], batch["labels"])
    for one, other, wrong in zip(packed, separate, leaking, strict=True):
        assert float((one - other).norm()) <= 1e-12 * float(other.norm())
        assert float((wrong - other).norm()) > 1e-6 * float(other.norm())


def test_long_conversations_are_cut_with_a_warning_or_laid_out_in_windows(tmp_path):
    cut = chats(tmp_path, max_length=100)
    with pytest.warns(UserWarning, match=r"of 23 conversations .* longer than max_length=100: .*tokens are left out, "):
        cut.setup("fit")
    whole = chats(tmp_path)
    whole.setup("fit")
    num_targets = whole._dataset("train").table.num_label_tokens
    table = cut._dataset("train").table
    assert table.num_label_tokens + table.num_cut_targets == num_targets
    assert table.num_cut_targets > 0
    for options in ({}, {"stride": 40}, {"windowing": "documents", "stride": 60}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            data = chats(tmp_path, max_length=100, long="windows", **options)
            batches = batches_of(data)
        found = [(tuple(ids), labels) for batch in batches for ids, labels in documents_of(batch)]
        assert all(len(ids) <= 100 for ids, _ in found)
        assert sum(label != -100 for _, labels in found for label in labels) == num_targets
        learnt = sorted(label for _, labels in found for label in labels if label != -100)
        store = whole._dataset("train").store.values["labels"]
        assert learnt == sorted(int(label) for label in store if label != -100)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shorter_rows_have_the_same_targets(tmp_path, layout):
    data = chats(tmp_path, **LAYOUTS[layout])
    for batch in batches_of(data):
        short = data.cut_batch(batch, 20)
        assert max(len(ids) for ids, _ in documents_of(short)) <= 20
        for part in (batch, short):
            part["learnt"] = sorted(label for _, labels in documents_of(part) for label in labels if label != -100)
        assert short["learnt"] == batch["learnt"]


@pytest.mark.parametrize("layout", ["packed", "without padding"])
def test_how_a_global_batch_is_cut_does_not_change_the_weights(tmp_path, layout):
    options = {**LAYOUTS[layout], "global_batch_size": 4}
    options.pop("micro_batch_tokens", None)
    steps, weights = train(tmp_path, chats(tmp_path, **options), accumulate=1)
    cut_steps, cut_weights = train(tmp_path, chats(tmp_path, **options), accumulate=4)
    assert {step: sorted(rows) for step, rows in steps.items()} == {s: sorted(rows) for s, rows in cut_steps.items()}
    assert float((weights - cut_weights).norm()) <= 1e-12 * float(weights.norm())
    _, other = train(tmp_path, chats(tmp_path, **options, seed=1), accumulate=1)
    assert float((weights - other).norm()) > 1e-6 * float(weights.norm())


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    steps, weights = train(tmp_path, chats(tmp_path), accumulate=2, steps=9, save=(3, 5))
    for step in (3, 5):
        rest, resumed = train(tmp_path, chats(tmp_path), accumulate=2, steps=9, resume=tmp_path / f"step{step}.ckpt")
        assert rest == {number: rows for number, rows in steps.items() if number >= step}
        assert torch.equal(resumed, weights)
    with pytest.raises(ValueError, match="long"):
        train(tmp_path, chats(tmp_path, long="windows"), steps=9, resume=tmp_path / "step3.ckpt")


def test_an_empty_row_has_no_target(tmp_path):
    for options in LAYOUTS.values():
        data = chats(tmp_path, **options)
        data.setup("fit")
        batch = data._dataset("train")[[-1]]
        assert (batch["labels"] == -100).all()
        assert batch["num_input_tokens"].tolist() == [0]


def test_messages_are_read_in_any_usual_form(tmp_path):
    plain = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    truth = batches_of(chats(tmp_path, plain))[0]["input_ids"].tolist()
    share_gpt = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    names = {"messages_column": "conversations", "role_field": "from", "content_field": "value"}
    pair = {"prompt_column": "ask", "completion_column": "say"}
    (tmp_path / "chats.csv").write_text('messages\n"' + json.dumps(plain[0]["messages"]).replace('"', '""') + '"\n')
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "chats.parquet")
    strange = [{"messages": [{"role": "Kunde", "content": "Hi"}, {"role": "Agent", "content": "Hello"}]}]
    forms = [
        (share_gpt, names),
        ([{"ask": "Hi", "say": "Hello"}], pair),
        ([{"ask": plain[0]["messages"][:1], "say": plain[0]["messages"][1]}], pair),
        (str(tmp_path / "chats.csv"), {}),
        (str(tmp_path / "chats.parquet"), {}),
        (strange, {"role_names": {"Kunde": "user", "Agent": "assistant"}}),
    ]
    for rows, options in forms:
        assert batches_of(chats(tmp_path, rows, **options))[0]["input_ids"].tolist() == truth


def test_of_a_prompt_and_a_completion_the_completion_is_learnt(tmp_path):
    messages = conversations()[2]["messages"]
    row = {"ask": messages[:-1], "say": messages[-1:]}
    data = chats(tmp_path, [row], prompt_column="ask", completion_column="say")
    ((_, labels),) = documents_of(batches_of(data)[0])
    assert data.tokenizer.decode([x for x in labels if x != -100]) == messages[-1]["content"] + "<|im_end|>"


def test_tools_reach_the_template(tmp_path):
    tool = {"type": "function", "function": {"name": "measure", "description": "Warmth.", "parameters": {}}}
    rows = [{**conversations(1)[0], "tools": json.dumps([tool])}, {**conversations(1)[0], "tools": None}]
    template = (trl_templates() / "qwen2_5.jinja").read_text()
    data = chats(tmp_path, rows, tools_column="tools", chat_template=template, max_length=1024, windowing="documents")
    data.setup("fit")
    texts = sorted((data.row_text(row) for row in range(2)), key=len)
    assert "measure" not in texts[0]
    assert "measure" in texts[1]
    with pytest.raises(RecordError, match=r"row 0: column 'tools' should hold a list of tools"):
        chats(tmp_path, [{**rows[0], "tools": "hammer"}], tools_column="tools").setup("fit")


BAD = {
    "no assistant": ([{"role": "user", "content": "Hi"}], "no assistant's turn"),
    "unknown role": ([{"role": "alien", "content": "Hi"}], "by 'alien', but roles are .*role_names="),
    "no role": ([{"rolle": "user", "content": "Hi"}], r"message 0 of 'messages' should have the fields 'role'.*rolle"),
    "no content": ([{"role": "user"}, {"role": "assistant", "content": "Hi"}], "message 0 .* has no 'content'"),
    "number": ([{"role": "user", "content": 3}], "should hold a text, but holds int"),
    "no list": ("Hi there", "should hold a list of messages, but holds 'Hi there'"),
    "nothing": ([], "should hold a list of messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_used_is_named(tmp_path, case):
    messages, message = BAD[case]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*conversations(2), {"messages": messages}]))
    with pytest.raises(RecordError, match=f"(?s)chats.jsonl, line 3.*{message}"):
        chats(tmp_path, str(path)).setup("fit")


def test_broken_alternation_is_refused_with_the_row_and_the_templates_words(tmp_path):
    twice = [{"role": "user", "content": "Hi"}] * 2 + [{"role": "assistant", "content": "Hello"}]
    with pytest.raises(RecordError, match="the data, row 0: the chat template refuses .*take turns"):
        chats(tmp_path, [{"messages": twice}], chat_template="mistral").setup("fit")


def test_what_is_wrong_with_the_settings_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        chats(tmp_path, chat_template=None).setup("fit")
    with pytest.raises(RecordError, match=r"row 0 has no column 'talk'.*messages_column="):
        chats(tmp_path, messages_column="talk").setup("fit")
    for options, message in [
        ({"train_on": "user"}, "`train_on` must be one of 'assistant', 'last_assistant', 'all', but got 'user'"),
        ({"windowing": "wrapped"}, "`windowing` must be one of 'packed', 'documents'"),
        ({"long": "drop"}, "`long` must be one of 'cut', 'windows'"),
        ({"stride": 8}, "for long='windows'"),
        ({"stride": 512, "long": "windows"}, r"lies in 1\.\.511"),
        ({"prompt_column": "ask"}, "belong together"),
        ({"batching": "padded", "micro_batch_tokens": 99}, "rows of unequal length"),
        ({"role_names": {"Kunde": "client"}}, "`role_names` maps to .*but got 'client'"),
    ]:
        with pytest.raises(ValueError, match=message):
            chats(tmp_path, **options)
    with pytest.raises(ValueError, match="No target .* lies within max_length=8"):
        chats(tmp_path, max_length=8).setup("fit")
    open_ended = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.warns(UserWarning, match=r"turns of the assistant in the data \(train\) end with nothing"):
        chats(tmp_path, chat_template=open_ended).setup("fit")


def test_a_given_tokenizer_is_not_changed(tmp_path):
    tokenizer = byte_tokenizer()
    data = ChatDataModule(conversations(3), tokenizer, 64, chat_template="chatml", cache_dir=str(tmp_path))
    assert data.tokenizer.chat_template
    assert tokenizer.chat_template is None
