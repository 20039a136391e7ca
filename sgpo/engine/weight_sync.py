"""The sampler bound to the trainer's weights: every sync is proved, a dead sampler replaced, stale weights refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sgpo.engine.step import score_contexts
from sgpo.engine.zero import Parts, ZeroEngine
from sgpo.types import EngineFailure, Rollout, RolloutEngine, RolloutRequest, SamplingParams, SgpoError, SyncReceipt
from sgpo.utils import distributed
from sgpo.utils.checksums import checksum


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Bytes that went over, and the gap between sampler and trainer on the probe: |log-prob difference| in nats."""

    sync_bytes: int
    sync_gap_mean: float
    sync_gap_max: float


class PolicySampler:
    """A sampler of the current policy: it has the trainer engine's weights, proved at every sync.

    Every method is collective: all ranks call it, in one order.

    Args:
        trainer_engine: whose weights they are.
        sampler: what samples, in this process or in one of its own.
        probe_ids: the fixed text on which both must agree after every sync.
        tolerance: largest mean |log-prob gap| on it, in nats.
        adapters: the sampler has adapters of its own, and a sync sends these alone. The first sync sends the
            frozen weights as well, and so does one after which a sampler was lost: they are proved as all others are.
        checkpoint_names: the sampler knows weights as a checkpoint has them; False: as transformers has them in memory.
    """

    def __init__(
        self,
        trainer_engine: ZeroEngine,
        sampler: RolloutEngine,
        *,
        probe_ids: Sequence[int],
        tolerance: float,
        token_budget: int,
        pad_id: int,
        adapters: bool = False,
        checkpoint_names: bool = True,
    ) -> None:
        self._trainer_engine = trainer_engine
        self._sampler = sampler
        self._probe_ids = tuple(probe_ids)
        self._tolerance = tolerance
        self._adapters = adapters
        self._checkpoint_names = checkpoint_names
        self._batching = {"token_budget": token_budget, "pad_id": pad_id}
        self._ahead: _Ahead | None = None
        self._has_synced = False
        self.policy_version: int | None = None

    def sync(self, version: int) -> SyncReport:
        """Hands the trainer's weights to the sampler and proves that it has them, before anything is sampled.

        Raises SgpoError on every rank if on any a tensor was lost or changed on its way, or the log-probs disagree.
        """
        self.policy_version = None
        wanted = score_contexts(self._trainer_engine, [(self._probe_ids[:1], self._probe_ids[1:])], **self._batching)[0]
        self._trainer_engine.offload_states()  # the sampler is about to wake
        sent: dict[str, int] = {}
        size = [0]
        parts = self._parts()
        named = self._recorded(parts, sent, size)
        gaps, problem = [0.0], None
        try:
            receipt = self._sampler.load_weights(named, version, self._probe_ids)
            gaps = [abs(a - b) for a, b in zip(receipt.probe_logprobs, wanted, strict=True)] or [0.0]
            names = self._trainer_engine.weight_names(parts, checkpoint_names=self._checkpoint_names)
            problem = _mismatch(sent, receipt, names, gaps, self._tolerance)
        except SgpoError as error:
            problem = str(error)
            for _ in named:  # other ranks wait for this one in the gathers of ZeRO-3
                pass
        if problems := dict.fromkeys(found for found in distributed.gather(problem) if found):
            family = self._trainer_engine.model.lm.config.model_type
            advice = "" if self._has_synced else "; rollout.engine: hf samples from every family that is trained"
            raise SgpoError(
                f"weights of step {version} (model family {family}): {'; '.join(problems)}; "
                f"the last checkpoint is whole{advice}"
            )
        self.policy_version, self._has_synced = version, True
        return SyncReport(size[0], sum(gaps) / len(gaps), max(gaps))

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As RolloutEngine.generate; a sampler that dies is started anew, synced and asked once more."""

        def sample() -> list[Rollout]:
            return self._sampler.generate(requests, sampling, on_progress, on_rollout)

        return self._with_retry(sample, sample, self.policy_version)

    def begin(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> None:
        """Starts to sample in the background; `collect` waits for it. The sampler can do nothing else meanwhile."""
        self._ahead = _Ahead(lambda: self._sampler.generate(requests, sampling, None, on_rollout))

    def collect(self, version: int) -> list[Rollout]:
        """What `begin` asked for. `version` is that of the trainer's weights now, which a new sampler would get."""
        if self._ahead is None:
            raise RuntimeError("collect without begin")
        ahead, self._ahead = self._ahead, None
        return self._with_retry(ahead.wait, ahead.sample, version)

    def sleep(self) -> None:
        """The sampler gives its memory back, and the trainer takes its states from the host."""
        self._sampler.sleep()
        self._trainer_engine.reload_states()

    def asleep_bytes(self) -> int:
        """GPU memory that a sleeping sampler in this process has given back, which torch still counts as allocated."""
        return getattr(self._sampler, "asleep_bytes", 0)

    def close(self) -> None:
        """Ends the sampler."""
        self._sampler.close()

    def _with_retry(
        self, first: Callable[[], list[Rollout]], again: Callable[[], list[Rollout]], version: int | None
    ) -> list[Rollout]:
        if self.policy_version is None or version is None:
            raise SgpoError("nothing can be sampled before a weight sync has succeeded")
        failures: list[tuple[str | None, bool]] = []
        for attempt in (first, again):
            sampled: list[Rollout] = []
            failure, is_final = None, False
            try:
                sampled = attempt()
            except SgpoError as error:
                failure, is_final = str(error), not isinstance(error, EngineFailure)
            failures = [found for found in distributed.gather((failure, is_final)) if found[0]]
            if not failures:
                return sampled
            if any(final for _, final in failures):
                break
            print(f"sgpo: {failures[0][0]}; it is started anew and synced", flush=True)
            self.sync(version)
        raise SgpoError(f"{failures[0][0]}; the last checkpoint is whole")

    def _parts(self) -> Parts:
        """What is to be sent; the same on every rank, for ZeRO-3 gathers it."""
        held = distributed.gather(
            self._sampler.holds_base()
        )  # asked in any case: it finds a dead sampler, which is started anew
        if not self._adapters:
            return "merged"
        return "adapters" if all(held) else "apart"

    def _recorded(self, parts: Parts, sent: dict[str, int], size: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._trainer_engine.named_weights(parts, checkpoint_names=self._checkpoint_names):
            sent[name] = checksum(tensor)
            size[0] += tensor.nbytes
            yield name, tensor


class _Ahead:
    """A call in a thread of its own."""

    def __init__(self, sample: Callable[[], list[Rollout]]) -> None:
        self.sample = sample
        self._outcome: tuple[list[Rollout] | None, BaseException | None] = (None, None)
        self._thread = threading.Thread(target=self._run, name="rollouts ahead", daemon=True)
        self._thread.start()

    def wait(self) -> list[Rollout]:
        self._thread.join()
        rollouts, error = self._outcome
        if error is not None:
            raise error
        assert rollouts is not None
        return rollouts

    def _run(self) -> None:
        try:
            self._outcome = (self.sample(), None)
        except BaseException as error:  # raised where it is waited for
            self._outcome = (None, error)


def _mismatch(
    sent: Mapping[str, int], receipt: SyncReceipt, names: Sequence[str], gaps: Sequence[float], tolerance: float
) -> str | None:
    """What is wrong with a sync, or None."""
    for what, found in (
        ("never left the trainer", set(names) - set(sent)),
        ("did not arrive", set(sent) - set(receipt.checksums)),
        ("arrived though nobody sent it", set(receipt.checksums) - set(sent)),
        ("changed on its way", {n for n in sent if receipt.checksums.get(n, sent[n]) != sent[n]}),
    ):
        if found:
            return f"{sorted(found)[0]} {what} ({len(found)} tensors in all)"
    if not (mean := sum(gaps) / len(gaps)) <= tolerance:
        return (
            f"the rollout engine's log-probs differ from the trainer's by {mean:.2g} nats on average on a fixed text, "
            f"more than rollout.sync_tolerance = {tolerance:g}: its weights or its arithmetic are not the trainer's"
        )
    return None
