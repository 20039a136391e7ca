"""Where thinking ends, by the forms of many families; and that what is judged stands behind what the prompt opened."""

import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgpo.rewards.pool import RewardPool
from sgpo.rewards.scoring import completion_text, judged_item, reward_item
from sgpo.rewards.thinking import after_thinking, begins_thinking, is_marker_token, open_thinking, thinking_of
from sgpo.types import Problem, PromptPair, Rollout, RolloutRequest, TaskData

FORMS = [
    ("<think>", "</think>"),
    ("<Think>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<antThinking>", "</antThinking>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<chain_of_thought>", "</chain_of_thought>"),
    ("<CoT>", "</CoT>"),
    ("[think_never_used_51bce0c7]", "[/think_never_used_51bce0c7]"),
    ('<think effort="low">', "</think>"),
    ("<think >", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<ifm|think_fast>", "</ifm|think_fast>"),
    ("[THINK]", "[/THINK]"),
    ("[reasoning]", "[/reasoning]"),
    ("<|think|>", "<|/think|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|thinking_start|>", "<|thinking_end|>"),
    ("<|start_of_reasoning|>", "<|end_of_reasoning|>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>commentary<|message|>", "<|channel|>final <|constrain|>json<|message|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("[unused16]", "[unused17]"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|im_start|>think\n", "<|im_start|>answer\n"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]\n"),
    ("Here is my thought process:\n", "\nHere is my response:\n"),
]


@pytest.mark.parametrize(("begin", "end"), FORMS)
def test_only_what_follows_a_finished_thought_counts(begin, end):
    assert after_thinking(rf"{begin}\boxed{{5}}") is None
    assert (after_thinking(rf"{begin}\boxed{{4}}{end}\boxed{{5}}") or "").strip() == r"\boxed{5}"
    assert after_thinking(f"{begin}a{end}b\n{begin}\\boxed{{5}}") is None
    if not end.lstrip().startswith("Here"):
        assert (after_thinking(rf"\boxed{{4}}{end}five") or "").strip() == "five"  # the prompt opened it
    assert open_thinking(f"<|im_end|>\n{begin}") == begin
    assert open_thinking(f"{begin}\n\n{end}\n\n") == ""
    assert begins_thinking(f"\n{begin}a")
    assert not begins_thinking(f"a {begin}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no thinking", ...),
        ("<b>bold</b> and x < think > y", ...),
        ("[THE] <b> <cotangent> [ANSWER] <answer>", ...),
        ("<think/>5", ...),
        (r"\sqrt[think]{5}", None),  # odd, but an opener all the same: missed rather than paid for
        ("<think><think>again</think>5", "5"),
        ("</think></think>5", "5"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a<reasoning>b</reasoning>5", None),
        ("<think>a</thinking>5", None),
        ("<think>I must write </reasoning> here</think>5", "5"),
        ("</think>", ""),
        # Talk about markers, once the answer stands.
        (r"\boxed{5}. Note: I wrote my <think> above.", ...),
        (r"\boxed{5}. The tags <think> and </think> were used.", ...),
        (r"\boxed{5} (I used `<think>` for it)", ...),
        (r'\boxed{5}. As told, "<think>" came first.', ...),
        (r"<think>x</think>\boxed{5}. I closed with </think> above.", r"\boxed{5}. I closed with </think> above."),
        (r"<think>x</think>\boxed{5}. My [THINK], too.", r"\boxed{5}. My [THINK], too."),
        (r"The tags <think> and </think> are used; \boxed{5}", r" are used; \boxed{5}"),
        # Not talk: a box follows, the thought begins a line or a sentence, or nothing had ended before.
        (r"I now <think> about it: \boxed{5}", None),
        (r"\boxed{4} but let me <think> more: \boxed{5}", None),
        ("\\boxed{5}\n<think>wait", None),
        (r"\boxed{5}. <think>Wait, no", None),
        (r"\boxed{5}<think>Wait, no", None),
        (r"<think>x</think>\boxed{5} and let me <think>again", None),
        ("\\boxed{5} so I <think>\nno", None),
        (r"maybe \boxed{5} and </think> done", " done"),
        (r"\boxed{5}. I wrote my <think> above. <think>And again", None),
    ],
)
def test_talk_about_thinking_is_no_thinking(text, expected):
    assert after_thinking(text) == (text if expected is ... else expected)


def test_a_tail_that_closes_thinking_opens_none():
    tail = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert open_thinking(tail) == ""
    assert thinking_of(tail) == "<think>\n\n</think>\n\n"
    assert thinking_of("<|assistant|></think>") == "</think>"
    assert thinking_of("<|im_start|>assistant\n") == ""


@pytest.mark.parametrize("text", ["<think></think>" * 30_000, "<" * 300_000, "<|" * 100_000, "word <think> " * 30_000])
def test_time_is_linear(text):
    start = time.process_time()
    after_thinking(r"\boxed{5}" + text)
    after_thinking(text + r"\boxed{5}")
    assert time.process_time() - start < 4.0


# From token ids.

SPECIAL = ("[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and special tokens among which are markers."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize(
    ("sampled", "text"),
    [
        ("plain 5</s>", "plain 5"),
        ("[THINK]a é[/THINK]b</s>", "[THINK]a é[/THINK]b"),
        ("[THINK]guess", "[THINK]guess"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b</s>",
            "<|channel|>analysis<|message|>aassistant<|channel|>final<|message|>b",
        ),
    ],
)
def test_special_tokens_that_mark_thinking_stay_in_the_text(tokenizer, sampled, text):
    found = completion_text(tokenizer, tokenizer.encode(sampled, add_special_tokens=False))
    assert found == text
    assert after_thinking(found) in {None, "plain 5", "b"}
    assert (after_thinking(found) is None) == (sampled == "[THINK]guess")


def test_which_special_tokens_are_markers():
    assert [token for token in SPECIAL if is_marker_token(token)] == list(SPECIAL[:4])


@pytest.fixture(scope="module")
def pool():
    with RewardPool("exact", workers=1) as pool:
        yield pool


@pytest.mark.parametrize(
    ("opening", "sampled", "reward"),
    [
        ("", r"I guess \boxed{5} but let me check</s>", 1.0),
        ("<think>\n", r"I guess \boxed{5} but let me check", 0.0),
        ("<think>\n", r"I guess \boxed{4}. </think> \boxed{5}</s>", 1.0),
        ("<think>\n", r"<think> again \boxed{4} </think> \boxed{5}</s>", 1.0),
        ("[THINK]", r"\boxed{5}", 0.0),
        ("[THINK]", r"\boxed{5}[/THINK] \boxed{5}</s>", 1.0),
    ],
)
def test_a_completion_is_judged_behind_what_its_prompt_opened(pool, tokenizer, opening, sampled, reward):
    task = TaskData([Problem("p", "q", "5")], [PromptPair((1,), None)], None, opening)
    ids = tuple(tokenizer.encode(sampled, add_special_tokens=False))
    rollout = Rollout(RolloutRequest(0, "auto", 0, (1,), 0), ids, (), False, 0)
    item = reward_item(tokenizer, task, rollout)
    assert item == judged_item(task.problems[0], completion_text(tokenizer, ids), opening)
    assert item.completion.startswith(opening)
    assert pool.score([item])[0].reward == reward
