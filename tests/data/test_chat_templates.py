"""Chat templates by what they do, each in a few lines of its own: what is right, what is said, what is refused."""

import re
from datetime import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from sgpo.builders.demonstrations import solution_texts
from sgpo.data.prompt_template import PromptTemplate
from sgpo.data.prompts import PromptBuilder
from sgpo.rewards.thinking import open_thinking
from sgpo.types import ChatTurn, Problem, SgpoError

TEXTS = PromptTemplate(system=None, plain="{problem}", guided="{strategy}\n\n{problem}\n\nFollow it.")
WITH_SYSTEM = PromptTemplate(system="Put it in a Box.", plain=TEXTS.plain, guided=TEXTS.guided)
TURNS = (ChatTurn("user", "1+2?"), ChatTurn("assistant", r"<think>steps</think>\boxed{3}"))
PROBLEMS = [
    Problem("spaces", "Find x < 3 if A & B.  \n", "2", strategy="add"),
    Problem("turns", "What is Q?", "2", guidance_turns=TURNS),
]

ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
THINKS = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
HIDES_THOUGHTS = ROLES.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
DIALOG = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
DATED = "<|im_start|>system\nToday: {{ date_string or strftime_now('%d %b %Y') }}<|im_end|>\n" + ROLES + OPENS
IMAGES = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Bytes, one merge of a full stop with a line end, and special tokens."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*characters, ".Ċ"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def built(chat_template, template=TEXTS, problems=PROBLEMS, **kwargs):
    """The builder, and the texts of both prompts of each problem."""
    template = PromptTemplate(template.system, template.plain, template.guided, kwargs)
    words = tokenizer(chat_template)
    builder = PromptBuilder(words, template, max_prompt_tokens=10_000)
    pairs = builder.check_all(problems)
    return builder, [(words.decode(pair.plain), words.decode(pair.guided or ())) for pair in pairs]


@pytest.mark.parametrize(
    ("chat_template", "tail", "opening"),
    [
        (ROLES + OPENS, TAIL, ""),
        (ROLES + THINKS, TAIL + "<think>\n", "<think>\n"),
        (PHI, "<|end|>\n<|assistant|>\n", ""),
        (MISTRAL, "[/INST]", ""),
        (DIALOG, "</s>", ""),
        (ROLES.replace("m.content", "m.content | trim") + OPENS, TAIL, ""),
        ("{{ bos_token }}" + ROLES + OPENS, TAIL, ""),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}", "\nA:", ""),
        (ROLES.replace("m.content }}", "m.content }}{{ ' /no_think' if m.role == 'user' }}") + OPENS,
         " /no_think" + TAIL, ""),
        (DATED, TAIL, ""),
    ],
    ids=["chatml", "thinks", "phi", "mistral", "dialog", "trims", "bos", "merges", "suffix", "dated"],
)  # fmt: skip
def test_both_prompts_end_with_the_opening_of_the_answer(chat_template, tail, opening):
    builder, texts = built(chat_template)
    assert builder.tail_text == tail
    assert open_thinking(builder.tail_text) == opening
    for problem, (plain, guided) in zip(PROBLEMS, texts, strict=True):
        assert plain.endswith(tail)
        assert guided.endswith(tail)
        assert plain != guided
        assert problem.problem.strip() in plain
        assert problem.problem.strip() in guided
    assert tail.endswith(tokenizer(chat_template).decode(builder.tail))


def test_a_last_token_that_merges_with_the_tail_is_no_fault():
    plain_text = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    words = tokenizer(plain_text)
    builder, _ = built(plain_text, problems=[Problem("p", "Add them.", "2", strategy="no full stop")])
    pair = builder.build(Problem("p", "Add them.", "2", strategy="no full stop"))
    assert words.convert_ids_to_tokens(list(pair.plain))[-3:] == [".Ċ", "A", ":"]
    assert words.decode(builder.tail) == "A:"  # what all prompts share
    assert pair.plain[-2:] == (pair.guided or ())[-2:] == builder.tail


