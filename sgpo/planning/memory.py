"""What a run will need, before anything is loaded: memory by phase and term, time by phase, and what to change.

Every term is a formula of the config and the model's sizes: those of training are in `training_memory`, those of
rollouts here. Terms that are not formulas are named constants below, with where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sgpo.planning.times import phase_seconds
from sgpo.planning.training_memory import GIB, Place, Terms, TrainingMemory

# Assumptions: CUDA context with libraries; what a sleeping vLLM keeps (CUDA graphs, workspaces); a Python process with
# torch and DeepSpeed, and a reward worker, on the host.
CUDA_CONTEXT, ASLEEP, PROCESS, REWARD_WORKER = 0.7 * GIB, 1.0 * GIB, 0.8 * GIB, 0.15 * GIB
# What a card that is sold as "24 GB" leaves to programs.
CARDS_GIB = {"24gb": 23.5, "80gb": 79.1, "141gb": 139.8}
SYNC_BUCKET = 256 * 2**20
HEADROOM = 0.97  # share of a GPU that may be planned: allocators fragment


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes by term, on one GPU and on one host, and seconds of a step; `resource` is what the time is spent on."""

    gpu: Terms
    host: Terms
    seconds: float = 0.0
    resource: str = ""

    @property
    def gpu_bytes(self) -> float:
        """All terms on one GPU."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        """All terms on one host."""
        return sum(self.host.values())

    @property
    def largest(self) -> str:
        """The name of the largest term, on the GPU where there is one."""
        return self.largest_on("GPU" if self.gpu else "host")

    def largest_on(self, where: str) -> str:
        """The name of the largest term on the "GPU" or the "host"."""
        terms = self.gpu if where == "GPU" else self.host
        return max(terms, key=lambda name: terms[name])


@dataclass(frozen=True, slots=True)
class Plan:
    """What each phase of a step takes on a machine, and the changes of the config that would make it fit."""

    phases: dict[str, Phase]
    place: Place
    parameters: int
    sequence_tokens: int
    kv_bytes: float
    kv_bytes_per_token: float
    changes: list[dict[str, Any]] = field(default_factory=list)
    largest_micro_batch_tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return int(self.kv_bytes // self.kv_bytes_per_token)

    @property
    def kv_sequences(self) -> int:
        """Sequences of full length that the KV cache holds at the same time."""
        return self.kv_tokens // self.sequence_tokens

    @property
    def missing(self) -> dict[tuple[str, str], float]:
        """(phase, "GPU" or "host") -> bytes too many; ("rollout", "KV cache") -> bytes too few for a full sequence."""
        found: dict[tuple[str, str], float] = {}
        for name, phase in self.phases.items():
            for where, used, limit in (
                ("GPU", phase.gpu_bytes, (self.place.gpu_bytes or 0.0) * HEADROOM),
                ("host", phase.host_bytes, self.place.host_bytes),
            ):
                if used > limit:
                    found[name, where] = used - limit
        if self.kv_sequences < 1:
            found["rollout", "KV cache"] = self.sequence_tokens * self.kv_bytes_per_token - self.kv_bytes
        return found

    @property
    def fits(self) -> bool:
        """Whether every phase has room."""
        return not self.missing

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, an upper bound."""
        return sum(phase.seconds for phase in self.phases.values())

    def refusal(self) -> str:
        """One sentence: the worst phase, the missing GiB, the cheapest changes."""
        (phase, where), missing = max(self.missing.items(), key=lambda item: item[1])
        ways = "; or ".join(describe_change(change) for change in self.changes) or "no change of the config does"
        what = f"{missing / GIB:.2f} GiB too few in the KV cache for one sequence of {self.sequence_tokens} tokens"
        if where != "KV cache":
            largest = self.phases[phase].largest_on(where)
            what = f"{missing / GIB:.2f} GiB too much on the {where} (largest term: {largest})"
        return f"the plan does not fit: phase {phase}, {what}; what makes it fit: {ways}"


def describe_change(change: dict[str, Any]) -> str:
    """The change as words of the command line."""
    return " and ".join(f"--{key} {value}" for key, value in change["set"].items())


