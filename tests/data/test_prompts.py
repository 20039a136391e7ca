"""Prompts: literal templates, equal chat tails, limits, and the ids that end a completion."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgpo.data.prompts import PromptBuilder, PromptTemplate, eos_token_ids
from sgpo.types import ChatTurn, Problem, SgpoError

CHAT = (
    "{% for turn in messages %}{{ '<s>' + turn['role'] + ':' + turn['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
TURNS = (ChatTurn("user", "1+2?"), ChatTurn("assistant", "3"))
TEMPLATE = PromptTemplate(system="Be brief.", plain="{problem}", guided="Plan: {strategy}; task: {problem}")


def tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token per character, plus the two markers."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def builder(chat_template: str | None = CHAT, template: PromptTemplate = TEMPLATE, limit: int = 1000) -> PromptBuilder:
    return PromptBuilder(tokenizer(chat_template), template, max_prompt_tokens=limit)


def decoded(ids: tuple[int, ...] | None) -> str:
    assert ids is not None
    return "".join(tokenizer().convert_ids_to_tokens(list(ids)))


def test_plain_and_guided_by_strategy():
    pair = builder().build(Problem("a", "1+1?", "2", strategy="add"))
    assert decoded(pair.plain) == "<s>system:Be brief.</s><s>user:1+1?</s><s>assistant:"
    assert decoded(pair.guided) == "<s>system:Be brief.</s><s>user:Plan: add; task: 1+1?</s><s>assistant:"
    assert all(isinstance(token, int) for token in pair.plain)


def test_guided_by_turns_and_by_both():
    turns = "<s>user:1+2?</s><s>assistant:3</s>"
    by_turns = builder().build(Problem("a", "1+1?", "2", guidance_turns=TURNS))
    assert decoded(by_turns.guided) == f"<s>system:Be brief.</s>{turns}<s>user:1+1?</s><s>assistant:"
    both = builder().build(Problem("a", "1+1?", "2", strategy="add", guidance_turns=TURNS))
    assert decoded(both.guided) == f"<s>system:Be brief.</s>{turns}<s>user:Plan: add; task: 1+1?</s><s>assistant:"


def test_no_guidance_and_no_system():
    template = PromptTemplate(system=None, plain="Q: {problem}", guided="{strategy} {problem}")
    pair = builder(template=template).build(Problem("a", "1?", "1"))
    assert pair.guided is None
    assert decoded(pair.plain) == "<s>user:Q: 1?</s><s>assistant:"


def test_both_contexts_end_with_the_same_tail():
    build = builder()
    assert decoded(build.tail) == build.tail_text == "</s><s>assistant:"
    pair = build.build(Problem("a", "1+1?", "2", strategy="add", guidance_turns=TURNS))
    assert pair.guided is not None
    assert pair.plain[-len(build.tail) :] == pair.guided[-len(build.tail) :] == build.tail


def test_braces_and_placeholders_in_the_texts_survive():
    problem = r"\frac{1}{2} {strategy} {problem} {0} {x!r}"
    template = PromptTemplate(system=None, plain="{problem}", guided=r"{strategy} | {problem} | \boxed{answer} {}")
    pair = builder(template=template).build(Problem("a", problem, "2", strategy=r"use {problem} \g<1>"))
    assert problem in decoded(pair.plain)
    assert rf"use {{problem}} \g<1> | {problem} | \boxed{{answer}} {{}}" in decoded(pair.guided)


def test_chat_templates_that_cannot_be_used():
    with pytest.raises(SgpoError, match="no chat template"):
        builder(None)
    with pytest.raises(SgpoError, match="no generation prompt"):
        builder(CHAT.partition("{% if")[0])
    refuses_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    with pytest.raises(SgpoError, match=r"no system.*system: null"):
        builder(refuses_system)


def test_a_tail_that_depends_on_the_conversation_is_refused():
    depends = CHAT.replace("'<s>assistant:'", "'<s>assistant:' + ('!' if messages|length > 2 else '')")
    assert builder(depends).build(Problem("a", "1?", "1")).guided is None
    with pytest.raises(SgpoError, match="'a': the guided prompt does not end with the generation prompt"):
        builder(depends).build(Problem("a", "1?", "1", guidance_turns=TURNS))


def test_guidance_that_the_template_drops_is_refused():
    last_only = CHAT.replace("in messages %}", "in messages[-1:] %}")
    with pytest.raises(SgpoError, match="guidance changes nothing"):
        builder(last_only).build(Problem("a", "1?", "1", guidance_turns=TURNS))


def test_length_limit_names_problem_length_limit_and_context():
    problem = Problem("long one", "1+1?", "2", strategy="add " * 20)
    plain = len(builder().build(problem).plain)
    pair = builder(limit=1000).build(problem)
    assert pair.guided is not None
    with pytest.raises(SgpoError, match=rf"'long one': the guided prompt has {len(pair.guided)} tokens.* = {plain}"):
        builder(limit=plain).build(problem)
    with pytest.raises(SgpoError, match=rf"the plain prompt has {plain} tokens"):
        builder(limit=plain - 1).build(problem)


def test_check_all_lists_every_bad_prompt():
    short, long = Problem("s", "1?", "1"), "9" * 100
    build = builder(limit=60)
    assert build.check_all([short]) == [build.build(short)]
    with pytest.raises(SgpoError) as caught:
        build.check_all([Problem("x", long, "1"), short, Problem("y", "1?", "1", strategy=long)])
    message = str(caught.value)
    assert "Problem 'x': the plain" in message
    assert "Problem 'y': the guided" in message
    assert "'s'" not in message


def test_packaged_template():
    template = PromptTemplate.load()
    assert template.system == r"Please reason step by step, and put your final answer within \boxed{}."
    assert template.render_plain("x{1}") == "x{1}"
    text = template.render_guided("the task", "the plan")
    assert text.index("the plan") < text.index("the task")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("system: null\nplain: '{problem}'", "exactly the keys"),
        ("- a list", "exactly the keys"),
        ("system: [", "Cannot read"),
        ("system: null\nplain: hello\nguided: '{strategy}{problem}'", "'plain' .* lacks {problem}"),
        ("system: null\nplain: '{problem}'\nguided: '{problem}'", "'guided' .* lacks {strategy}"),
        ("system: null\nplain: '{problem} {strategy}'\nguided: '{strategy}{problem}'", "unknown {strategy}"),
        ("system: null\nplain: '{problem} {answer}'\nguided: '{strategy}{problem}'", "unknown {answer}"),
        ("system: '{problem}'\nplain: '{problem}'\nguided: '{strategy}{problem}'", "'system' .* no placeholder"),
        ("system: null\nplain: 3\nguided: '{strategy}{problem}'", "'plain' .* non-empty text"),
        ("system: ''\nplain: '{problem}'\nguided: '{strategy}{problem}'", "'system' .* non-empty text"),
    ],
)
def test_bad_templates_are_explained(tmp_path, content, expected):
    path = tmp_path / "t.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SgpoError, match=expected) as caught:
        PromptTemplate.load(str(path))
    assert str(path) in str(caught.value)


def test_missing_template_file(tmp_path):
    with pytest.raises(SgpoError, match="Cannot read the prompt template"):
        PromptTemplate.load(str(tmp_path / "absent.yaml"))


def test_eos_ids_come_from_both_places():
    eos = tokenizer().eos_token_id
    assert eos_token_ids(tokenizer(), None) == (eos,)
    assert eos_token_ids(tokenizer(), 7) == (eos, 7)
    assert eos_token_ids(tokenizer(), [7, eos, 0]) == (eos, 7, 0)
    without = tokenizer()
    without.eos_token = None  # type: ignore[assignment]
    assert eos_token_ids(without, 0) == (0,)
    with pytest.raises(SgpoError, match="EOS"):
        eos_token_ids(without, None)
