"""Plans beside the plan: the largest micro-batch that fits, and the cheapest changes that would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from sgpo.config import Config
from sgpo.planning.architectures import Architecture
from sgpo.planning.memory import CARDS_GIB, GIB, Place, Plan, Planner
from sgpo.types import SgpoError
from sgpo.utils.config_file import checked

Change = dict[str, Any]
# What a change costs beside its keys: it alters what is learnt, or it needs another machine.
ALTERS, HARDWARE = 2, 4
_LEARNING = ("model.lora.rank", "rollout.max_new_tokens", "data.max_prompt_tokens")
HOST_MEMORY = "plan.host_memory_gib"
ENOUGH = math.inf  # of it while searching: as much as the plan then needs


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


def cheapest_changes(
    config: Config, sizes: Architecture, place: Place, limit: int = 3, *, machines: bool = True
) -> list[Change]:
    """The `limit` cheapest sets of changes that make the plan fit, each {"set": {key: value}, "step_seconds": s}.

    The price of a set is the number of its keys, more where it alters what is learnt, most where it needs another
    machine; then the shorter step. All sets of one and two changes are tried by planning again; where these are too
    few, each change is the start of a larger set: the change that saves most is added until all fits, and what turns
    out to be superfluous is taken out again.
    """
    search = _Search(config, sizes, place)
    singles = [*_candidates(config, sizes, place), *(_of_machines(config, place) if machines else ())]
    found = search.fitting(singles)
    if len(found) < limit:
        found += search.fitting(_joined(pair) for pair in combinations(singles, 2) if _joined(pair))
    if len(_cheapest(found, limit)) < limit:
        found += search.fitting(filter(None, (search.completed(start, singles) for start in [{}, *singles])))
    return _cheapest(found, limit)


class _Search:
    """Plans of changed configs, each made once."""

    def __init__(self, config: Config, sizes: Architecture, place: Place) -> None:
        self.config, self.sizes, self.place = config, sizes, place
        self._plans: dict[tuple[Any, ...], Plan | None] = {}

    def plan(self, wanted: Change) -> Plan | None:
        """None where the keys do not go together."""
        key = tuple(sorted(wanted.items()))
        if key not in self._plans:
            try:
                changed = _with(self.config, {name: v for name, v in wanted.items() if not name.startswith("plan.")})
                self._plans[key] = Planner(changed, self.sizes, _moved(self.place, wanted, self.config)).plan()
            except SgpoError:
                self._plans[key] = None
        return self._plans[key]

    def missing(self, wanted: Change) -> float:
        plan = self.plan(wanted)
        return math.inf if plan is None else sum(plan.missing.values())

    def fitting(self, sets: Iterable[Change]) -> list[Change]:
        """Those that fit, with what the host then needs in the place of ENOUGH."""
        found = []
        for wanted in sets:
            plan = self.plan(wanted)
            if plan is not None and plan.fits:
                need = math.ceil(max(phase.host_bytes for phase in plan.phases.values()) / GIB)
                named = {key: need if value == ENOUGH else value for key, value in wanted.items()}
                found.append({"set": named, "step_seconds": round(plan.step_seconds, 1)})
        return found

    def completed(self, start: Change, candidates: list[Change]) -> Change | None:
        """A minimal set with `start` that fits; None where no change saves anything more."""
        wanted, chosen = start, [start]
        while missing := self.missing(wanted):
            if missing == math.inf:
                return None
            steps = [(change, joined) for change in candidates if (joined := _joined((wanted, change)))]
            better = [(_extra(change), self.missing(joined), change, joined) for change, joined in steps]
            better = [step for step in better if step[1] < missing]
            if not better:
                return None
            # What costs keys alone first: of these the one that saves most.
            _, _, change, wanted = min(better, key=lambda step: step[:2])
            chosen.append(change)
        for change in reversed(chosen[1:-1]):
            rest = _joined([other for other in chosen if other is not change])
            if rest and not self.missing(rest):
                wanted, chosen = rest, [other for other in chosen if other is not change]
        return wanted


def _price(wanted: Change) -> int:
    return len(wanted) + _extra(wanted)


def _extra(wanted: Change) -> int:
    machine = any(key.startswith("plan.") for key in wanted)
    return ALTERS * any(key in _LEARNING for key in wanted) + HARDWARE * machine


def _cheapest(found: list[Change], limit: int) -> list[Change]:
    """Without those that hold a cheaper one."""
    kept: list[Change] = []
    for change in sorted(found, key=lambda change: (_price(change["set"]), change["step_seconds"])):
        if not any(_holds(change["set"], one["set"]) for one in kept):
            kept.append(change)
    return kept[:limit]


def _holds(wanted: Change, part: Change) -> bool:
    """Whether `wanted` asks for all that `part` asks for; more memory is more."""
    return all(wanted.get(k) == v or (k == HOST_MEMORY and wanted.get(k, 0) >= v) for k, v in part.items())


def _joined(changes: Iterable[Change]) -> Change:
    """All of them; empty where two give one key different values, or one adds nothing."""
    joined: Change = {}
    for change in changes:
        if any(joined.get(key, value) != value for key, value in change.items()) or (
            change and change.items() <= joined.items()
        ):
            return {}
        joined = joined | change
    return joined


def _candidates(config: Config, sizes: Architecture, place: Place) -> Iterator[Change]:
    """Changes worth trying, each valid by itself."""
    yield from _of_activations(config, sizes, place)
    yield from _of_states(config, place)
    yield from _of_rollouts(config, sizes, place)
    yield from _of_lengths(config)


def _of_activations(config: Config, sizes: Architecture, place: Place) -> Iterator[Change]:
    model, on_gpu = config.model, place.gpu_bytes is not None
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if not model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    if on_gpu and not model.activation_offload:
        yield {"model.activation_offload": True} | (
            {} if model.gradient_checkpointing else {"model.gradient_checkpointing": True}
        )
    if min(longest, model.mlp_tile_tokens or longest) > 2048:
        yield {"model.mlp_tile_tokens": 2048}
    part = -(-longest // config.engine.sequence_parallel_size)
    if config.engine.micro_batch_tokens > part:
        yield {"engine.micro_batch_tokens": part}
    shared = 2 * config.engine.sequence_parallel_size
    divides = not (place.processes % shared or sizes.heads % shared or sizes.kv_heads % shared)
    if divides and model.attn_implementation == "sdpa":
        yield {"engine.sequence_parallel_size": shared}
    if model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}


def _of_states(config: Config, place: Place) -> Iterator[Change]:
    engine = config.engine
    staged = {} if engine.zero_stage >= 2 else {"engine.zero_stage": 2}
    if staged and place.processes > 1:
        yield staged
    if engine.zero_stage < 3 and place.processes > 1:
        yield {"engine.zero_stage": 3}
    for state in ("8bit", "cpu_offload"):
        if engine.optimizer_state != state:
            yield {"engine.optimizer_state": state} | staged
    if place.gpu_bytes is not None and not engine.offload_states_during_rollout:
        yield {"engine.offload_states_during_rollout": True} | (
            {} if engine.zero_stage == 2 else {"engine.zero_stage": 2}
        )
    if not config.model.lora.rank:
        yield {"model.lora.rank": 16}


def _of_rollouts(config: Config, sizes: Architecture, place: Place) -> Iterator[Change]:
    rollout, vllm = config.rollout, config.rollout.vllm
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    if rollout.engine == "hf":
        if rollout.max_batch_tokens > longest:
            yield {"rollout.max_batch_tokens": longest}
        return
    planner = Planner(config, sizes, place)
    for sequences in (16, 4, 1):
        yield {"rollout.vllm.kv_cache_mib": math.ceil(sequences * longest * planner.kv_bytes_per_token() / 2**20)}
    if (vllm.max_num_batched_tokens or 8192) > 2048:
        yield {"rollout.vllm.max_num_batched_tokens": 2048}
    if place.gpu_bytes is None:
        return
    if vllm.kv_cache_mib is None:
        for share in (0.9, 0.7, 0.5, 0.3, 0.2):
            if share != vllm.gpu_memory_utilization:
                yield {"rollout.vllm.gpu_memory_utilization": share}
    if config.sleep_level(cuda=True) != 2 and rollout.placement == "inprocess":
        yield {"rollout.vllm.sleep_level": 2}
    if place.processes > 1 and vllm.tensor_parallel_size == 1 and rollout.placement == "inprocess":
        yield {"rollout.vllm.tensor_parallel_size": 2}


def _of_lengths(config: Config) -> Iterator[Change]:
    """Shorter completions, with the micro-batch that they allow, and shorter prompts."""
    prompt, new = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    for share in (2, 4, 8):
        if new >= share:
            smaller = config.engine.micro_batch_tokens > (longest := prompt + new // share)
            batch = {"engine.micro_batch_tokens": longest} if smaller else {}
            yield {"rollout.max_new_tokens": new // share} | batch
    if prompt >= 1024:
        yield {"data.max_prompt_tokens": prompt // 2}


def _of_machines(config: Config, place: Place) -> Iterator[Change]:
    yield {HOST_MEMORY: ENOUGH}
    if place.gpu_bytes is not None:
        share = config.rollout.problems_per_step // config.algorithm.mini_batches
        yield from ({"plan.gpus": n} for n in (times * place.processes for times in (2, 4, 8)) if share % n == 0)
        yield from ({"plan.card": card} for card, size in CARDS_GIB.items() if size * GIB > place.gpu_bytes)


def _moved(place: Place, wanted: Change, config: Config) -> Place:
    """`place` with the machine that the keys of `plan` in `wanted` ask for."""
    if gpus := wanted.get("plan.gpus"):
        place = replace(place, processes=gpus, per_host=min(gpus, config.plan.gpus_per_host))
    if card := wanted.get("plan.card"):
        place = replace(place, gpu_bytes=CARDS_GIB[card] * GIB, card=card)
    if host := wanted.get(HOST_MEMORY):
        place = replace(place, host_bytes=host * GIB)
    return place


def _with(config: Config, wanted: Change) -> Config:
    """Only the sections that change are validated anew, and the pairs of sections. Raises SgpoError."""
    sections: dict[str, Any] = dict(config)
    for name in {key.split(".")[0] for key in wanted}:
        raw = sections[name].model_dump()
        for key, value in wanted.items():
            section, *path, leaf = key.split(".")
            if section == name:
                place = raw
                for part in path:
                    place = place[part]
                place[leaf] = value
        sections[name] = checked(type(sections[name]), raw, "change")
    return checked(Config, sections, "change")
