"""PreferenceDataModule: both answers behind the same prompt, labels on the answers alone."""

import json

import pytest
import torch
from chat_tokenizers import trl_templates
from chat_training import chats, train

from lightning_llm.datamodules import PreferenceDataModule
from lightning_llm.datamodules.examples.chat_tokens import EncodedChat
from lightning_llm.datamodules.examples.preference_pairs import fit_pair
from lightning_llm.datamodules.examples.records import RecordError

ROWS = [
    {"prompt": f"Question {n}?" + "x" * n, "chosen": f"Yes \u00e4{n}.", "rejected": "No" + "!" * (3 * n % 7)}
    for n in range(9)
]


def preferences(folder, rows=None, **options):
    defaults = {"chat_template": "chatml", "max_length": 200, "micro_batch_size": 4, "validation_fraction": 0.0}
    rows = ROWS if rows is None else rows
    return PreferenceDataModule(rows, "bytes", cache_dir=str(folder / "cache"), **{**defaults, **options})


def pairs_of(data):
    """(prompt and answer, answer) of both sides of each pair, as text."""
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        for row in range(len(batch["row_ids"])):
            pair = []
            for side in ("chosen", "rejected"):
                length = int(batch[f"{side}_attention_mask"][row].sum())
                ids, labels = batch[f"{side}_input_ids"][row], batch[f"{side}_labels"][row]
                assert (labels[length:] == -100).all()
                assert ((labels == ids) | (labels == -100)).all()
                pair += [data.tokenizer.decode(ids[:length]), data.tokenizer.decode(labels[labels != -100])]
            found.append(tuple(pair))
    return sorted(found)


def chatml(prompt, answer):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n", f"{answer}<|im_end|>"


def as_messages(text, role):
    return [{"role": role, "content": text}]


EXPECTED = sorted((*chatml(row["prompt"], row["chosen"]), *chatml(row["prompt"], row["rejected"])) for row in ROWS)


@pytest.mark.parametrize("form", ["texts", "messages", "whole conversations", "json"])
def test_labels_stand_on_the_answers_in_every_form(tmp_path, form):
    rows, options = ROWS, {}
    if form != "texts":
        rows = [
            {
                "prompt": as_messages(row["prompt"], "user"),
                **{side: as_messages(row[side], "assistant") for side in ("chosen", "rejected")},
            }
            for row in ROWS
        ]
    if form == "whole conversations":
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
        options = {"prompt_column": None}
    if form == "json":
        rows = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    assert pairs_of(preferences(tmp_path, rows, **options)) == EXPECTED


def test_plain_texts_stand_as_they_are_and_end(tmp_path):
    found = pairs_of(preferences(tmp_path, ROWS, texts="plain", chat_template=None))
    end = "<|endoftext|>"
    expected = sorted(
        (
            f"{r['prompt']}{r['chosen']}{end}",
            f"{r['chosen']}{end}",
            f"{r['prompt']}{r['rejected']}{end}",
            f"{r['rejected']}{end}",
        )
        for r in ROWS
    )
    assert found == expected


def test_turns_of_the_prompt_are_no_targets_and_real_templates_work(tmp_path):
    prompt = [
        *as_messages("Hi", "user"),
        *as_messages("Hello", "assistant"),
        *as_messages("How are you?", "user"),
    ]
    row = {
        "prompt": prompt,
        "chosen": as_messages("Fine.", "assistant"),
        "rejected": as_messages("So so.", "assistant"),
    }
    for name in ("qwen2_5", "qwen3"):
        template = (trl_templates() / f"{name}.jinja").read_text()
        ((_, chosen, _, rejected),) = pairs_of(preferences(tmp_path, [row], chat_template=template, max_length=400))
        thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
        assert (chosen, rejected) == (f"{thought}Fine.<|im_end|>", f"{thought}So so.<|im_end|>")


def test_long_pairs_lose_the_beginning_of_their_prompt_and_keep_their_answers(tmp_path):
    with pytest.warns(UserWarning, match=r"of 9 rows .* longer than max_length=66, .* Prompts lose their beginnings"):
        found = pairs_of(preferences(tmp_path, max_length=66))
    whole = {(chosen, rejected): (a, b) for a, chosen, b, rejected in EXPECTED}
    assert len(found) == len(ROWS)
    for one, chosen, other, rejected in found:
        own, others = whole[chosen, rejected]  # the answers are whole
        assert own.endswith(one)
        assert others.endswith(other)
        assert len(own) - len(one) == len(others) - len(other)  # and the prompts cut alike
        assert max(len(one.encode()), len(other.encode())) <= 66


def test_pairs_keep_what_begins_every_text_and_a_token_before_the_answer():
    def side(*answer):
        ids = torch.tensor([1, 11, 12, 13, 14, *answer]).numpy()
        labels = ids.copy()
        labels[:5] = -100
        return EncodedChat(ids, labels)

    one, other, num_cut = fit_pair(side(21, 22), side(31), 5, bos_token_id=1)
    assert one.input_ids.tolist() == [1, 13, 14, 21, 22]
    assert other.input_ids.tolist() == [1, 13, 14, 31]
    assert num_cut == 4
    one, other, num_cut = fit_pair(side(*range(21, 29)), side(31), 5, bos_token_id=1)
    assert one.labels.tolist() == [-100, -100, 21, 22, 23]
    assert other.labels.tolist() == [-100, -100, 31]
    assert num_cut == 8 + 3
    one, _, num_cut = fit_pair(side(21, 22), side(31), 7)
    assert num_cut == 0
    assert len(one.input_ids) == 7


