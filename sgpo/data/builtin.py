"""The built-in task, tokenizer and model of the quickstart: small enough to show SGPO on two CPU cores in minutes.

Task. A problem shows a place, four digits and a thing: "farm : 3 8 2 5 . how many boxes ?". The answer takes four
moves, each one of two: pick the first or the second digit, pick the third or the fourth, take their sum or their gap,
double or triple it. The place fixes the first two moves and the thing the last two, which gives sixteen families with
a procedure of their own. The surface does not say so; the strategy text names the moves, with no digit and no result. A
family's procedure alone reaches the answer: digits for which any other of the sixteen gives the same number are left
out, so a guess is right 1 time in 16.

What the warm-up teaches, and what it cannot. A guided demonstration carries a strategy drawn at random, whatever the
surface, and executes it; a plain demonstration executes moves drawn at random. So the model learns to follow a named
procedure, and to guess one where none is named; no demonstration tells which family needs which procedure. That is left
to reinforcement learning. Evaluation digits occur neither in demonstrations nor in training problems; the families are
the same.

Why moves of two. A guess between two lies ln 2 = 0.69 nats from certainty, inside the default limit max_token_kl = 1.0
of the hard mask. A procedure chosen among sixteen in a single token would lie ln 16 = 2.8 nats away, and the mask would
remove precisely the token that carries the strategy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sgpo.types import Problem, SgpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

BUILTIN = "builtin"  # what model.path and data.train call the built-in model and task
Split = Literal["train", "eval"]
Digits = tuple[int, int, int, int]
Procedure = tuple[str, str, str, str]

STEPS = ("left", "right", "join", "scale")
MOVES = (("first", "second"), ("third", "fourth"), ("sum", "gap"), ("double", "triple"))
PROCEDURES: tuple[Procedure, ...] = tuple(product(*MOVES))  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Family:
    """A surface (place, thing) and the procedure that its problems need."""

    place: str
    thing: str
    procedure: Procedure


PLACES = {
    "farm": ("first", "third"),
    "harbor": ("first", "fourth"),
    "market": ("second", "third"),
    "forest": ("second", "fourth"),
}
THINGS = {
    "boxes": ("sum", "double"),
    "coins": ("sum", "triple"),
    "lamps": ("gap", "double"),
    "wheels": ("gap", "triple"),
}
FAMILIES = tuple(Family(place, thing, PLACES[place] + THINGS[thing]) for place in PLACES for thing in THINGS)
LARGEST_NUMBER = 54
EVAL_SHARE = 5  # one combination of digits in five is kept for evaluation

END, PAD, UNKNOWN, START = "<|im_end|>", "<|pad|>", "<|unk|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    *("system", "user", "assistant", ".", ",", ":", "?", "\\boxed{", "}"),
    *("how", "many", "type", "strategy", "steps", "digits", "combine", "two", "pick", "take", "then"),
)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One worked example of the warm-up; `guided` says whether its prompt carries `problem.strategy`."""

    id: str
    problem: Problem
    guided: bool
    completion: str


def run_procedure(procedure: Procedure, digits: Digits) -> tuple[int, int, int, int]:
    """The number each of the four steps gives; the last one is the answer."""
    first, second, combine, scale = procedure
    left = digits[0] if first == "first" else digits[1]
    right = digits[2] if second == "third" else digits[3]
    combined = left + right if combine == "sum" else abs(left - right)
    return left, right, combined, combined * (2 if scale == "double" else 3)


def worked_chain(family: Family, procedure: Procedure, digits: Digits) -> str:
    """A completion: "left farm first 3 right farm third 2 join boxes sum 5 scale boxes double 10 \\boxed{10}".

    Every step opens with its own word, so that a model always knows the step it is at, and names what it depends on.
    """
    results = run_procedure(procedure, digits)
    words = (family.place, family.place, family.thing, family.thing)
    lines = zip(STEPS, words, procedure, results, strict=True)
    steps = " ".join(" ".join((step, word, move, str(result))) for step, word, move, result in lines)
    return f"{steps} \\boxed{{{results[-1]}}}"


def strategy_text(procedure: Procedure) -> str:
    """Problem type, strategy and steps in words; no digit of the problem, no result."""
    first, second, combine, scale = procedure
    return (
        "type : digits . strategy : combine two . "
        f"steps : pick {first} , pick {second} , take {combine} , then {scale} ."
    )


def problem_text(family: Family, digits: Digits) -> str:
    """The words of a problem of the built-in task."""
    return f"{family.place} : {' '.join(map(str, digits))} . how many {family.thing} ?"


def _is_eval(digits: Digits) -> bool:
    return sha256(bytes(digits)).digest()[0] % EVAL_SHARE == 0


