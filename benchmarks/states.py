"""Hidden states to measure a loss head on: real ones, random ones of a set spread, and calibrated synthetic ones.

A source is named by a text: `real:FOLDER` (a local model on the solutions of a JSONL file), `own:FOLDER` (the same on
its own samples), `spread:0.1` (random states, |h_T - h_S| / |h_S| = 0.1 in every row) or `calibrated` (synthetic, see
`calibrated`). Every record says in `source` what it is. Entropies and divergences are in nats; seeded, but CPU and GPU
draw different numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgpo.data.problems import load_problems
from sgpo.data.prompts import PromptBuilder, PromptTemplate
from sgpo.engine.batching import collate
from sgpo.model.loading import load_causal_lm, load_tokenizer
from sgpo.model.policy import PolicyModel
from sgpo.types import ChatTurn, Problem, SgpoError

Knots = tuple[tuple[float, float], ...]
"""(share of the rows, value) from share 0 to share 1; log-linear in between."""

# Qwen2.5-Coder-1.5B-Instruct on math solutions, measured before this project: mean entropy 0.21, half of the rows below
# 0.005; KL median 2e-4, 2.7 % of the rows above 1. Measured are only these four figures. The ends are chosen: the
# highest entropy such that the mean comes out at 0.21.
QWEN_ENTROPY: Knots = ((0.0, 1e-5), (0.5, 0.005), (1.0, 2.65))
QWEN_KL: Knots = ((0.0, 1e-8), (0.5, 2e-4), (0.973, 1.0), (1.0, 4.0))

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
GENERIC_STRATEGY = (
    "Read what is asked and list the known quantities. Find the relations between them, one at a time. Write each "
    "relation as an arithmetic step, carry out the steps in order, and check that the last one answers the question."
)
SUMMARY_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

_ZIPF_EXPONENT = 1.6
_ZIPF_SHIFT = 10.0
_LOGITS_ABOVE_BACKGROUND = 16.0
_LOGIT_STD_OF_SPREAD = 3.0
_ROWS_PER_BLOCK = 512
_BATCH = 12


@dataclass(frozen=True)
class HeadStates:
    """policy_hidden [Np, H], policy_targets int64 [Np], distill_hidden and teacher_hidden [Nd, H], head [V, H]."""

    policy_hidden: Tensor
    policy_targets: Tensor
    distill_hidden: Tensor
    teacher_hidden: Tensor
    head: Tensor
    source: dict[str, Any]

    def first(self, policy_rows: int, distill_rows: int) -> HeadStates:
        """The first rows of each group."""
        return replace(
            self,
            policy_hidden=self.policy_hidden[:policy_rows],
            policy_targets=self.policy_targets[:policy_rows],
            distill_hidden=self.distill_hidden[:distill_rows],
            teacher_hidden=self.teacher_hidden[:distill_rows],
        )


def make(
    name: str,
    hidden: int,
    vocab: int,
    policy_rows: int,
    distill_rows: int,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int,
    data: Path = DEFAULT_DATA,
    cache: Path | None = None,
) -> HeadStates:
    """The states of a named source. Raises SgpoError for an unknown name or a model head of another shape."""
    kind, _, argument = name.partition(":")
    if kind == "calibrated" and not argument:
        return calibrated(policy_rows, distill_rows, hidden, vocab, dtype=dtype, device=device, seed=seed)
    if kind == "spread" and re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", argument):
        ratio = float(argument)
        return spread(policy_rows, distill_rows, hidden, vocab, ratio=ratio, dtype=dtype, device=device, seed=seed)
    if kind in ("real", "own") and argument:
        rows, options = max(policy_rows, distill_rows), {"dtype": dtype, "device": device, "cache": cache}
        if kind == "real":
            states = real(Path(argument), data, rows, **options)
        else:
            states = own(Path(argument), data, rows, seed=seed, **options)
        if tuple(states.head.shape) != (vocab, hidden):
            found = "H{1} V{0}".format(*states.head.shape)
            raise SgpoError(f"The head of {argument} is {found}, the shape asked for H{hidden} V{vocab}.")
        return states.first(policy_rows, distill_rows)
    expected = "calibrated, spread:RATIO, real:MODEL_FOLDER or own:MODEL_FOLDER"
    raise SgpoError(f"Unknown states {name!r}: expected {expected}.")


def spread(
    policy_rows: int,
    distill_rows: int,
    hidden: int,
    vocab: int,
    *,
    ratio: float,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> HeadStates:
    """Random states and head, logits of standard deviation 3, targets uniform: flat distributions, nothing like a
    trained model's. The teacher's rows lie at the distance `ratio` |h| in a random direction."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    head = normal(vocab, hidden) * (_LOGIT_STD_OF_SPREAD / math.sqrt(hidden))
    policy, distill, step = normal(policy_rows, hidden), normal(distill_rows, hidden), normal(distill_rows, hidden)
    step *= ratio * distill.norm(dim=1, keepdim=True) / step.norm(dim=1, keepdim=True)
    targets = torch.randint(vocab, (policy_rows,), generator=generator, device=device)
    source = {"kind": "spread", "what": "random states", "ratio": ratio, "seed": seed}
    return HeadStates(policy.to(dtype), targets, distill.to(dtype), (distill + step).to(dtype), head.to(dtype), source)


