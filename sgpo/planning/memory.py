"""What a run will need, before anything is loaded: memory by phase and term, time by phase, and what to change.

Every term is a formula of the config and the model's sizes; P weights, W processes, s bytes of a weight, T tokens of a
micro-batch. The gradient and state terms follow DeepSpeed 0.19 as sgpo.engine.zero configures it:

  stage 0 fp32   gradients 4P, moments 8P, no master        stage 0 bf16  gradients 2P, in the step another 4P in fp32
  stage 1        gradients 4P in fp32 on every process, and the partition's flat copy, 4P/W, until the step is done
  stage 2, 3     gradients 4P/W in fp32 (2 in fp32: flattened once more in the step), and the bucket that reduces them

Terms that are not formulas are named constants below, with where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sgpo.config import Config
from sgpo.planning.architectures import Architecture
from sgpo.planning.times import phase_seconds

GIB = 2**30
# Assumptions: CUDA context with libraries; what a sleeping vLLM keeps (CUDA graphs, workspaces); a Python process with
# torch and DeepSpeed, and a reward worker, on the host.
CUDA_CONTEXT, ASLEEP, PROCESS, REWARD_WORKER = 0.7 * GIB, 1.0 * GIB, 0.8 * GIB, 0.15 * GIB
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size, which sgpo.engine.zero leaves as it is
LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
SYNC_BUCKET = 256 * 2**20
HEADROOM = 0.97  # share of a GPU that may be planned: allocators fragment
PHASES = ("load", "rollout", "score", "forward", "backward", "optimizer", "sync")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the run happens; `gpu_bytes` None: on the CPU, everything in host memory."""

    gpu_bytes: float | None
    host_bytes: float
    processes: int = 1
    per_host: int = 1
    card: str = "cpu"

    @property
    def device_type(self) -> str:
        return "cpu" if self.gpu_bytes is None else "cuda"


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes by term, on one GPU and on one host, and seconds of a step; `resource` is what the time is spent on."""

    gpu: dict[str, float]
    host: dict[str, float]
    seconds: float = 0.0
    resource: str = ""

    @property
    def gpu_bytes(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def largest(self) -> str:
        terms = self.gpu or self.host
        return max(terms, key=lambda name: terms[name])


@dataclass(frozen=True, slots=True)
class Plan:
    phases: dict[str, Phase]
    place: Place
    parameters: int
    sequence_tokens: int
    kv_tokens: int
    changes: list[dict[str, Any]] = field(default_factory=list)
    largest_micro_batch_tokens: int = 0

    @property
    def kv_sequences(self) -> int:
        """Sequences of full length that the KV cache holds at the same time."""
        return self.kv_tokens // self.sequence_tokens

    @property
    def missing(self) -> dict[tuple[str, str], float]:
        """(phase, "GPU" or "host") -> bytes too many; ("rollout", "KV cache") where no sequence of full length fits."""
        found: dict[tuple[str, str], float] = {}
        for name, phase in self.phases.items():
            for where, used, limit in (
                ("GPU", phase.gpu_bytes, (self.place.gpu_bytes or 0.0) * HEADROOM),
                ("host", phase.host_bytes, self.place.host_bytes),
            ):
                if used > limit:
                    found[name, where] = used - limit
        if self.kv_sequences < 1:
            found["rollout", "KV cache"] = 0.0
        return found

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def step_seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    def refusal(self) -> str:
        """One sentence: the worst phase, the missing GiB, the cheapest changes."""
        (phase, where), missing = max(self.missing.items(), key=lambda item: item[1])
        ways = "; or ".join(describe_change(change) for change in self.changes) or "no single change of the config does"
        what = "no sequence of full length fits into the KV cache"
        if where != "KV cache":
            largest = self.phases[phase].largest
            what = f"{missing / GIB:.2f} GiB too much on the {where} (largest term: {largest})"
        return f"the plan does not fit: phase {phase}, {what}; what makes it fit: {ways}"


def describe_change(change: dict[str, Any]) -> str:
    return " and ".join(f"--{key} {value}" for key, value in change["set"].items())


class Planner:
    """The arithmetic of one config on one place."""

    def __init__(self, config: Config, sizes: Architecture, place: Place) -> None:
        self.config, self.sizes, self.place = config, sizes, place
        self.cuda = place.gpu_bytes is not None
        self.bf16 = config.model.dtype == "bfloat16"
        self.s = 2 if self.bf16 else 4
        self.stage = config.engine.zero_stage
        self.state = getattr(config.engine, "optimizer_state", "full")
        self.W = place.processes
        self.P = sizes.parameters
        lora = getattr(config.model, "lora", None)
        rank = getattr(lora, "rank", 0) if lora is not None else 0
        self.trained = sizes.adapter_parameters(rank) if rank else self.P
        self.sequence = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        # S processes share a micro-batch of S x the budget: each has a part of its tokens, and one may have all rows.
        self.S = config.engine.sequence_parallel_size
        self.T = max(config.engine.micro_batch_tokens, self.sequence / self.S)
        self.distils = config.algorithm.method == "sgpo" and config.algorithm.distillation != "none"

    def plan(self) -> Plan:
        phases = {
            "load": self._phase(self._load(), {"weights from disk": self.s * self.P * self.cuda}),
            "rollout": self._rollout(),
            "score": self._phase(self._resident() | self._asleep() | self._scoring(), {}),
            "forward": self._phase(self._resident() | self._asleep() | self.gradients() | self.forward(), {}),
            "backward": self._phase(self._resident() | self._asleep() | self.gradients() | self.backward(), {}),
            "optimizer": self._phase(self._resident() | self._asleep() | self.gradients() | self.update(), {}),
            "sync": self._phase(self._resident() | self._awake() | {"sync buckets": 2 * SYNC_BUCKET * self.cuda}, {}),
        }
        phases = {name: self._timed(name, phase) for name, phase in phases.items()}
        return Plan(phases, self.place, self.P, self.sequence, int(self._kv_bytes() // self.kv_bytes_per_token()))

    # --- what stays ---

    def states(self) -> dict[str, float]:
        """Weights, fp32 masters and moments on the training device."""
        share = self.trained / (self.W if self.stage else 1)
        on_device = self.state != "cpu_offload"
        moments = {"full": 8.0, "8bit": 2.0 + 8 / 256, "cpu_offload": 0.0}[self.state]
        with_master = on_device and (self.bf16 or self.stage > 0)
        gathered = min(self.P, LIVE_ELEMENTS) * self.s if self.stage == 3 else 0.0
        return {
            "weights": self.s * self.P / (self.W if self.stage == 3 else 1),
            "gathered weights": gathered,
            "fp32 master": 4.0 * share * with_master,
            "Adam moments": moments * share,
            "offload buffer": 0.0 if on_device else self.s * self._largest_weight(),
        }

    def host_states(self) -> dict[str, float]:
        """What DeepSpeed keeps on the host for each process when it offloads: the update needs all of it there."""
        if self.state != "cpu_offload":
            return {}
        share = self.trained / self.W
        return {
            "fp32 master": 4.0 * share,
            "Adam moments": 8.0 * share,
            "fp32 gradients": 4.0 * share,
            "accumulated gradients": self.s * share,
            "weights on their way": self.s * share + self.s * self._largest_weight(),
        }

    def gradients(self) -> dict[str, float]:
        """Accumulated over the micro-batches of a step, plus the bucket that reduces them (stages 1 to 3)."""
        share = self.trained / self.W
        held = {0: self.s * self.trained, 1: 4.0 * self.trained}.get(self.stage, 4.0 * share)
        bucket = 0.0
        if self.stage:
            size = 4 if self.stage == 1 else self.s
            # On a CPU memory counts once it is written; on a GPU the whole bucket does.
            bucket = size * (BUCKET_ELEMENTS if self.cuda else min(self.trained, BUCKET_ELEMENTS))
        return {"gradients": 0.0 if self.state == "cpu_offload" else held, "gradient bucket": bucket}

    def update(self) -> dict[str, float]:
        """What the optimizer step adds: fp32 copies of gradients, and Adam's temporaries where it is not fused."""
        share = self.trained / self.W
        copies = 0.0
        if self.stage == 0 and self.bf16:
            copies = 4.0 * self.trained
        elif self.stage == 1 or (self.stage == 2 and not self.bf16):
            copies = 4.0 * share
        if self.state == "cpu_offload":
            copies = 0.0
        temporary = 0.0
        if not self.cuda and self.state == "full":
            temporary = 8.0 * (share if self.stage else self._largest_weight())
        return {"fp32 gradients of the step": copies, "Adam's temporaries": temporary}

    # --- activations ---

    def saved_per_token(self) -> float:
        """Bytes that one layer keeps for backward: norms (in fp32 where weights are bf16), attention, gated MLP."""
        a, s = self.sizes, self.s
        norms = 16.0 * a.hidden if self.bf16 else 24.0 * a.hidden
        attention = s * (2 * a.query + 2 * a.kv) + 4 * a.heads
        return norms + attention + 4 * s * a.intermediate

    def working_per_token(self) -> float:
        """Bytes alive beside it while a layer computes: gradients of the MLP's inner states and of the residual."""
        return self.s * (2 * self.sizes.intermediate + 2 * self.sizes.hidden)

    def activations(self) -> dict[str, float]:
        a, model = self.sizes, self.config.model
        tiles = self._tiles()
        if not model.gradient_checkpointing:
            return {"activations": a.layers * self.saved_per_token() * self.T}
        on_host = getattr(model, "activation_offload", False)
        mlp = 4 * self.s * a.intermediate
        layer = self.saved_per_token() - mlp + mlp / tiles
        boundaries = a.layers * self.s * a.hidden * self.T
        return {"checkpoint boundaries": 0.0 if on_host else boundaries, "one layer's recompute": layer * self.T}

    def _tiles(self) -> int:
        tiled = getattr(self.config.model, "tiled_mlp", 0)
        if not tiled:
            return 1
        return max(1, int(self.T // self.sizes.hidden)) if tiled is True else int(tiled)

    def _attention(self) -> float:
        """The score matrices of attention that is not fused."""
        if self.config.model.attn_implementation != "eager":
            return 0.0
        return self.T * self.sequence * self.sizes.heads * (self.s + 4.0)

    def head(self, op: Any = None, *, grad: bool = True) -> float:
        """What the fused head allocates (sgpo_kernels.launch.extra_bytes), both contexts' rows."""
        import torch
        from sgpo_kernels.launch import extra_bytes

        op = op or ("sgpo" if self.distils else "policy")
        rows = int(self.S * self.T * self.config.rollout.max_new_tokens / self.sequence) * (
            2 if self.distils and grad else 1
        )
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return float(
            extra_bytes(op, rows, self.sizes.hidden, self.sizes.vocab, dtype, self.place.device_type, head_grad=grad)
        )

    def forward(self) -> dict[str, float]:
        """The end of the forward pass, where the head makes its gradients beside all that backward needs."""
        terms = self.activations()
        terms.pop("one layer's recompute", None)
        states = self.s * self.sizes.hidden * self.T
        return {
            **terms,
            "hidden states": states * self.S * (3 if self.distils else 2),
            "head chunks and dW": self.head(),
            "attention scores": self._attention(),
        }

    def backward(self) -> dict[str, float]:
        """The last layer's backward, when everything below is still there."""
        embedding = self.s * self.sizes.head_parameters
        return {
            **self.activations(),
            "layer's gradients": self.working_per_token() * self.T / self._tiles(),
            "hidden states": 2 * self.s * self.sizes.hidden * self.T * self.S,
            "head's dW": embedding,
            "attention scores": self._attention(),
        }

    def _scoring(self) -> dict[str, float]:
        per_token = self.working_per_token() + self.s * (self.sizes.intermediate + 4 * self.sizes.hidden)
        return {"one layer": per_token * self.T, "head chunks": self.head("logprob", grad=False)}

    # --- rollouts ---

    def kv_bytes_per_token(self) -> float:
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

    def _awake(self) -> dict[str, float]:
        if self.config.rollout.placement == "process" and self.cuda and self.config.rollout.devices:
            return {}  # on cards of its own
        return {
            "engine's weights": self._engine_weights(),
            "KV cache": self._kv_bytes(),
            "engine's activations": self._engine_work(),
        }

    def _asleep(self) -> dict[str, float]:
        rollout = self.config.rollout
        if rollout.engine == "hf":
            return {"engine's weights": self._engine_weights()}
        level = rollout.vllm.sleep_level
        if level is None:
            level = 2 if self.cuda and rollout.placement == "inprocess" else 0
        if level == 0 or not self.cuda or rollout.overlap:
            return {k: v for k, v in self._awake().items() if k != "engine's activations"}
        return {"engine asleep": ASLEEP}

    def _rollout(self) -> Phase:
        states = self._resident()
        host: dict[str, float] = {}
        if getattr(self.config.engine, "offload_states_during_rollout", False):
            host = {name: states.pop(name) * self.place.per_host for name in ("fp32 master", "Adam moments")}
        return self._phase(states | self._awake(), host)

    # --- assembly ---

    def _load(self) -> dict[str, float]:
        flat = self.s * self.P if self.stage in (1, 2) else 0.0
        return self._resident() | {"weights being flattened": flat}

    def _resident(self) -> dict[str, float]:
        return ({"CUDA context": CUDA_CONTEXT} if self.cuda else {}) | self.states()

    def _phase(self, device: dict[str, float], host: dict[str, float]) -> Phase:
        """On a CPU all is host memory. Host terms are those of all processes of one host."""
        count = self.place.per_host
        workers = self.config.reward.workers * REWARD_WORKER
        host = {name: size * count for name, size in (host | self.host_states()).items()} | {
            "processes": count * PROCESS,
            "reward workers": count * workers,
        }
        offloaded = getattr(self.config.model, "activation_offload", False) and self.config.model.gradient_checkpointing
        if offloaded and ("layer's gradients" in device or "head chunks and dW" in device):
            host["checkpoint boundaries"] = count * self.sizes.layers * self.s * self.sizes.hidden * self.T
        device = {name: size for name, size in device.items() if size}
        if not self.cuda:
            for name, size in device.items():
                host[name] = host.get(name, 0.0) + count * size
            device = {}
        return Phase(device, {name: size for name, size in host.items() if size})

    def _timed(self, name: str, phase: Phase) -> Phase:
        seconds, resource = phase_seconds(self, name)
        return Phase(phase.gpu, phase.host, seconds, resource)

    def _largest_weight(self) -> float:
        return float(max(self.sizes.head_parameters, self.sizes.hidden * self.sizes.intermediate))
