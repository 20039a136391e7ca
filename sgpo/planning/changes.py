"""Plans beside the plan: the largest micro-batch that fits, and the cheapest changes that would."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from sgpo.config import Config, checked
from sgpo.planning.architectures import Architecture
from sgpo.planning.memory import Place, Plan, Planner
from sgpo.schema import SgpoError


def largest_micro_batch(config: Config, sizes: Architecture, place: Place) -> int:
    """The largest engine.micro_batch_tokens that fits, in steps of 1024 and at least one sequence; 0: none does."""
    sequence = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    longest = -(-sequence // config.engine.sequence_parallel_size)

    def fits(tokens: int) -> bool:
        return Planner(_with(config, {"engine.micro_batch_tokens": tokens}), sizes, place).plan().fits

    if not fits(longest):
        return 0
    low, high = longest, longest
    while fits(2 * high) and high < 2**24:
        low, high = 2 * high, 2 * high
    high *= 2
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cheapest_changes(config: Config, sizes: Architecture, place: Place, limit: int = 3) -> list[dict[str, Any]]:
    """Up to `limit` sets of changes that make the plan fit, by re-planning with each: fewest keys first, then the
    shortest step. Each is {"set": {key: value}, "step_seconds": s}."""
    candidates = list(_candidates(config, place))
    found: list[dict[str, Any]] = []
    for size in (1, 2, 3, 4):
        fitting = []
        for chosen in combinations(candidates, size):
            wanted = {key: value for change in chosen for key, value in change.items()}
            if len(wanted) < sum(len(change) for change in chosen):  # two values of one key
                continue
            if any(one["set"].items() <= wanted.items() for one in found):
                continue
            if (plan := _try(config, wanted, sizes, place)) is not None and plan.fits:
                fitting.append({"set": wanted, "step_seconds": round(plan.step_seconds, 1)})
        found += sorted(fitting, key=lambda change: change["step_seconds"])
        if len(found) >= limit:
            break
    return found[:limit]


def _candidates(config: Config, place: Place) -> Iterator[dict[str, Any]]:
    """Changes worth trying. None alters what is learnt, but for the last two."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if not config.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    part = -(-longest // config.engine.sequence_parallel_size)
    if config.engine.micro_batch_tokens > part:
        yield {"engine.micro_batch_tokens": part}
    staged = config.engine.zero_stage >= 2
    if not staged and place.processes > 1:
        yield {"engine.zero_stage": 2}
    for state in ("8bit", "cpu_offload"):
        if config.engine.optimizer_state != state:
            yield {"engine.optimizer_state": state} | ({} if staged else {"engine.zero_stage": 2})
    if config.rollout.engine == "vllm":
        for share in (0.8, 0.6, 0.5, 0.4, 0.3, 0.2):
            if share != config.rollout.vllm.gpu_memory_utilization and place.gpu_bytes is not None:
                yield {"rollout.vllm.gpu_memory_utilization": share}
    elif config.rollout.max_batch_tokens > longest:
        yield {"rollout.max_batch_tokens": longest}
    if place.gpu_bytes is not None:
        yield {"plan.gpus": 2 * place.processes}
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if config.rollout.max_new_tokens > 1:
        yield {"rollout.max_new_tokens": max(1, config.rollout.max_new_tokens // 2)}


def _try(config: Config, wanted: dict[str, Any], sizes: Architecture, place: Place) -> Plan | None:
    try:
        changed = _with(config, wanted)
    except SgpoError:
        return None
    if gpus := wanted.get("plan.gpus"):
        place = Place(place.gpu_bytes, place.host_bytes, gpus, min(gpus, config.plan.gpus_per_host), place.card)
    return Planner(changed, sizes, place).plan()


def _with(config: Config, wanted: dict[str, Any]) -> Config:
    raw = config.model_dump()
    for key, value in wanted.items():
        *sections, leaf = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        place[leaf] = value
    return checked(Config, raw, "change")
