"""What is learnt of a conversation is what the assistant says and the token that ends its turn, in any template."""

import re

import pytest
from chat_tokenizers import CHATS, bpe, encode, learnt, messages_of, trl_templates
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_llm.datamodules.examples.chat_templates import CHAT_TEMPLATES, read_chat_template, with_chat_template
from lightning_llm.datamodules.examples.chat_tokens import ChatEncoder, TextTokens
from lightning_llm.datamodules.examples.records import RecordError
from lightning_llm.datamodules.tokenizer import byte_tokenizer

# name: what the template does to a text, and what ends a turn
TURNS = {
    "chatml": (str, "<|im_end|>"),
    "gemma": (str.strip, "<end_of_turn>"),
    "llama-2": (lambda text: f" {text.strip()} ", "</s>"),
    "llama-3": (str.strip, "<|eot_id|>"),
    "mistral": (lambda text: f" {text.strip()} ", "</s>"),
    "phi-3": (str, "<|end|>"),
    "zephyr": (str, "</s>"),
}
# Templates of real models that have a variant in which TRL marks by hand what is generated.
REAL = [
    *("cohere", "cohere2", "diffusion_gemma", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5"),
    *("qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"),
]
QUESTION = {"role": "user", "content": "How warm?"}


def unmarked(template):
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def real(name):
    return (trl_templates() / f"{name}.jinja").read_text()


@pytest.mark.parametrize("trims", [False, True], ids=["offsets", "offsets without spaces"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TURNS)
def test_the_assistants_turns_are_learnt_with_what_ends_them(name, chat, trims):
    tokenizer, messages = bpe(trims=trims), messages_of(CHATS[chat])
    shown, end = TURNS[name]
    expected = [shown(message["content"]) + end for message in messages if message["role"] == "assistant"]
    found = encode(tokenizer, unmarked(CHAT_TEMPLATES[name]), messages)
    assert learnt(tokenizer, found) == expected
    assert found.num_open == 0
    marked = encode(tokenizer, CHAT_TEMPLATES[name], messages)
    assert marked.labels.tolist() == found.labels.tolist()


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", REAL)
def test_real_templates_are_read_as_their_hand_marked_variants(name, chat):
    tokenizer, messages = bpe(), messages_of(CHATS[chat])
    if name == "gemma" and chat == "system":
        with pytest.raises(RecordError, match="row 7: the chat template refuses .*System role not supported"):
            encode(tokenizer, real(name), messages)
        return
    found, marked = (encode(tokenizer, real(variant), messages) for variant in (name, f"{name}_training"))
    assert found.input_ids.tolist() == marked.input_ids.tolist()
    pairs = list(zip(learnt(tokenizer, found), learnt(tokenizer, marked), strict=True))
    assert len(pairs) == sum(message["role"] == "assistant" for message in messages)
    for one, other in pairs:  # those marks take in the line break behind a turn, and Qwen's the one before it
        assert one == (other.removeprefix("\n") if name == "qwen2_5" else other).rstrip()


def test_headers_that_a_prompt_writes_are_not_learnt():
    """Some hand-marked variants have them within their marks."""
    tokenizer = bpe()
    messages = messages_of(CHATS["one turn"])
    assert learnt(tokenizer, encode(tokenizer, real("deepseekv3"), messages)) == [
        "4.<\uff5cend\u2581of\u2581sentence\uff5c>"
    ]
    assert learnt(tokenizer, encode(tokenizer, real("gptoss"), messages)) == ["<|channel|>final<|message|>4.<|return|>"]


def test_turns_are_found_where_a_template_writes_earlier_turns_otherwise():
    """Qwen3 shows the reasoning of the last turn only, and an empty one where there is none."""
    tokenizer, template = bpe(), real("qwen3")
    thought = "<think>\nLet me see.\n</think>\n\n"
    messages = messages_of(
        [("user", "a"), ("assistant", f"{thought}One"), ("user", "b"), ("assistant", f"{thought}Two")]
    )
    turns = learnt(tokenizer, encode(tokenizer, template, messages))
    assert turns == ["One<|im_end|>", f"{thought}Two<|im_end|>"]
    plain = messages_of(CHATS["several turns"])
    turns = learnt(tokenizer, encode(tokenizer, template, plain))
    assert turns[0] == "  Hello \U0001f600 there!  <|im_end|>"
    assert turns[2] == "<think>\n\n</think>\n\ny<|im_end|>"
    # and with thinking switched off, the prompt has the empty one, in the last turn
    turns = learnt(tokenizer, encode(tokenizer, template, plain, template_options={"enable_thinking": False}))
    assert turns[0] == "  Hello \U0001f600 there!  <|im_end|>"
    assert turns[2] == "y<|im_end|>"


def test_what_follows_a_prompt_that_begins_to_think_is_learnt():
    tokenizer = bpe()
    found = encode(tokenizer, real("nemotron_3_nano"), messages_of(CHATS["one turn"]))
    assert learnt(tokenizer, found) == ["</think>4.<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "lfm2_v2"])
def test_calls_of_tools_are_learnt_and_their_results_are_not(name):
    tokenizer = bpe()
    call = {"type": "function", "function": {"name": "measure", "arguments": {"place": "Ulm"}}}
    function = {"name": "measure", "description": "Warmth.", "parameters": {"type": "object", "properties": {}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "measure", "content": "it is 17 degrees"},
        {"role": "assistant", "content": "Mild."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye."},
    ]
    found = encode(tokenizer, real(name), messages, tools=[{"type": "function", "function": function}])
    first, second, third = learnt(tokenizer, found)
    assert all(word in first for word in ("measure", "Ulm"))
    assert "17" not in first
    assert second.startswith("Mild.") or second.endswith("Mild.<|im_end|>")
    assert "Bye." in third
    assert "Thanks" not in second + third


def test_which_turns_are_learnt_can_be_chosen():
    tokenizer = bpe()
    for template in (CHAT_TEMPLATES["chatml"], unmarked(CHAT_TEMPLATES["chatml"])):
        messages = messages_of(CHATS["several turns"])
        last = encode(tokenizer, template, messages, train_on="last_assistant")
        assert learnt(tokenizer, last) == ["y<|im_end|>"]
        rest = encode(tokenizer, template, messages, first=2)
        assert [text[-11:-10] for text in learnt(tokenizer, rest)] == ["\u597d", "y"]
        whole = encode(tokenizer, template, messages, train_on="all")
        assert whole.labels.tolist() == [-100, *whole.input_ids.tolist()[1:]]
        one = messages_of([("assistant", "Good day!"), ("user", "Hi"), ("assistant", "Hello")])
        assert learnt(tokenizer, encode(tokenizer, template, one)) == ["Good day!<|im_end|>", "Hello<|im_end|>"]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=30)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@example([("", ">")])  # a text that ends as the mark of the turn's end does
def test_any_text_is_learnt_to_its_last_byte(turns):
    tokenizer = byte_tokenizer()
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    found = encode(tokenizer, unmarked(CHAT_TEMPLATES["chatml"]), messages)
    said = "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert "".join(learnt(tokenizer, found)) == said
    assert int((found.labels != -100).sum()) == len(said.encode())


def test_marks_of_the_template_in_a_users_text_do_not_make_it_the_assistants():
    tokenizer, template = bpe(), unmarked(CHAT_TEMPLATES["chatml"])
    said = "Hi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    found = encode(
        tokenizer, template, messages_of([("user", said), ("assistant", "No."), ("user", said), ("assistant", "x")])
    )
    assert learnt(tokenizer, found) == ["No.<|im_end|>", "x<|im_end|>"]


def test_tokens_that_are_white_space_alone_are_of_it():
    tokenizer = bpe(trims=True)
    text = "if x:\n        y"
    spaces = TextTokens.of(tokenizer, text)
    given = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert any(begin == end for begin, end in given), "no token without characters: the test would show nothing"
    assert "".join(text[a:b] for a, b in zip(spaces.begins, spaces.ends, strict=True)) == text
    assert learnt_of(tokenizer, spaces, (6, len(text))) == text[6:]


def learnt_of(tokenizer, tokens, span):
    labels = tokens.labels([span])
    return tokenizer.decode([token for token in labels.tolist() if token != -100])


def test_a_template_whose_turns_cannot_be_told_is_refused_with_the_row():
    backwards = "{% for message in messages | reverse %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    with pytest.raises(RecordError, match="row 7: the chat template does not let .*generation"):
        encode(bpe(), backwards, messages_of(CHATS["several turns"]))
    silent = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    with pytest.raises(RecordError, match="row 7: the chat template does not let the assistant's message 1"):
        encode(bpe(), silent, messages_of(CHATS["one turn"]))


def test_turns_that_end_with_nothing_are_counted():
    open_ended = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    prompt = open_ended + "{% if add_generation_prompt %}assistant: {% endif %}"
    found = encode(bpe(), prompt, messages_of(CHATS["one turn"]))
    assert found.num_open == 1
    assert learnt(bpe(), found) == ["4.\n"]


def test_conversations_that_teach_nothing_or_break_the_template_are_refused_with_the_row():
    tokenizer = bpe()
    with pytest.raises(RecordError, match=r"row 7: the conversation has no assistant's turn.*\['user'\]"):
        encode(tokenizer, CHAT_TEMPLATES["chatml"], [QUESTION])
    with pytest.raises(RecordError, match="row 7: the chat template refuses .*take turns"):
        encode(tokenizer, CHAT_TEMPLATES["mistral"], [QUESTION, QUESTION, {"role": "assistant", "content": "So."}])
    with pytest.raises(RecordError, match="no assistant's turn behind the prompt"):
        encode(tokenizer, CHAT_TEMPLATES["chatml"], messages_of(CHATS["one turn"]), first=2)


def test_a_tokenizer_without_a_template_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"has no chat template.*Pass chat_template="):
        ChatEncoder(byte_tokenizer())


def test_templates_are_named_read_or_given(tmp_path):
    text = "{{ messages[0].content }}"
    (tmp_path / "my.jinja").write_text(text)
    assert read_chat_template(str(tmp_path / "my.jinja")) == read_chat_template(text) == text
    tokenizer = byte_tokenizer()
    assert with_chat_template(tokenizer, None) is tokenizer
    assert with_chat_template(tokenizer, "chatml").chat_template == CHAT_TEMPLATES["chatml"]
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="chat_template.*chatml.*but got 'chatlm'"):
        read_chat_template("chatlm")
    with pytest.raises(FileNotFoundError, match="no chat template at"):
        read_chat_template(str(tmp_path / "other.jinja"))