@pytest.mark.parametrize(
    ("chat_template", "template", "sentence"),
    [
        (ROLES, TEXTS, "no generation prompt"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", TEXTS, "no generation prompt"),
        (ROLES + OPENS + "{{ eos_token }}", TEXTS, "ends a prompt with </s>"),
        (IMAGES, TEXTS, "leaves out the user's text or changes it"),
        (ROLES.replace("m.content", "m.content | reverse") + OPENS, TEXTS, "leaves out the user's text or changes it"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + ROLES + OPENS,
         WITH_SYSTEM, r"no system here\): where it has no system role, set system: null"),
        ("{{ messages[0].content + 1 }}" + OPENS, WITH_SYSTEM, r"refuses the conversation \(.*\)\.$"),
        (MISTRAL, WITH_SYSTEM, r"roles must alternate\): where it has no system role"),
    ],
    ids=["chatml", "content", "eos", "images", "reverse", "system", "types", "alternate"],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(chat_template, template, sentence):
    with pytest.raises(SgpoError, match=sentence):
        built(chat_template, template)


@pytest.mark.parametrize(
    ("chat_template", "template", "note"),
    [
        (HIDES_THOUGHTS + OPENS, TEXTS,
         r"In 1 of 2 problems \(first 'turns'\) the guidance turn of the assistant is left out .*<think>steps"),
        (ROLES.replace("messages", "messages if m.role != 'system'") + OPENS, WITH_SYSTEM,
         r"In 2 of 2 problems .* the system turn is left out .*Put it in a Box"),
        (ROLES.replace("m.content", "m.content | lower") + OPENS, TEXTS, "the text around the problem is changed"),
        (ROLES.replace("m.content", "m.content | tojson") + OPENS, TEXTS, "the text around the problem is changed"),
        (ROLES.replace("m.content", "m.content | escape") + OPENS, TEXTS, "the text around the problem is changed"),
        ("{{ bos_token }}{{ bos_token }}" + ROLES + OPENS, TEXTS, "BOS twice"),
        (DATED, TEXTS, "writes the date into the prompt; it is always told 26 Jul 2024"),
    ],
    ids=["thoughts", "system", "lower", "json", "escape", "bos", "date"],
)  # fmt: skip
def test_what_a_template_does_to_a_text_is_said(chat_template, template, note):
    builder, _ = built(chat_template, template)
    assert len([found for found in builder.notes if re.search(note, found)]) == 1


@pytest.mark.parametrize(
    "chat_template", [ROLES + OPENS, PHI, MISTRAL, ROLES.replace("m.content", "m.content | trim") + OPENS]
)
def test_white_space_at_the_ends_is_no_loss(chat_template):
    assert built(chat_template)[0].notes == []


def test_a_problem_that_the_template_loses_is_named():
    drops = ROLES.replace("m.content", "m.content.split('###')[-1]") + OPENS
    with pytest.raises(SgpoError, match=r"'lost': its text is not in the plain prompt"):
        built(drops, problems=[Problem("whole", "What is 2?", "2"), Problem("lost", "Given ### find x", "2")])


def test_guidance_that_a_template_refuses_is_named():
    one_turn = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + ROLES + OPENS
    with pytest.raises(SgpoError, match=r"'turns', guided prompt: .*one turn only"):
        built(one_turn)


# Arguments of the template, and the clock.


def test_arguments_reach_the_template():
    assert built(ROLES + THINKS, enable_thinking=False)[0].tail_text.endswith("<think>\n\n</think>\n\n")
    assert "Today: 1 May 2025" in built(DATED, date_string="1 May 2025")[1][0][0]
    with pytest.raises(SgpoError, match=r"knows nothing of enable_thinkng: .*data\.template_kwargs"):
        built(ROLES + THINKS, enable_thinkng=False)


def test_the_date_is_the_same_every_day(monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    today = built(DATED)[1]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert built(DATED)[1] == today
    assert built(DATED, date_string="1 May 2025")[0].notes == []


# Demonstrations.


@pytest.mark.parametrize(
    ("tail", "solution", "text"),
    [
        (TAIL, "<think>\na\n</think>\n2", ...),
        (TAIL, "a 2", ...),
        (TAIL + "<think>\n", "<think>\na\n</think>\n2", "a\n</think>\n2"),
        (TAIL + "<think>\n", "\n <think> a</think>2", "a</think>2"),
        (TAIL + "<think>\n", "a</think>2", ...),
        (TAIL + "<think>", "<think>\na</think>2", "\na</think>2"),
        (TAIL + "[THINK]", "[THINK]a[/THINK]2", "a[/THINK]2"),
        (TAIL + "<think>\n\n</think>\n\n", "2", ...),
        (TAIL + "<think>\n\n</think>\n\n", "<think></think>2", "2"),
        (TAIL + "</think>", "2", ...),
    ],
)
def test_a_demonstration_goes_on_where_the_prompt_ends(tail, solution, text):
    problem = Problem("p", "q", "2", solution=solution)
    assert solution_texts("rows", [problem], tail) == [solution if text is ... else text]


@pytest.mark.parametrize(
    ("tail", "solution", "complaint"),
    [
        (TAIL + "<think>\n", "1+1=2", "opens thinking with '<think>', which the solution does not end"),
        (TAIL + "<think>\n", "<think>cut off", "which the solution does not end"),
        (TAIL + "<think>\n", "<reasoning>a</reasoning>2", "which the solution does not end"),
        (TAIL + "<think>\n\n</think>\n\n", "<think>a</think>2", "begins with thoughts, which the template has closed"),
        (TAIL + "</think>", "<think>a</think>2", "begins with thoughts, which the template has closed"),
    ],
)
def test_a_demonstration_that_contradicts_the_template_is_refused(tail, solution, complaint):
    with pytest.raises(SgpoError) as caught:
        solution_texts("rows", [Problem("p", "q", "2", solution=solution, place="rows:7")], tail)
    assert "rows: 1 solutions do not go with the model's chat template" in str(caught.value)
    assert "rows:7: " in str(caught.value)
    assert complaint in str(caught.value)
