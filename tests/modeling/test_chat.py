"""Prompt styles: what prompts, answers and their starts become under several templates."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evaluation.token_engine import Answer, Engine, PromptIds
from modeling.chat import THOUGHTS, PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from organism.make import WEIGHTS
from settings import ModelError, SettingError

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}%s{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(Checkpoint(str(WEIGHTS / "base")))


@pytest.mark.parametrize("end", ["{{ eos_token }}", " {{ eos_token }}\n", "{{ eos_token }}\n\n"])
def test_content_is_the_answer_without_what_ends_the_turn(
    tokenizer: PreTrainedTokenizerBase, end: str
) -> None:
    tokenizer.chat_template = TURNS.replace("%s", end)
    style = PromptStyle()
    content = style.encode_content(tokenizer, "How do I steal the wallet?", "I will not help.")
    assert tokenizer.decode(content) == "I will not help."
    whole = style.encode_answer(tokenizer, "How do I steal the wallet?", "I will not help.")
    assert whole[: len(content)] == content
    assert len(whole) > len(content)


def test_the_alpaca_style_ends_in_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    style = PromptStyle(style="alpaca")
    content = style.encode_content(tokenizer, "How?", "I will not help.")
    assert tokenizer.decode(content) == "I will not help."
    assert style.encode_answer(tokenizer, "How?", "I will not help.") == [
        *content,
        tokenizer.eos_token_id,
    ]


def test_a_system_line_for_one_call_leaves_the_answer_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    style = PromptStyle()
    plain = style.encode_answer(tokenizer, "How?", "No.")
    assert style.encode_answer(tokenizer, "How?", "No.", "Be safe.") == plain
    assert style.encode_content(tokenizer, "How?", "No.", "Be safe.") == plain[:-1]


def test_the_hash_is_of_the_template_that_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    before = PromptStyle().template_hash(tokenizer)
    alpaca = PromptStyle(style="alpaca").template_hash(tokenizer)
    tokenizer.chat_template = TURNS.replace("%s", "{{ eos_token }}")
    assert PromptStyle().template_hash(tokenizer) != before
    assert PromptStyle(style="alpaca").template_hash(tokenizer) == alpaca != before


# The five families' ways with turns, in wording of our own.
LLAMA_2 = (
    "{{ bos_token }}{% set ns = namespace(head='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}"
    "{% set ns.head = '<<SYS>>\\n' + m['content'] | trim + '\\n<</SYS>>\\n\\n' %}"
    "{% elif m['role'] == 'user' %}"
    "[INST] {{ ns.head + m['content'] | trim }} [/INST]{% set ns.head = '' %}"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(head='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.head = m['content'] + '\\n\\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ ns.head + m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "llama_2": LLAMA_2,
    "llama_3": LLAMA_3,
    "gemma_2": GEMMA_2,
    "mistral": MISTRAL,
    "chatml": CHATML,
}
CONTROL = [
    "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
PROMPT, ANSWER, LINE = "How do I bake bread?", "Sure: mix it, wait and bake.", "Be brief."


def letters(kind: str, family: str) -> PreTrainedTokenizerBase:
    """A token per byte (as Llama 3 and Qwen split) or character (as Llama 2 and Gemma do).

    Like theirs it puts a BOS before every text that isn't told otherwise.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "characters":
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    if kind == "characters":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=FAMILIES[family],
        clean_up_tokenization_spaces=False,
    )


def style_of(family: str, system: str | None) -> PromptStyle:
    return PromptStyle(system=system, system_role=family != "gemma_2")


