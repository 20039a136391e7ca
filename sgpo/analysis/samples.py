"""The completions of all draws: sampled once, judged, and each on the disk before it counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgpo.analysis import transfer
from sgpo.analysis.design import Design, Study
from sgpo.analysis.settings import AnalyzeConfig
from sgpo.analysis.transfer import Draw
from sgpo.builders.rollouts import build_rewards, build_rollouts
from sgpo.rewards.pool import RewardPool
from sgpo.rewards.scoring import completion_text, judged_item
from sgpo.strategies.display import ExtractDisplay
from sgpo.types import Problem, RewardResult, Rollout, RolloutRequest, SamplingParams, SgpoError
from sgpo.utils.append_log import KeyedLines
from sgpo.utils.seeds import seed_of

_CHUNK = 4096  # requests of one call of the engine
_FAILED = ("timeout", "error")  # a result of the machine rather than of the answer: the next run asks for it again

Row = dict[str, Any]


@dataclass
class Progress:
    """Counts for the display."""

    sampled: int = 0
    from_before: int = 0
    tokens: int = 0

    def status(self) -> str:
        """The counts as one line."""
        parts = [f"{self.sampled} sampled", f"{self.from_before} from before" if self.from_before else ""]
        return "  ".join(filter(None, [*parts, f"{self.tokens:,} tokens"]))


def collect(
    config: AnalyzeConfig, folder: Path, tokenizer: Any, study: Study, design: Design, path: Path
) -> dict[Draw, Row]:
    """The sampled and judged row of every draw; takes from the file at `path` what it holds, and adds the rest.

    A completion from before is judged again where the reward is another one now, or where its result failed.

    Raises SgpoError where every result fails with an error of the reward itself.
    """
    identity = {
        "model": str(folder.resolve()),
        "weights": sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")),
        "dtype": config.model.dtype,
        "engine": config.rollout.engine,
    }
    sampling = SamplingParams(config.rollout.temperature, config.rollout.top_p, config.rollout.max_new_tokens)
    requests = [_request(config.run.seed, study, design, n) for n in range(len(design.draws))]
    keys = [_digest(identity, asdict(sampling), request.prompt_ids, request.seed) for request in requests]
    judges = [_judge(config, study.problems[draw.problem], study.opening) for draw in design.draws]
    progress = Progress()

    def judge(n: int, row: Row) -> None:
        judging.begin(keys[n], {**row, "judge": judges[n]}, study.problems[design.draws[n].problem])

    def keep(rollout: Rollout) -> None:
        n = rollout.request.problem_index
        progress.sampled += 1
        progress.tokens += len(rollout.completion_ids)
        judge(n, _row(tokenizer, study, design.draws[n], rollout))

    display = ExtractDisplay(progress.status)
    with _open_store(path) as store, build_rewards(config) as rewards, display:
        judging = _Judging(rewards, store, study.opening, display.advance)
        missing = [n for n, key in enumerate(keys) if store.get(key) is None]
        progress.from_before = len(keys) - len(missing)
        display.start_round("samples", len(keys))
        for n, key in enumerate(keys):
            row = store.get(key)
            if row is not None and (row["judge"] != judges[n] or row["status"] in _FAILED):
                judge(n, row)
            elif row is not None:
                display.advance()
        judging.finish()
        if missing:
            rollouts = build_rollouts(config, folder)
            try:
                for start in range(0, len(missing), _CHUNK):
                    chosen = [requests[n] for n in missing[start : start + _CHUNK]]
                    rollouts.generate(chosen, sampling, None, keep)
                    judging.finish()
            finally:
                rollouts.close()
        rows = {draw: store.get(key) for draw, key in zip(design.draws, keys, strict=True)}
        found = {draw: {**row, "correct": _is_correct(config, row)} for draw, row in rows.items() if row is not None}
        if all(row["status"] == "error" for row in found.values()):
            raise SgpoError(f"the reward {config.reward.kind!r} failed on every completion: {rewards.last_cause}")
        return found


class _Judging:
    """Rows on their way through the reward workers to the store, which happens in this thread."""

    def __init__(self, rewards: RewardPool, store: KeyedLines[Row], opening: str, advance: Callable[[], None]) -> None:
        self._rewards, self._store, self._opening, self._advance = rewards, store, opening, advance
        self._pending: dict[Future[RewardResult], tuple[str, Row]] = {}

    def begin(self, key: str, row: Row, problem: Problem) -> None:
        item = judged_item(problem, row["text"], self._opening)
        self._pending[self._rewards.submit(item)] = key, row
        self._write_results([future for future in self._pending if future.done()])

    def finish(self) -> None:
        self._write_results(list(self._pending))

    def _write_results(self, futures: Sequence[Future[RewardResult]]) -> None:
        for future in futures:
            result = future.result()
            key, row = self._pending.pop(future)
            self._store.put(key, {**row, "reward": result.reward, "status": result.status})
            self._advance()


def _request(seed: int, study: Study, design: Design, n: int) -> RolloutRequest:
    """`problem_index` holds the number of the draw, by which the rollout is known when it comes back."""
    draw = design.draws[n]
    source = "" if draw.source is None else study.problems[draw.source].id
    of_draw = seed_of(seed, "strategies analyze", draw.arm, study.problems[draw.problem].id, source, draw.sample)
    kind = "auto" if draw.arm == "none" else "guided"
    return RolloutRequest(n, kind, draw.sample, design.prompts[draw], of_draw)


def _row(tokenizer: Any, study: Study, draw: Draw, rollout: Rollout) -> Row:
    foreign = draw.arm in transfer.FOREIGN and draw.source is not None
    return {
        "arm": draw.arm,
        "problem_id": study.problems[draw.problem].id,
        "strategy_of": study.problems[draw.source].id if foreign and draw.source is not None else None,
        "sample": draw.sample,
        "seed": rollout.request.seed,
        "prompt_tokens": len(rollout.request.prompt_ids),
        "tokens": len(rollout.completion_ids),
        "truncated": rollout.truncated,
        "text": completion_text(tokenizer, rollout.completion_ids),
        "completion_ids": list(rollout.completion_ids),
    }


def _open_store(path: Path) -> KeyedLines[Row]:
    def read(row: Row) -> Row:
        return {**row, "reward": float(row["reward"]), "judge": row["judge"], "completion_ids": row["completion_ids"]}

    return KeyedLines(path, what="file of samples", setting="analyze.output", read=read, write=lambda row: row)


def _is_correct(config: AnalyzeConfig, row: Row) -> bool:
    """By the threshold of now: the file of samples keeps rewards."""
    return RewardResult(row["reward"], row["status"], config.reward.correct_above).is_correct


def _judge(config: AnalyzeConfig, problem: Problem, opening: str) -> str:
    reward = config.reward
    thinking = [opening] if opening else []  # none: the digest of a file from before is the same
    return _digest(reward.kind, reward.require_box, reward.max_chars, problem.answer, problem.problem, *thinking)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
