r"""Arithmetic for a small real model, with worked examples as guidance.

    python examples/worked_arithmetic.py --out-dir data/arithmetic --model models/smollm2-135m

writes three files in the format of `sgpo train`:

    train.jsonl    two-step problems; `guidance_turns` are four solved problems of the same kind as chat turns
    eval.jsonl     the same kinds with other operands
    warmup.jsonl   solved one-step problems without guidance, and some two-step problems with it, none of them in train

The one-step problems teach the form of an answer, "8 + 5 = 13" and \boxed{13}. The two-step ones, shown with their
guidance (warmup.guided_share: 1), teach to follow worked examples. The plain prompt still seldom chains two steps: that
difference is what SGPO distils. A lower guided_share shows some of them plain, so that the plain prompt starts better.
The prompts that go with the files are in sgpo/data/templates/arithmetic.yaml.

A problem belongs to train or eval by its operands alone, whatever their order, the kind, the wording or the seed (see
`is_held_out`), so no two runs of this script can disagree about it. Worked examples and one-step problems take their
operands from the training side, and no worked example has the operands of the problem that it guides.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgpo.types import ChatTurn, Problem, SgpoError

Operands = tuple[int, ...]
Step = tuple[str, int]

HELD_OUT_OF = 3  # one operand set in this many is for evaluation
WORKED_EXAMPLES = 4
NAMES = ("Tom", "Ann", "Sam", "Mia")
THINGS = ("apples", "pens", "cards", "eggs")


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of problems.

    `operands` are all operand tuples of the family; `wording` is filled with a, b, c, a name and a thing; `steps` gives
    the calculation, each step as (expression, its value), of which the last value is the answer.
    """

    name: str
    operands: tuple[Operands, ...]
    wording: str
    steps: Callable[..., tuple[Step, ...]]


def _add(a: int, b: int) -> Step:
    return f"{a} + {b}", a + b


def _subtract(a: int, b: int) -> Step:
    return f"{a} - {b}", a - b


def _multiply(a: int, b: int) -> Step:
    return f"{a} * {b}", a * b


def _add_add(a: int, b: int, c: int) -> tuple[Step, ...]:
    return _add(a, b), _add(a + b, c)


def _add_subtract(a: int, b: int, c: int) -> tuple[Step, ...]:
    return _add(a, b), _subtract(a + b, c)


def _multiply_add(a: int, b: int, c: int) -> tuple[Step, ...]:
    return _multiply(a, b), _add(a * b, c)


DIGITS = range(2, 10)
SMALL = range(2, 6)
# One-step problems cover the calculations that a second step needs, such as 16 + 8.
SUM_PAIRS = tuple(itertools.product(range(2, 26), DIGITS))
DIFFERENCE_PAIRS = tuple(pair for pair in itertools.product(range(3, 19), DIGITS) if pair[0] > pair[1])
SMALL_PAIRS = tuple(itertools.product(SMALL, SMALL))
TRIPLES = tuple(itertools.product(DIGITS, DIGITS, DIGITS))
POSITIVE_TRIPLES = tuple(t for t in TRIPLES if t[0] + t[1] > t[2])
PRODUCT_TRIPLES = tuple(itertools.product(SMALL, SMALL, DIGITS))

