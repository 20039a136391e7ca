"""What a run learns: problems, their prompts in both contexts, demonstrations; all checked before hours are spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgpo.config import WITH_DEMONSTRATIONS, Config
from sgpo.data import builtin
from sgpo.data.problems import check_disjoint, load_problems
from sgpo.data.prompts import PromptBuilder, PromptTemplate, eos_token_ids
from sgpo.model.loading import check_length, check_token_ids, config_of
from sgpo.planning.architectures import check_sequence_parallel
from sgpo.strategies.calculator import attach_strategies
from sgpo.types import Problem, SgpoError, TaskData, TrainSequence
from sgpo.utils import distributed
from sgpo.utils.seeds import seed_of

_BUILTIN_COUNTS = {"train": 4096, "eval": 256}


def load_run_tasks(config: Config, model_folder: Path, tokenizer: Any) -> tuple[TaskData, TaskData | None]:
    """What the run trains on and, where data.eval names it, what it is evaluated on; checked against each other."""
    train = load_task(config, tokenizer, split="train")
    held_out = load_task(config, tokenizer, split="eval") if config.data.eval else None
    check_data(config, model_folder, train, held_out)
    tasks = [train] if held_out is None else [train, held_out]
    prompts = [ids for task in tasks for pair in task.prompts for ids in (pair.plain, pair.guided or ())]
    check_token_ids(model_folder, tokenizer, (*prompts, *(train.demo_ids or ())))
    return train, held_out


def load_task(config: Config, tokenizer: Any, *, split: str) -> TaskData:
    """Problems of `split` ("train" or "eval") with checked prompts."""
    source, limit = (
        (config.data.train, config.data.train_limit)
        if split == "train"
        else (config.data.eval or "", config.data.eval_limit)
    )
    problems = _load(config, source, limit, split)
    needs_guidance = split == "train" and config.rollout.n_guided > 0
    if needs_guidance and (bare := [p.id for p in problems if not p.has_guidance]):
        raise SgpoError(
            f"{source}: {len(bare)} of {len(problems)} problems have neither a strategy nor guidance turns "
            f"(first: {', '.join(bare[:3])}); add them, set data.strategy_source, or set rollout.n_guided to 0"
        )
    prompts = prompt_builder(config, tokenizer).check_all(problems)
    wanted = split == "train" and config.algorithm.method in WITH_DEMONSTRATIONS
    return TaskData(problems, prompts, _demonstrations(config, source, problems, tokenizer) if wanted else None)


def _demonstrations(config: Config, source: str, problems: list[Problem], tokenizer: Any) -> list[tuple[int, ...]]:
    """The problems' own solutions, each within the length of a rollout."""
    method, limit = config.algorithm.method, config.rollout.max_new_tokens
    if lacking := [p.id for p in problems if not p.solution]:
        raise SgpoError(
            f"{source}: method: {method} learns from solutions, which {len(lacking)} of {len(problems)} problems lack "
            f"(first: {', '.join(lacking[:3])}); add the field `solution`, or remove them"
        )
    eos = eos_token_ids(tokenizer, None)[0]
    demos = [(*tokenizer.encode(p.solution, add_special_tokens=False), eos) for p in problems]
    if long := [p.id for p, ids in zip(problems, demos, strict=True) if len(ids) > limit]:
        raise SgpoError(
            f"{source}: {len(long)} solutions have more tokens than rollout.max_new_tokens = {limit} "
            f"(first: {', '.join(long[:3])}); raise it, or remove them"
        )
    return demos