def test_pairs_without_a_preference_are_left_out_with_a_warning(tmp_path):
    same = {**ROWS[0], "rejected": ROWS[0]["chosen"]}
    data = preferences(tmp_path, [*ROWS, same, same])
    with pytest.warns(
        UserWarning, match="2 rows of the data have the same answer twice.* the first is the data, row 9"
    ):
        found = pairs_of(data)
    assert found == EXPECTED
    assert data.row_name(8) == "the data, row 8"
    with pytest.raises(ValueError, match="No row of the data can be used; 2 were read. Each has the same answer twice"):
        preferences(tmp_path, [same, same]).setup("fit")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({**ROWS[0], "rejected": ""}, {}, "row 1: column 'rejected' holds no answer"),
        ({**ROWS[0], "chosen": as_messages(" ", "assistant")}, {}, "row 1: column 'chosen' holds no answer"),
        ({**ROWS[0], "chosen": as_messages("Hm", "user")}, {}, "row 1: column 'chosen' holds no answer"),
        ({**ROWS[0], "chosen": None}, {}, "row 1: column 'chosen' should hold a list of messages"),
        (
            {**ROWS[0], "chosen": ""},
            {"texts": "plain", "chat_template": None},
            "row 1: column 'chosen' should hold a text",
        ),
        (
            {**ROWS[0], "ref_chosen_logps": "?"},
            {"reference_logps": True},
            "row 1: column 'ref_chosen_logps' should hold a number",
        ),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tmp_path, row, options, message):
    first = {**ROWS[1], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(RecordError, match=message):
        preferences(tmp_path, [first, row], **options).setup("fit")


def test_a_missing_column_and_wrong_settings_are_said(tmp_path):
    with pytest.raises(RecordError, match="has no column 'prompt'.*prompt_column="):
        preferences(tmp_path, [{"chosen": "a", "rejected": "b"}]).setup("fit")
    with pytest.raises(RecordError, match=r"'ref_chosen_logps' and .*prompt_column=..., .*, rejected_column=....$"):
        preferences(tmp_path, reference_logps=True).setup("fit")
    with pytest.raises(ValueError, match="texts='plain' needs the column of the prompts and no chat template"):
        preferences(tmp_path, texts="plain")
    with pytest.raises(ValueError, match="`texts` must be 'chat' or 'plain'"):
        preferences(tmp_path, texts="raw")
    with pytest.raises(ValueError, match="has no chat template"):
        preferences(tmp_path, chat_template=None).setup("fit")
    with pytest.raises(ValueError, match="padding_free"):
        preferences(tmp_path, batching="padding_free", micro_batch_tokens=100)


def test_the_references_log_probabilities_go_into_batches(tmp_path):
    rows = [{**row, "ref_chosen_logps": -n - 0.5, "ref_rejected_logps": 2.0 * n} for n, row in enumerate(ROWS)]
    data = preferences(tmp_path, rows, reference_logps=True, shuffle=False, micro_batch_size=9)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["ref_chosen_logps"].tolist() == [-n - 0.5 for n in range(9)]
    assert batch["ref_rejected_logps"].tolist() == [2.0 * n for n in range(9)]


def test_budgets_count_both_sides_as_wide_as_the_longer(tmp_path):
    data = preferences(tmp_path, batching="padded", micro_batch_tokens=500, micro_batch_size=8)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) > 1
    for batch in batches:
        width = max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
        assert 2 * width * len(batch["row_ids"]) <= 500
    assert sorted(row for batch in batches for row in batch["row_ids"].tolist() if row >= 0) == list(range(9))


def test_an_empty_pair_has_no_target(tmp_path):
    data = preferences(tmp_path)
    data.setup("fit")
    batch = data._dataset("train")[[0, -1]]
    for side in ("chosen", "rejected"):
        assert (batch[f"{side}_labels"][1] == -100).all()
        assert (batch[f"{side}_labels"][0] != -100).any()


def test_prompts_and_answers_are_encoded_as_chats_are(tmp_path):
    """The chosen side of a pair is a row of ChatDataModule with that completion."""
    pair = preferences(tmp_path, ROWS[:1])
    pair.setup("fit")
    (batch,) = pair.train_dataloader()
    chat = chats(tmp_path, ROWS[:1], prompt_column="prompt", completion_column="chosen", windowing="documents")
    chat.setup("fit")
    (other,) = chat.train_dataloader()
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[f"chosen_{name}"], other[name])


def test_how_a_global_batch_of_pairs_is_cut_does_not_change_the_weights(tmp_path):
    rows = ROWS * 2
    steps, weights = train(tmp_path, preferences(tmp_path, rows, global_batch_size=6), task="dpo", steps=4)
    again = preferences(tmp_path, rows, global_batch_size=6)
    cut_steps, cut = train(tmp_path, again, task="dpo", steps=4, accumulate=4)
    assert {step: sorted(rows) for step, rows in steps.items()} == {s: sorted(rows) for s, rows in cut_steps.items()}
    assert float((weights - cut).norm()) <= 1e-12 * float(weights.norm())
    _, other = train(tmp_path, preferences(tmp_path, rows, global_batch_size=6, seed=1), task="dpo", steps=4)
    assert float((weights - other).norm()) > 1e-9 * float(weights.norm())