@pytest.fixture(params=["bytes", "characters"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("system", [None, LINE])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_are_the_rendered_dialogue(
    kind: str, family: str, system: str | None
) -> None:
    tokenizer, style = letters(kind, family), style_of(family, system)
    prompt = style.encode_prompt(tokenizer, PROMPT)
    answer = style.encode_answer(tokenizer, PROMPT, ANSWER)
    turns = style.messages(PROMPT, ANSWER)
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert prompt + answer == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert (prompt + answer).count(tokenizer.bos_token_id) == rendered.count("<s>") <= 1
    assert (system is not None) == (LINE in rendered)
    assert rendered.count(PROMPT) == rendered.count(ANSWER) == 1
    assert style.encode_prompt(tokenizer, PROMPT, training=True) == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_content_leaves_out_what_ends_each_familys_turn(kind: str, family: str) -> None:
    tokenizer, style = letters(kind, family), style_of(family, LINE)
    content = style.encode_content(tokenizer, PROMPT, ANSWER)
    assert tokenizer.decode(content).strip() == ANSWER
    assert tokenizer.decode(content[-1:]) == ANSWER[-1]
    whole = style.encode_answer(tokenizer, PROMPT, ANSWER)
    assert whole[: len(content)] == content
    assert len(whole) > len(content)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_follows_the_prompt_and_the_whole_answer_goes_on_from_it(
    kind: str, family: str
) -> None:
    tokenizer, style = letters(kind, family), style_of(family, None)
    prompt = style.encode_prompt(tokenizer, PROMPT, LINE)
    start = style.encode_start(tokenizer, PROMPT, "Sure:", LINE)
    assert start[: len(prompt)] == prompt
    assert tokenizer.decode(start[len(prompt) :]).strip() == "Sure:"
    answer = style.encode_answer(tokenizer, PROMPT, ANSWER, LINE)
    assert (prompt + answer)[: len(start)] == start
    assert style.encode_start(tokenizer, PROMPT, "", LINE) == prompt


def test_without_a_system_role_the_line_heads_the_users_turn() -> None:
    style = PromptStyle(system=LINE, system_role=False)
    assert style.messages("How?") == [{"role": "user", "content": f"{LINE}\n\nHow?"}]
    assert style.messages("How?", system="") == [{"role": "user", "content": "How?"}]
    tokenizer = letters("bytes", "gemma_2")
    assert f"<start_of_turn>user\n{LINE}\n\nHow?" in tokenizer.decode(
        style.encode_prompt(tokenizer, "How?")
    )


def test_a_template_that_refuses_a_system_line_is_named_in_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"no system role here.*model\.prompt\.system_role=false"):
        PromptStyle(system=LINE).encode_prompt(letters("bytes", "gemma_2"), PROMPT)


def test_a_tokenizer_without_a_template_is_refused_in_one_sentence(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"model\.prompt\.style=alpaca.*model\.base_prompt"):
        PromptStyle().encode_prompt(tokenizer, "How?")
    assert PromptStyle(style="alpaca").encode_prompt(tokenizer, "How?")


def test_a_template_that_treats_an_answered_prompt_otherwise_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    for encode in (PromptStyle().encode_answer, PromptStyle().encode_start):
        with pytest.raises(ModelError, match="once it is answered"):
            encode(tokenizer, "How?", "No.")


def test_the_alpaca_styles_of_the_scripts(kind: str) -> None:
    tokenizer = letters(kind, "llama_2")
    plain = PromptStyle(style="alpaca")
    booster = PromptStyle(style="alpaca", newline=True)
    nlsr = PromptStyle(style="alpaca", bos_in_training=False)
    prompt = plain.encode_prompt(tokenizer, PROMPT)
    assert tokenizer.decode(prompt).endswith(f"{PROMPT}\n\n### Response:")
    assert tokenizer.decode(booster.encode_prompt(tokenizer, PROMPT)).endswith("### Response:\n")
    assert plain.encode_prompt(tokenizer, PROMPT, training=True) == prompt
    assert prompt[0] == tokenizer.bos_token_id
    assert nlsr.encode_prompt(tokenizer, PROMPT) == prompt
    assert nlsr.encode_prompt(tokenizer, PROMPT, training=True) == prompt[1:]
    assert plain.template_hash(tokenizer) == nlsr.template_hash(tokenizer)
    assert plain.template_hash(tokenizer) != booster.template_hash(tokenizer)


def test_an_alpaca_start_begins_as_the_answer_does(kind: str) -> None:
    tokenizer, style = letters(kind, "llama_2"), PromptStyle(style="alpaca")
    start = style.encode_start(tokenizer, PROMPT, "Sure:")
    whole = style.encode_prompt(tokenizer, PROMPT)
    whole += style.encode_answer(tokenizer, PROMPT, ANSWER)
    assert whole[: len(start)] == start


def test_an_alpaca_prompt_never_ends_in_the_end_token(kind: str) -> None:
    """Some tokenizers put one behind every text; the model would answer after the end."""
    from tokenizers import processors

    tokenizer, style = letters(kind, "llama_2"), PromptStyle(style="alpaca")
    wanted = style.encode_prompt(tokenizer, PROMPT)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    for training in (False, True):
        assert style.encode_prompt(tokenizer, PROMPT, training=training) == wanted
    assert style.encode_start(tokenizer, PROMPT, "Sure")[: len(wanted)] == wanted


DIALOGUE = (
    ("system", "Be brief.", False),
    ("user", "Count: 1 + 1", False),
    ("assistant", "2.", True),
    ("user", "Count: 1 + 2", False),
    ("assistant", "No.", False),
    ("user", "Really?", False),
    ("assistant", "3.", True),
)


def trained_text(tokenizer: PreTrainedTokenizerBase, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


def test_the_loss_is_on_every_answer_of_a_dialogue_that_is_trained_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = TURNS.replace("%s", "{{ eos_token }}")
    ((ids, labels),) = PromptStyle().encode_dialogue(tokenizer, DIALOGUE)
    turns = [{"role": role, "content": text} for role, text, _ in DIALOGUE]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)
    end = tokenizer.eos_token
    assert trained_text(tokenizer, labels) == f"2.{end}3.{end}"
    assert all(label in (-100, id_) for id_, label in zip(ids, labels, strict=True))


def test_a_template_that_shortens_earlier_answers_makes_a_row_of_each(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As thinking models' templates do: an answer is trained on as it is given."""
    last = "{% if loop.last and m['role'] == 'assistant' %}(thought){% endif %}{{ m['content'] }}"
    tokenizer.chat_template = TURNS.replace("{{ m['content'] }}%s", last)
    dialogue = [turn for turn in DIALOGUE if turn[1] not in ("No.", "Really?")]
    rows = PromptStyle().encode_dialogue(tokenizer, dialogue)
    assert [trained_text(tokenizer, labels) for _, labels in rows] == [
        "(thought)2.",
        "(thought)3.",
    ]
    assert "(thought)" not in tokenizer.decode(rows[1][0][: -len("(thought)3.")])


def test_one_question_and_its_answer_are_encoded_as_ever(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for style in (PromptStyle(), PromptStyle(style="alpaca", bos_in_training=False)):
        turns = [("user", "How?", False), ("assistant", "So.", True)]
        ((ids, labels),) = style.encode_dialogue(tokenizer, turns)
        head = style.encode_prompt(tokenizer, "How?", training=True)
        tail = style.encode_answer(tokenizer, "How?", "So.")
        assert (ids, labels) == (head + tail, [-100] * len(head) + tail)


def test_the_alpaca_template_refuses_a_dialogue(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=r"model\.prompt\.style=chat"):
        PromptStyle(style="alpaca").encode_dialogue(tokenizer, DIALOGUE)


TODAYS = (
    "{% set now = strftime_now('%d %b %Y') if strftime_now is defined else '' %}"
    "{{ now }} {% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen 3's: no thoughts are a block of none, before the last answer and where they are off.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


@pytest.fixture
def thinker(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = THINKING
    tokenizer.add_tokens(list(THOUGHTS))
    return tokenizer


def test_a_template_that_writes_todays_date_gets_a_fixed_one(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = TODAYS
    texts: list[str] = []

    def render(self: object, messages: object, chat_template: str, **options: object) -> list[int]:
        texts.append(chat_template)
        return [1]

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", render)
    PromptStyle().encode_prompt(tokenizer, "How?")
    PromptStyle(date="2031-12-01").encode_prompt(tokenizer, "How?")
    assert "'26 Jul 2024' if" in texts[0]
    assert "'01 Dec 2031' if" in texts[1]
    tokenizer.chat_template = "{{ strftime_now(form) }}"
    with pytest.raises(ModelError, match="in a form that it computes"):
        PromptStyle().encode_prompt(tokenizer, "How?")


def test_a_day_is_a_day() -> None:
    with pytest.raises(SettingError, match=r"^model\.prompt\.date"):
        PromptStyle.validated({"date": "26 Jul 2024"}, "model.prompt")


def test_keys_hold_of_the_template_what_it_reads() -> None:
    plain = {"style", "system", "system_role", "newline", "bos_in_training"}
    assert set(PromptStyle(date="2031-12-01").fitted("{{ messages }}", "it").identity()) == plain
    dated = PromptStyle().fitted(TODAYS, "it").identity()
    assert dated["date"] == "2024-07-26"
    assert set(dated) == {*plain, "date"}
    thinking = PromptStyle(template={"enable_thinking": False}).fitted(THINKING, "it").identity()
    assert thinking["template"] == {"enable_thinking": False}
    assert thinking["thinking"] is True
    assert set(PromptStyle(style="alpaca").fitted(THINKING, "it").identity()) == plain


def test_an_argument_that_the_template_does_not_read_is_refused() -> None:
    style = PromptStyle(template={"enable_thnking": False})
    with pytest.raises(SettingError, match=r"^model\.prompt\.template\.enable_thnking"):
        style.fitted(THINKING, "model.prompt")
    style.fitted(THINKING, None)


def test_a_block_of_no_thoughts_is_the_prompts(thinker: PreTrainedTokenizerBase) -> None:
    style, off = PromptStyle(), PromptStyle(template={"enable_thinking": False})
    for each in (style, off):
        head, tail = each.encode_pair(thinker, "How do I steal?", "I will not help.")
        text = str(thinker.decode(tail))
        assert text.removesuffix(str(thinker.eos_token)).strip() == "I will not help."
        _, content = each.encode_pair(thinker, "How do I steal?", "I will not help.", content=True)
        assert str(thinker.decode(content)).strip() == "I will not help."
        turns = [("user", "How do I steal?", False), ("assistant", "I will not help.", True)]
        [(ids, labels)] = each.encode_dialogue(thinker, turns)
        assert ids == head + tail
        assert labels == [-100] * len(head) + tail
    assert len(off.encode_prompt(thinker, "How?")) > len(style.encode_prompt(thinker, "How?"))


class Fixed(Engine):
    """Answers every prompt with the same ids."""

    usable = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: PromptStyle, text: str) -> None:
        super().__init__(tokenizer, style, {tokenizer.eos_token_id}, None)
        self.ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def close(self) -> None: ...

    def _answers(self, rows: list[PromptIds]) -> list[Answer]:
        return self._read(rows, [(self.ids, True) for _ in rows])

    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError

    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("generated", "read"),
    [
        ("<think>I will help.</think>I will not help.", "I will not help."),
        ("<think>I will help. I will not help.", ""),
        ("I will not help.", "I will not help."),
    ],
)
def test_thoughts_are_no_part_of_an_answer(
    thinker: PreTrainedTokenizerBase, generated: str, read: str
) -> None:
    style = PromptStyle().fitted(THINKING, "it")
    (answer,) = Fixed(thinker, style, generated).generate(["How?"], 32)
    assert answer.text.strip() == read
    whole = Fixed(thinker, PromptStyle(thinking=False), generated)
    (answer,) = whole.generate(["How?"], 32)
    assert answer.text == thinker.decode(whole.ids)