def check_data(config: Config, model_folder: Path, train: TaskData, evaluation: TaskData | None) -> None:
    """What only the data as a whole can tell: enough problems for a step, lengths, no overlap with the evaluation."""
    size = config.engine.sequence_parallel_size
    check_sequence_parallel(size, processes=distributed.world_size(), model=config_of(model_folder))
    if len(train.problems) < config.rollout.problems_per_step:
        raise SgpoError(
            f"{config.data.train} has {len(train.problems)} problems, fewer than "
            f"rollout.problems_per_step = {config.rollout.problems_per_step}; lower it or add problems"
        )
    share = config.algorithm.mini_batches * distributed.world_size()
    if config.rollout.problems_per_step % share:
        raise SgpoError(
            f"rollout.problems_per_step = {config.rollout.problems_per_step} must be a multiple of "
            f"algorithm.mini_batches x processes = {share}"
        )
    prompt = max(len(ids) for pair in train.prompts for ids in (pair.plain, pair.guided or ()))
    longest = prompt + config.rollout.max_new_tokens
    sequence = f"a sequence may have {longest} tokens (prompt {prompt} + rollout.max_new_tokens)"
    if longest > (budget := config.engine.micro_batch_tokens * size):
        of = "engine.micro_batch_tokens" + (" x engine.sequence_parallel_size" if size > 1 else "")
        raise SgpoError(f"{sequence}, more than {of} = {budget}; raise it or lower the other")
    check_length(model_folder, longest, sequence, "lower max_new_tokens")
    if evaluation is not None:
        check_disjoint(train.problems, evaluation.problems)


def prompt_builder(config: Config, tokenizer: Any) -> PromptBuilder:
    """What turns a problem into its two prompts, by data.template or the packaged one."""
    packaged = Path(builtin.__file__).parent / "templates" / "builtin.yaml"
    template = config.data.template or (str(packaged) if config.data.train == builtin.BUILTIN else None)
    return PromptBuilder(tokenizer, PromptTemplate.load(template), max_prompt_tokens=config.data.max_prompt_tokens)


def load_demonstrations(config: Config, tokenizer: Any, eos_id: int) -> list[TrainSequence]:
    """The warm-up's demonstrations as sequences whose completion ends with EOS; a seeded share of them is guided."""
    source = config.warmup.data or ""
    builder = prompt_builder(config, tokenizer)
    if source == builtin.BUILTIN:
        demos = builtin.make_demonstrations(seed=config.run.seed, count=config.warmup.limit or 4096)
        rows = [(demo.problem, demo.guided, demo.completion) for demo in demos]
    else:
        problems = _load(config, source, config.warmup.limit, "warmup")
        if lacking := [p.id for p in problems if not p.solution]:
            raise SgpoError(f"{source}: {len(lacking)} problems lack a solution to learn from (first: {lacking[0]})")
        share = config.warmup.guided_share
        rows = [(p, p.has_guidance and _seeded_share(config, p.id) < share, p.solution or "") for p in problems]
    pairs = builder.check_all([problem for problem, _, _ in rows])
    sequences = []
    for (problem, guided, completion), pair in zip(rows, pairs, strict=True):
        prompt = pair.guided if guided and pair.guided is not None else pair.plain
        ids = (*tokenizer.encode(completion, add_special_tokens=False), eos_id)
        if len(prompt) + len(ids) > config.warmup.max_tokens:
            raise SgpoError(
                f"{source}: demonstration {problem.id} has {len(prompt) + len(ids)} tokens, more than "
                f"warmup.max_tokens = {config.warmup.max_tokens}; shorten or remove it"
            )
        sequences.append(TrainSequence(prompt_ids=prompt, completion_ids=ids))
    return sequences


def _load(config: Config, source: str, limit: int | None, split: str) -> list[Problem]:
    if source == builtin.BUILTIN:
        name = "eval" if split == "eval" else "train"
        return builtin.make_problems(name, seed=config.run.seed, count=limit or _BUILTIN_COUNTS[name])
    problems = load_problems(source, limit=limit)
    if config.data.strategy_source == "calculator_trace":
        problems, _ = attach_strategies(problems)
        if split == "eval":
            return problems
        lacking = sum(not p.has_guidance for p in problems)
        if lacking:
            print(f"{source}: {lacking} of {len(problems)} problems have no calculator marks and are left out")
        problems = [p for p in problems if p.has_guidance]
        if not problems:
            raise SgpoError(f"{source}: no problem has a solution with <<...>> calculator marks; use another source")
    return problems


def _seeded_share(config: Config, problem_id: str) -> float:
    """A number from 0 to 1 that the seed and the problem decide."""
    return seed_of(config.run.seed, "guided demonstration", problem_id) / 2**63