# calibrated synthetic states


def calibrated(
    policy_rows: int,
    distill_rows: int,
    hidden: int,
    vocab: int,
    *,
    entropy: Knots = QWEN_ENTROPY,
    kl: Knots = QWEN_KL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> HeadStates:
    """Calibrated synthetic states: no model made them, but entropy and KL have the quantiles asked for.

    A random head; per row a few candidate tokens, drawn without replacement from one Zipf law over a shuffled
    vocabulary; their logits fall with the rank, the slope solved for the row's entropy. The hidden state is the
    combination of the candidates' head rows that produces these logits, far enough above the other tokens'. The
    teacher's candidate logits are moved in a random direction as far as the row's KL wants. Rows of high entropy tend
    to have high KL. Policy targets are drawn from the distribution. The Zipf law and the shape of the tail are set so
    that the number of live columns (`live_columns`) comes near that of the measured model.
    """
    generator = torch.Generator(device).manual_seed(seed)
    head = torch.randn(vocab, hidden, generator=generator, device=device).mul_(hidden**-0.5).to(dtype)
    ranks = torch.randperm(vocab, generator=generator, device=device)
    zipf_V = (ranks + _ZIPF_SHIFT).double().pow(-_ZIPF_EXPONENT).float()
    share_N = [_shares(rows, generator) for rows in (policy_rows, distill_rows)]
    jitter = torch.randn(distill_rows, generator=generator, device=device).mul_(0.15)
    kl_share = (share_N[1] + jitter).argsort().argsort().add(0.5).div(max(distill_rows, 1))
    policy = _Rows(head, zipf_V, _quantile(entropy, share_N[0]), None, generator)
    distill = _Rows(head, zipf_V, _quantile(entropy, share_N[1]), _quantile(kl, kl_share), generator)
    source = {
        "kind": "calibrated",
        "what": "calibrated synthetic states: random head, entropy and KL quantiles of a measured model",
        "entropy_knots": entropy,
        "kl_knots": kl,
        "candidates": _candidates(hidden),
        "seed": seed,
    }
    return HeadStates(policy.hidden, policy.targets, distill.hidden, distill.teacher, head, source)


class _Rows:
    """hidden, teacher [N, H] and targets [N] of one group, block by block."""

    def __init__(
        self, head: Tensor, zipf_V: Tensor, entropy_N: Tensor, kl_N: Tensor | None, generator: torch.Generator
    ) -> None:
        rows = len(entropy_N)
        self.hidden, self.teacher = head.new_empty(rows, head.shape[1]), head.new_empty(rows, head.shape[1])
        self.targets = torch.empty(rows, dtype=torch.int64, device=head.device)
        count = _candidates(head.shape[1])
        for start in range(0, rows, _ROWS_PER_BLOCK):
            block = slice(start, min(start + _ROWS_PER_BLOCK, rows))
            tokens_RK = torch.multinomial(zipf_V.expand(block.stop - start, -1), count, generator=generator)
            vectors_RKH = head[tokens_RK].float()
            gram_RKK = vectors_RKH @ vectors_RKH.mT
            logits_RK = _logits_of_entropy(entropy_N[block], count, math.log(len(head)), generator)
            self.hidden[block] = _combine(gram_RKK, vectors_RKH, logits_RK)
            taken = torch.multinomial(logits_RK.softmax(1).float(), 1, generator=generator)
            self.targets[block] = tokens_RK.gather(1, taken).squeeze(1)
            if kl_N is not None:
                moved_RK = _move_to_kl(logits_RK, kl_N[block], generator)
                self.teacher[block] = _combine(gram_RKK, vectors_RKH, moved_RK)


def _candidates(hidden: int) -> int:
    """Candidate tokens per row: few enough that their combined length does not raise all other logits too."""
    return max(4, min(32, hidden // 32))


def _shares(rows: int, generator: torch.Generator) -> Tensor:
    """(i + 1/2) / rows, shuffled: the quantiles then hold for any number of rows."""
    order = torch.randperm(rows, generator=generator, device=generator.device)
    return order.double().add(0.5).div(max(rows, 1))


def _quantile(knots: Knots, share_N: Tensor) -> Tensor:
    value_N = torch.zeros_like(share_N, dtype=torch.float64)
    for (left, low), (right, high) in itertools.pairwise(knots):
        inside = (share_N >= left) & (share_N <= right)
        position = (share_N.double() - left) / (right - left)
        value_N = torch.where(inside, low * (high / low) ** position, value_N)
    return value_N


def _logits_of_entropy(entropy_R: Tensor, count: int, log_vocab: float, generator: torch.Generator) -> Tensor:
    """[R, K] float64: level - t d_k, at least 0, with t solved so that the softmax has the entropy."""
    level = log_vocab + _LOGITS_ABOVE_BACKGROUND
    jitter = torch.randn(len(entropy_R), count, generator=generator, device=entropy_R.device, dtype=torch.float64)
    rank_K = torch.arange(1, count + 1, device=entropy_R.device, dtype=torch.float64)
    distance_RK = rank_K.log().pow(0.6) * jitter.mul(0.3).exp()

    def logits(slope_R: Tensor) -> Tensor:
        return (level - slope_R.unsqueeze(1) * distance_RK).clamp(min=0.0)

    wanted_R = entropy_R.clamp(max=0.95 * math.log(count))
    slope_R = _bisect(lambda slope: -_entropy(logits(slope)), -wanted_R, high=4.0 * level)
    return logits(slope_R)


def _move_to_kl(logits_RK: Tensor, kl_R: Tensor, generator: torch.Generator) -> Tensor:
    """logits + s x with a random direction x, s solved so that KL(moved || logits) is as wanted.

    KL grows with s up to -log p of the token where x is largest: that token is chosen such that the limit suffices.
    """
    options: Any = {"generator": generator, "device": logits_RK.device, "dtype": torch.float64}
    direction_RK = torch.randn(logits_RK.shape, **options)
    surprise_RK = -logits_RK.log_softmax(1)
    largest_R1 = direction_RK.argmax(1, keepdim=True)
    enough_RK = surprise_RK >= 2.0 * kl_R.unsqueeze(1)
    cheapest_R1 = torch.where(enough_RK, surprise_RK, math.inf).argmin(1, keepdim=True)
    fallback_R1 = torch.where(enough_RK.any(1, keepdim=True), cheapest_R1, surprise_RK.argmax(1, keepdim=True))
    chosen_R1 = torch.where(enough_RK.gather(1, largest_R1), largest_R1, fallback_R1)
    at_largest, at_chosen = direction_RK.gather(1, largest_R1), direction_RK.gather(1, chosen_R1)
    direction_RK.scatter_(1, largest_R1, at_chosen).scatter_(1, chosen_R1, at_largest)

    def moved(size_R: Tensor) -> Tensor:
        return logits_RK + size_R.unsqueeze(1) * direction_RK

    return moved(_bisect(lambda size: _kl(moved(size), logits_RK), kl_R, high=200.0))


def _bisect(increasing: Any, wanted_R: Tensor, *, high: float) -> Tensor:
    """x in [0, high] per row with increasing(x) = wanted, or the end that comes nearest."""
    low_R, high_R = torch.zeros_like(wanted_R), torch.full_like(wanted_R, high)
    for _ in range(60):
        middle_R = (low_R + high_R) / 2
        below = increasing(middle_R) < wanted_R
        low_R, high_R = torch.where(below, middle_R, low_R), torch.where(below, high_R, middle_R)
    return (low_R + high_R) / 2


def _combine(gram_RKK: Tensor, vectors_RKH: Tensor, logits_RK: Tensor) -> Tensor:
    """The shortest h [R, H] with h · vector_k = logit_k."""
    factors_R1K = torch.linalg.solve(gram_RKK, logits_RK.float().unsqueeze(2)).mT
    return (factors_R1K @ vectors_RKH).squeeze(1)


# real states


def real(
    model: Path,
    data: Path,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cache: Path | None = None,
) -> HeadStates:
    """Last hidden states of a local model on the solutions of a problem file, plain prompt and guided prompt.

    Policy rows and distillation rows are the same tokens: the solution under the plain prompt, its own next token as
    the target; the teacher's rows are those tokens under the guided prompt. A problem without a `strategy` gets
    GENERIC_STRATEGY. Calculator marks <<...>> are taken out of the solutions.

    Args:
        cache: a .pt file to read the states from, or to write them to; one of another request is written anew.
    """
    if not data.is_file():
        raise SgpoError(f"No problem file at {data}: give --data a JSONL file with problem, answer and solution.")
    source = {"kind": "real", "model": model.name, "data": data.name, "rows": rows, "dtype": str(dtype)}
    source["guidance"] = f"strategy of the problem, else: {GENERIC_STRATEGY}"
    if (found := _cached(cache, source, device)) is not None:
        return found
    tokenizer = load_tokenizer(model)
    lm = load_causal_lm(model, dtype="float32").to(device).eval()
    policy = PolicyModel(lm)
    builder = PromptBuilder(tokenizer, PromptTemplate.load(), max_prompt_tokens=4096)
    plain, guided, targets = [], [], []
    for problem in load_problems(str(data), limit=max(rows // 20, 20)):
        if sum(map(len, targets)) >= rows:
            break
        states = _two_contexts(policy, tokenizer, builder, problem, device)
        for part, value in zip((plain, guided, targets), states, strict=True):
            part.append(value)
    if sum(map(len, targets)) < rows:
        raise SgpoError(f"{data} has only {sum(map(len, targets))} solution tokens in reach, {rows} were asked for.")
    hidden, teacher = (torch.cat(part)[:rows].to(dtype) for part in (plain, guided))
    head = lm.get_output_embeddings().weight.detach().to(dtype)
    return _keep(cache, HeadStates(hidden, torch.cat(targets)[:rows], hidden, teacher, head, source))


def _cached(cache: Path | None, source: dict[str, Any], device: str) -> HeadStates | None:
    """The states in a file, if they are of this source."""
    if cache is None or not cache.is_file():
        return None
    saved = torch.load(cache, weights_only=True, map_location=device)
    return HeadStates(**saved, source=source) if saved.pop("source") == source else None


def _keep(cache: Path | None, states: HeadStates) -> HeadStates:
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        names = ("policy_hidden", "policy_targets", "distill_hidden", "teacher_hidden", "head", "source")
        torch.save({name: getattr(states, name) for name in names}, cache)
    return states


@torch.no_grad()
def _two_contexts(
    policy: PolicyModel, tokenizer: Any, builder: PromptBuilder, problem: Problem, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(plain, guided, targets) of one problem's solution tokens."""
    prompts = builder.build(replace(problem, strategy=problem.strategy or GENERIC_STRATEGY, guidance_turns=()))
    completion = tokenizer.encode(re.sub(r"<<.*?>>", "", problem.solution or ""), add_special_tokens=False)
    states, targets = [], torch.empty(0, dtype=torch.int64)
    for prompt in (prompts.plain, prompts.guided or ()):
        batch = collate([prompt], [completion], tokenizer.pad_token_id).to(torch.device(device))
        states.append(policy.hidden(batch.input_ids, batch.rows))
        targets = batch.labels
    return states[0], states[1], targets


def own(
    model: Path,
    data: Path,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    cache: Path | None = None,
    tokens: int = 96,
) -> HeadStates:
    """Last hidden states of a local model on its own samples at temperature 1, at most `tokens` long.

    Policy rows: samples of the plain prompts. Distillation rows: samples of the guided prompts, under the plain prompt
    (student) and the guided one (teacher). Problems are guided in turn by GENERIC_STRATEGY and by two worked examples
    as chat turns, the file's next problems. `cache` as for `real`.
    """
    if not data.is_file():
        raise SgpoError(f"No problem file at {data}: give --data a JSONL file with problem, answer and solution.")
    source = {"kind": "own", "model": model.name, "data": data.name, "rows": rows, "dtype": str(dtype), "seed": seed}
    source |= {"guidance": f"in turn two worked examples, and: {GENERIC_STRATEGY}", "tokens": tokens}
    if (found := _cached(cache, source, device)) is not None:
        return found
    torch.manual_seed(seed)
    tokenizer, lm = load_tokenizer(model), load_causal_lm(model, dtype="float32").to(device).eval()
    policy = PolicyModel(lm)
    builder = PromptBuilder(tokenizer, PromptTemplate.load(), max_prompt_tokens=4096)
    parts: list[list[Tensor]] = [[], [], [], []]  # of policy rows, targets, distillation rows, teacher's rows
    problems = load_problems(str(data), limit=max(rows // 8, 20))
    for start in range(0, len(problems) - _BATCH - 2, _BATCH):
        pairs = [builder.build(_guided(problems, index)) for index in range(start, start + _BATCH)]
        plain, guided = [pair.plain for pair in pairs], [pair.guided or () for pair in pairs]
        alone, shown = (_samples(lm, tokenizer, prompts, tokens) for prompts in (plain, guided))
        for kept, (prompts, completions) in zip(
            (parts[0], parts[2], parts[3]), ((plain, alone), (plain, shown), (guided, shown)), strict=True
        ):
            batch = collate(prompts, completions, tokenizer.pad_token_id).to(torch.device(device))
            with torch.no_grad():
                kept.append(policy.hidden(batch.input_ids, batch.rows))
            parts[1] += [batch.labels] if kept is parts[0] else []
        if min(sum(map(len, part)) for part in parts) >= rows:
            break
    else:
        raise SgpoError(f"{data} has too few problems for {rows} rows.")
    hidden, targets, student, teacher = (torch.cat(part)[:rows] for part in parts)
    head = lm.get_output_embeddings().weight.detach().to(dtype)
    states = HeadStates(hidden.to(dtype), targets, student.to(dtype), teacher.to(dtype), head, source)
    return _keep(cache, states)


def _guided(problems: Sequence[Problem], index: int) -> Problem:
    """The problem with a strategy (even index) or two worked examples (odd)."""
    if index % 2 == 0:
        return replace(problems[index], strategy=GENERIC_STRATEGY, guidance_turns=())
    shown = [(one.problem, re.sub(r"<<.*?>>", "", one.solution or "")) for one in problems[index + 1 : index + 3]]
    turns = tuple(ChatTurn(*turn) for pair in shown for turn in zip(("user", "assistant"), pair, strict=True))
    return replace(problems[index], strategy=None, guidance_turns=turns)


@torch.no_grad()
def _samples(lm: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """One completion per prompt at temperature 1, up to and with its end-of-sequence token."""
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=lm.device)
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=lm.device)
    free: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    end = tokenizer.eos_token_id
    output = lm.generate(ids, attention_mask=mask, max_new_tokens=tokens, use_cache=True, eos_token_id=end, **free)
    rows = output[:, longest:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


# what states are like


def summary(states: HeadStates, *, rows: int = 512) -> dict[str, Any]:
    """Entropy of the policy rows, KL(teacher || student), |h_T - h_S| / |h_S|: in fp64, on the first rows."""
    part = states.first(rows, rows)
    head = part.head.double()
    entropies, kls = [], []
    for start in range(0, max(len(part.policy_hidden), len(part.distill_hidden)), 64):
        block = slice(start, start + 64)
        entropies.append(_entropy(part.policy_hidden[block].double() @ head.t()))
        student, teacher = (h[block].double() @ head.t() for h in (part.distill_hidden, part.teacher_hidden))
        kls.append(_kl(teacher, student))
    distance_N = (part.teacher_hidden.double() - part.distill_hidden.double()).norm(dim=1)
    ratio_N = distance_N / part.distill_hidden.double().norm(dim=1)
    return {
        "summary_rows": [len(part.policy_hidden), len(part.distill_hidden)],
        **_quantiles("entropy", torch.cat(entropies), above=1.0),
        **_quantiles("kl", torch.cat(kls), above=1.0),
        "state_distance_p50": float(ratio_N.median()) if len(ratio_N) else None,
    }


def _quantiles(name: str, value_N: Tensor, *, above: float) -> dict[str, Any]:
    if not len(value_N):
        return {}
    shares = torch.tensor(SUMMARY_SHARES, dtype=value_N.dtype, device=value_N.device)
    found: Sequence[float] = value_N.quantile(shares).tolist()
    named = {f"{name}_p{share * 100:g}": value for share, value in zip(SUMMARY_SHARES, found, strict=True)}
    return {f"{name}_mean": float(value_N.mean()), f"{name}_above_1": float((value_N > above).double().mean()), **named}


def _entropy(logits_NV: Tensor) -> Tensor:
    logp_NV = logits_NV.log_softmax(1)
    return -(logp_NV.exp() * logp_NV).sum(1)


def _kl(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """KL(softmax first || softmax second) per row."""
    logp_NV = first_NV.log_softmax(1)
    return (logp_NV.exp() * (logp_NV - second_NV.log_softmax(1))).sum(1)