@lru_cache(maxsize=1)
def _pools() -> dict[tuple[Split, Procedure], tuple[Digits, ...]]:
    """The digits of each split for which a procedure's answer is no other procedure's answer."""
    pools: dict[tuple[Split, Procedure], list[Digits]] = {}
    nine = range(1, 10)
    for digits in product(nine, nine, nine, nine):
        split: Split = "eval" if _is_eval(digits) else "train"
        answers = [run_procedure(procedure, digits)[-1] for procedure in PROCEDURES]
        for procedure, answer in zip(PROCEDURES, answers, strict=True):
            if answers.count(answer) == 1:
                pools.setdefault((split, procedure), []).append(digits)
    return {key: tuple(pool) for key, pool in pools.items()}


def make_problems(split: Split, *, seed: int, count: int) -> list[Problem]:
    """`count` different problems with their strategy, evenly from all families, in an order drawn from `seed`.

    Raises SgpoError where the split does not hold that many different problems.
    """
    pools = _pools()
    largest = len(FAMILIES) * min(len(pools[split, family.procedure]) for family in FAMILIES)
    if not 1 <= count <= largest:
        raise SgpoError(f"built-in task, split {split!r}: count must lie in 1..{largest}, got {count}; ask for fewer.")
    rng = random.Random(f"{split}-{seed}")
    per_family = -(-count // len(FAMILIES))
    columns = [
        [(family, digits) for digits in rng.sample(pools[split, family.procedure], per_family)] for family in FAMILIES
    ]
    drawn = [pair for row in zip(*columns, strict=True) for pair in row][:count]
    rng.shuffle(drawn)
    return [
        Problem(
            id=f"builtin-{split}-{seed}-{index:05d}",
            problem=problem_text(family, digits),
            answer=str(run_procedure(family.procedure, digits)[-1]),
            strategy=strategy_text(family.procedure),
            solution=worked_chain(family, family.procedure, digits),
            extra={"family": f"{family.place} {family.thing}"},
        )
        for index, (family, digits) in enumerate(drawn)
    ]


def make_demonstrations(*, seed: int, count: int) -> list[Demonstration]:
    """`count` warm-up examples, guided and plain in turn; surface, digits and moves are drawn independently.

    Digits are never those of the eval split. `problem.answer` is what the drawn moves give, not the family's answer.
    Raises SgpoError for a count below 1.
    """
    if count < 1:
        raise SgpoError(f"built-in task, demonstrations: count must be at least 1, got {count}; ask for one or more.")
    rng = random.Random(f"demonstrations-{seed}")
    return [_demonstration(rng, f"builtin-demo-{seed}-{index:05d}", guided=index % 2 == 0) for index in range(count)]


def _demonstration(rng: random.Random, demo_id: str, *, guided: bool) -> Demonstration:
    family, procedure = rng.choice(FAMILIES), rng.choice(PROCEDURES)
    digits = _train_digits(rng)
    problem = Problem(
        id=demo_id,
        problem=problem_text(family, digits),
        answer=str(run_procedure(procedure, digits)[-1]),
        strategy=strategy_text(procedure) if guided else None,
        extra={"family": f"{family.place} {family.thing}"},
    )
    return Demonstration(id=demo_id, problem=problem, guided=guided, completion=worked_chain(family, procedure, digits))


def _train_digits(rng: random.Random) -> Digits:
    while True:
        digits = (rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9))
        if not _is_eval(digits):
            return digits


def vocabulary() -> list[str]:
    """All tokens in the order of their ids: special tokens, numbers as one token each, words."""
    moves = [move for pair in MOVES for move in pair]
    numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
    return list(dict.fromkeys([PAD, START, END, UNKNOWN, *numbers, *WORDS, *STEPS, *moves, *PLACES, *THINGS]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template; decoding gives single blanks and an intact \\boxed{12}."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    token_ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\\boxed\{|\}|\d+|[.,:?]"), "isolated"),
        ]
    )
    # The WordPiece decoder is used for its blank before every token but the first; no token starts with its prefix.
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace("\\boxed{ ", "\\boxed{"),
            decoders.Replace(" }", "}"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(*, seed: int, hidden: int = 128, layers: int = 2) -> Qwen3ForCausalLM:
    """A freshly initialised fp32 Qwen3 with tied embeddings; the caller's torch random state is left as it was.

    Not Qwen2: transformers 5 loads a folder of that model type with Qwen2's own byte-level tokenizer, whatever
    tokenizer.json says.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokens = vocabulary()
    settings: dict[str, Any] = {
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": hidden // 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokens.index(END),
        "pad_token_id": tokens.index(PAD),
        "initializer_range": 0.05,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(**settings)).float()


def save_builtin(folder: str | Path, *, seed: int) -> None:
    """Writes model, configuration, generation configuration and tokenizer as a Hugging Face folder."""
    model = make_model(seed=seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
