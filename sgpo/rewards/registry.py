"""From the name of a reward in the configuration to the function that computes it."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from sgpo.rewards.answers import condense, normalised
from sgpo.types import RewardResult, SgpoError

RewardFunction = Callable[[str, str, str], RewardResult]

BUILT_IN = ("math_verify", "exact")


def load_reward(spec: str, *, require_box: bool = True) -> RewardFunction:
    """The reward named by `spec` as a function of (completion, gold answer, problem).

    Args:
        spec: "math_verify", "exact", or "package.module:function" for a function of your own with the signature
            `fn(completion: str, answer: str, problem: str) -> float`; any finite number is a reward.
        require_box: see `verify_answer`; only "math_verify" looks at it.

    Raises:
        SgpoError: nothing can be loaded under that name. The returned function raises it, too, where a function of
            your own returns something that is not a finite number.
    """
    if spec == "math_verify":
        from sgpo.rewards.verifier import verify_answer  # sympy is slow to import, and "exact" can do without it

        return _without_problem(partial(verify_answer, require_box=require_box))
    if spec == "exact":
        return _without_problem(exact_answer)
    return _checked(_import_function(spec), spec)


def exact_answer(completion: str, gold: str) -> RewardResult:
    r"""1 where the last `\boxed{}` after the thinking is the string `gold` up to white space and `$`, else 0."""
    answer = condense(completion)
    if not answer:
        return RewardResult(0.0, "no_answer")
    return RewardResult(float(normalised(answer) == normalised(gold)))


def _without_problem(verify: Callable[[str, str], RewardResult]) -> RewardFunction:
    return lambda completion, gold, problem: verify(completion, gold)


def _import_function(spec: str) -> Callable[..., Any]:
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise SgpoError(
            f"The reward {spec!r} is unknown: expected {' or '.join(map(repr, BUILT_IN))}, "
            "or 'package.module:function' for a function of your own."
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file of the user's cannot hide an installed package
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SgpoError(
            f"The reward {spec!r} cannot be imported ({error}): expected a module on the Python path or in "
            f"{os.getcwd()}, with everything it imports installed."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SgpoError(
            f"The reward {spec!r} is not a function: {module_name} has "
            f"{'no ' + function_name if function is None else function_name + ' = ' + type(function).__name__}, "
            "expected fn(completion, answer, problem) -> float."
        )
    return function


def _checked(function: Callable[..., Any], spec: str) -> RewardFunction:
    def reward(completion: str, gold: str, problem: str) -> RewardResult:
        value = function(completion, gold, problem)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise SgpoError(f"The reward {spec!r} returned {value!r:.80}: expected a finite number.")
        return RewardResult(float(value))

    return reward