ONE_STEP = (
    Kind("add", SUM_PAIRS, "What is {a} + {b}?", lambda a, b: (_add(a, b),)),
    Kind("subtract", DIFFERENCE_PAIRS, "What is {a} - {b}?", lambda a, b: (_subtract(a, b),)),
    Kind("multiply", SMALL_PAIRS, "What is {a} * {b}?", lambda a, b: (_multiply(a, b),)),
    Kind(
        "story-add",
        SUM_PAIRS,
        "{name} has {a} {thing} and gets {b} more. How many {thing} in total?",
        lambda a, b: (_add(a, b),),
    ),
    Kind(
        "story-subtract",
        DIFFERENCE_PAIRS,
        "{name} has {a} {thing} and loses {b}. How many {thing} are left?",
        lambda a, b: (_subtract(a, b),),
    ),
    Kind(
        "story-multiply",
        SMALL_PAIRS,
        "{name} has {a} bags of {b} {thing}. How many {thing} in total?",
        lambda a, b: (_multiply(a, b),),
    ),
)
TWO_STEP = (
    Kind("add-add", TRIPLES, "What is {a} + {b} + {c}?", _add_add),
    Kind("add-subtract", POSITIVE_TRIPLES, "What is {a} + {b} - {c}?", _add_subtract),
    Kind("multiply-add", PRODUCT_TRIPLES, "What is {a} * {b} + {c}?", _multiply_add),
    Kind(
        "story-add-add",
        TRIPLES,
        "{name} has {a} {thing}, gets {b} and then {c} more. How many {thing} in total?",
        _add_add,
    ),
    Kind(
        "story-multiply-add",
        PRODUCT_TRIPLES,
        "{name} has {a} bags of {b} {thing} and {c} more {thing}. How many {thing} in total?",
        _multiply_add,
    ),
)


@functools.cache
def is_held_out(operands: Operands) -> bool:
    """Whether problems with these operands are for evaluation; depends on nothing but the operands, in any order."""
    text = ",".join(map(str, sorted(operands)))
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_OF == 0


def write_chain(steps: tuple[Step, ...]) -> str:
    r"""The short solution, "8 + 5 = 13, 13 - 4 = 9" and \boxed{9} on a second line.

    The box repeats a number already written: SmolLM2 does not calculate inside a box.
    """
    return ", ".join(f"{text} = {value}" for text, value in steps) + f"\n\\boxed{{{steps[-1][1]}}}"


def make_problem(kind: Kind, operands: Operands, rng: random.Random) -> Problem:
    """One problem without guidance; `extra` keeps its kind and operands."""
    words = dict(zip("abc", operands, strict=False), name=rng.choice(NAMES), thing=rng.choice(THINGS))
    steps = kind.steps(*operands)
    return Problem(
        id=f"{kind.name}-{'-'.join(map(str, operands))}",
        problem=kind.wording.format(**words),
        answer=str(steps[-1][1]),
        solution=write_chain(steps),
        extra={"kind": kind.name, "operands": list(operands)},
    )


def worked_examples(kind: Kind, operands: Operands, rng: random.Random) -> tuple[ChatTurn, ...]:
    """Chat turns of WORKED_EXAMPLES solved problems of `kind`, from training operands other than `operands`."""
    others = [o for o in kind.operands if not is_held_out(o) and sorted(o) != sorted(operands)]
    turns = []
    for chosen in rng.sample(others, WORKED_EXAMPLES):
        example = make_problem(kind, chosen, rng)
        turns += [ChatTurn("user", example.problem), ChatTurn("assistant", example.solution or "")]
    return tuple(turns)


def make_split(kinds: tuple[Kind, ...], count: int, *, held_out: bool, guided: bool, seed: int) -> list[Problem]:
    """`count` different problems, the kinds in turn so that any prefix is balanced; a kind that runs out is left out.

    Raises:
        SgpoError: there are fewer than `count` operand tuples on this side of the split.
    """
    queues = []
    for kind in kinds:
        # One generator per kind and side: a longer file begins with the shorter one of the same seed.
        rng = random.Random(f"{seed}/{kind.name}/{held_out}")
        pool = [operands for operands in kind.operands if is_held_out(operands) == held_out]
        queues.append(_problems(kind, rng.sample(pool, len(pool)), rng, guided=guided))
    problems = list(itertools.islice(_round_robin(queues), count))
    if len(problems) < count:
        side = "held-out" if held_out else "training"
        raise SgpoError(f"{count} {side} problems were asked for, but there are only {len(problems)}: ask for fewer.")
    return problems