class Planner(TrainingMemory):
    """The phases of a step, of one config on one place."""

    def plan(self) -> Plan:
        """Every phase of a step with its terms."""
        beside = self._context() | self._asleep()
        training = self.training()
        phases = {
            "load": self._phase(self._context() | self.load(), {"weights from disk": self._from_disk()}),
            "rollout": self._rollout(),
            "score": self._phase(beside | self.states() | self.gathered() | self.scoring(), self._asleep_on_host()),
            "forward": self._phase(beside | training["forward"], self._asleep_on_host() | self._activations_on_host()),
            "backward": self._phase(
                beside | training["backward"], self._asleep_on_host() | self._activations_on_host()
            ),
            "optimizer": self._phase(beside | training["optimizer"], self._asleep_on_host()),
            "sync": self._phase(self._resident() | self._awake() | {"sync buckets": 2 * SYNC_BUCKET * self.cuda}, {}),
        }
        phases = {name: self._timed(name, phase) for name, phase in phases.items()}
        return Plan(phases, self.place, self.held, self.sequence, self._kv_bytes(), self.kv_bytes_per_token())

    # --- rollouts ---

    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token in all layers, on one GPU."""
        return 2.0 * self.sizes.layers * self.sizes.kv * self.s / self.config.rollout.vllm.tensor_parallel_size

    def _engine_weights(self) -> float:
        return self.s * self.P / self.config.rollout.vllm.tensor_parallel_size

    def _kv_bytes(self) -> float:
        rollout = self.config.rollout
        if rollout.engine == "hf":
            return max(rollout.max_batch_tokens, self.sequence) * self.kv_bytes_per_token()
        if rollout.vllm.kv_cache_mib is not None:
            return rollout.vllm.kv_cache_mib * 2.0**20
        if not self.cuda:
            return 512.0 * 2**20
        share = rollout.vllm.gpu_memory_utilization * (self.place.gpu_bytes or 0.0)
        return max(0.0, share - self._engine_weights() - self._engine_work())

    def _engine_work(self) -> float:
        """Activations of one forward pass of the engine (vLLM: 8192 tokens unless told), and sampled logits in fp32."""
        rollout, a = self.config.rollout, self.sizes
        if rollout.engine == "hf":
            rows = max(1, rollout.max_batch_tokens // self.sequence)
            prompts = rows * self.config.data.max_prompt_tokens
            return prompts * self.s * (3 * a.intermediate + 4 * a.hidden) + 3 * 4.0 * rows * a.vocab
        tokens = rollout.vllm.max_num_batched_tokens or 8192
        return tokens * self.s * (3 * a.intermediate + 4 * a.hidden) + 2 * 4.0 * rollout.vllm.max_num_seqs * a.vocab

    def _has_own_cards(self) -> bool:
        rollout = self.config.rollout
        return self.cuda and rollout.placement == "process" and bool(rollout.devices)

    def _awake(self) -> Terms:
        if self._has_own_cards():
            return {}
        return {
            "engine's weights": self._engine_weights(),
            "KV cache": self._kv_bytes(),
            "engine's activations": self._engine_work(),
        }

    def _sleep_level(self) -> int:
        rollout = self.config.rollout
        sleeps = rollout.engine == "vllm" and self.cuda and not rollout.overlap
        return self.config.sleep_level(cuda=self.cuda) if sleeps else 0

    def _asleep(self) -> Terms:
        """The engine while the trainer works, on the device."""
        if self._has_own_cards():
            return {}
        if self.config.rollout.engine == "hf":
            return {"engine's weights": self._engine_weights()}
        if self._sleep_level() == 0:
            return {k: v for k, v in self._awake().items() if k != "engine's activations"}
        return {"engine asleep": ASLEEP}

    def _asleep_on_host(self) -> Terms:
        return {"sleeping engine's weights": self._engine_weights()} if self._sleep_level() == 1 else {}

    def _activations_on_host(self) -> Terms:
        if not (self.config.model.activation_offload and self.cuda):
            return {}
        layers = self.sizes.layers
        return {"checkpoint boundaries": layers * self.pinned(self.boundaries() / layers)}

    def _rollout(self) -> Phase:
        states, host = self._resident(), {}
        if self.config.engine.offload_states_during_rollout:
            host = {name: self.pinned(states.pop(name)) for name in ("fp32 master", "Adam moments")}
        return self._phase(states | self._awake(), host)

    # --- assembly ---

    def _from_disk(self) -> float:
        """Weights on their way to the GPU: the trainer's, before it makes its states on the host; then the engine's,
        which vLLM gets by a sync instead."""
        weights = self.s * self.P * self.cuda
        return weights if self.config.rollout.engine == "hf" else max(0.0, weights - sum(self.host_states().values()))

    def _resident(self) -> Terms:
        return self._context() | self.states()

    def _context(self) -> Terms:
        return {"CUDA context": CUDA_CONTEXT} if self.cuda else {}

    def _phase(self, device: Terms, host: Terms) -> Phase:
        """Terms of one process -> of one GPU and one host; on a CPU all is host memory."""
        count = self.place.per_host
        host = host | self.host_states()
        if not self.cuda:
            device, host = {}, {name: host.get(name, 0.0) + device.get(name, 0.0) for name in host | device}
        host = host | {"processes": PROCESS, "reward workers": self.config.reward.workers * REWARD_WORKER}
        return Phase(
            {name: size for name, size in device.items() if size},
            {name: count * size for name, size in host.items() if size},
        )

    def _timed(self, name: str, phase: Phase) -> Phase:
        seconds, resource = phase_seconds(self, name)
        return Phase(phase.gpu, phase.host, seconds, resource)