def _problems(kind: Kind, pool: list[Operands], rng: random.Random, *, guided: bool) -> Iterator[Problem]:
    for operands in pool:
        problem = make_problem(kind, operands, rng)
        yield replace(problem, guidance_turns=worked_examples(kind, operands, rng)) if guided else problem


def _round_robin(queues: list[Iterator[Problem]]) -> Iterator[Problem]:
    for row in itertools.zip_longest(*queues):
        yield from (problem for problem in row if problem is not None)


def make_splits(warmup: int, train: int, evaluation: int, seed: int) -> dict[str, list[Problem]]:
    """The problems of the three files by name; a third of the warm-up are two-step problems that train leaves out."""
    n_two_step = warmup // 3
    two_step = make_split(TWO_STEP, n_two_step + train, held_out=False, guided=True, seed=seed)
    one_step = make_split(ONE_STEP, warmup - n_two_step, held_out=False, guided=False, seed=seed)
    mixed = one_step + two_step[:n_two_step]
    random.Random(seed).shuffle(mixed)
    held_out = make_split(TWO_STEP, evaluation, held_out=True, guided=True, seed=seed)
    return {"warmup": mixed, "train": two_step[n_two_step:], "eval": held_out}


def to_row(problem: Problem) -> dict[str, Any]:
    """The JSON object of a problem as `sgpo train` reads it."""
    row: dict[str, Any] = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
    row["solution"] = problem.solution
    if problem.guidance_turns:
        row["guidance_turns"] = [{"role": turn.role, "content": turn.content} for turn in problem.guidance_turns]
    return {**row, **problem.extra}


def write_rows(path: Path, problems: list[Problem]) -> None:
    """Writes one JSON object per line; the file appears only when it is complete."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8", newline="\n") as sink:
        sink.writelines(json.dumps(to_row(problem), ensure_ascii=False) + "\n" for problem in problems)
    temporary.replace(path)


def describe_lengths(model: Path, problems: list[Problem]) -> str:
    """One line with the longest plain prompt, guided prompt and solution in tokens of the model in folder `model`."""
    if not (model / "tokenizer.json").is_file():
        raise SgpoError(f"{model} has no tokenizer.json: name a model folder, such as examples/smollm2.py makes.")

    from transformers import AutoTokenizer

    from sgpo.data.prompts import PromptBuilder, PromptTemplate

    template = PromptTemplate.load(str(Path(__file__).parents[1] / "sgpo/data/templates/arithmetic.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = PromptBuilder(tokenizer, template, max_prompt_tokens=sys.maxsize).check_all(problems)
    plain, guided = max(len(p.plain) for p in pairs), max(len(p.guided or ()) for p in pairs)
    solution = 1 + max(len(tokenizer.encode(p.solution or "", add_special_tokens=False)) for p in problems)
    return f"longest in tokens: plain prompt {plain}, guided prompt {guided}, solution with EOS {solution}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Arithmetic problems with worked examples as guidance.")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for warmup.jsonl, train.jsonl, eval.jsonl")
    parser.add_argument("--model", type=Path, help="a model folder: report lengths in its tokens")
    parser.add_argument("--seed", type=int, default=0, help="which problems, names and worked examples")
    parser.add_argument("--warmup", type=int, default=144, metavar="N", help="a third of them two-step (default 144)")
    parser.add_argument("--train", type=int, default=600, metavar="N", help="two-step problems (default 600)")
    parser.add_argument("--eval", type=int, default=180, metavar="N", help="held-out problems (default 180)")
    args = parser.parse_args(argv)
    try:
        splits = make_splits(args.warmup, args.train, args.eval, args.seed)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for name, problems in splits.items():
            write_rows(args.out_dir / f"{name}.jsonl", problems)
            print(f"{args.out_dir / name}.jsonl: {len(problems)} problems")
        if args.model is not None:
            print(describe_lengths(args.model, splits["train"] + splits["eval"]))
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
