"""Memory of the training phases of one process: what stays, and what a pass over one micro-batch needs beside it.

P weights (trained: those with a gradient), W processes, s bytes of a weight, T tokens of a micro-batch (padding counts,
as it does in engine.micro_batch_tokens), N of them read by the loss. States and gradients follow DeepSpeed 0.19.8 as
sgpo.engine.zero configures it; activations follow transformers' Qwen2 and Llama, which most dense decoders share:

  stage 0        gradients sP; in the step their flat copy, bucket by bucket, to be reduced, or Adam's temporaries
  stage 1        gradients 4P in fp32 on every process, and the partition's flat copy, 4P/W, until the step is done
  stage 2, 3     gradients 4P/W in fp32 (2 in fp32, and 3: flattened once more in the step), and the bucket
  stage 3        weights sP/W, and those of layers whose next use is near, gathered

Each phase is the fullest of the moments that it passes through; `python -m benchmarks.plan_check` measures them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sgpo.config import Config
from sgpo.planning.architectures import Architecture
from sgpo.types import SgpoError

GIB = 2**30
BUCKET_ELEMENTS = 100_000_000  # most that sgpo.engine.zero makes of DeepSpeed's reduce_bucket_size, by default 5e8
# DeepSpeed's defaults, which it leaves as they are.
FLAT_ELEMENTS = 500_000_000  # of gradients that stage 0 reduces in one piece
LIVE_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters, stage3_max_reuse_distance, sub_group_size

Terms = dict[str, float]


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
        """torch's name of the device."""
        return "cpu" if self.gpu_bytes is None else "cuda"


def bucket_elements(trained: int) -> int:
    """DeepSpeed's reduce_bucket_size: a small model, or adapters, need no more than they have. A larger tensor is
    reduced by itself."""
    return min(trained, BUCKET_ELEMENTS)


def fullest(*moments: Terms) -> Terms:
    """The terms of the moment with the largest sum."""
    return max(moments, key=lambda terms: sum(terms.values()))


class TrainingMemory:
    """The arithmetic of one config on one place; every method gives bytes by term."""

    def __init__(self, config: Config, sizes: Architecture, place: Place) -> None:
        self.config, self.sizes, self.place = config, sizes, place
        self.cuda = place.gpu_bytes is not None
        self.bf16 = config.model.dtype == "bfloat16"
        self.s = 2 if self.bf16 else 4
        self.stage, self.state = config.engine.zero_stage, config.engine.optimizer_state
        self.W = place.processes
        self.lora = config.model.lora if config.model.lora.rank else None
        self.adapted = sizes.linears(self.lora.modules) if self.lora else {}
        if self.lora and not self.adapted:
            raise SgpoError(
                f"no plan: it does not know model.lora.modules {list(self.lora.modules)}; set plan.on_misfit: off"
            )
        adapters = sizes.adapter_parameters(self.adapted, self.lora.rank, dora=self.lora.dora) if self.lora else 0
        self.P = sizes.parameters
        self.held = self.P + adapters
        self.trained = adapters or self.P
        self.sequence = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        # Processes that share a micro-batch add up their budgets: each has a part of its tokens, one may have all rows.
        shared = config.engine.sequence_parallel_size
        self.T = max(config.engine.micro_batch_tokens, self.sequence / shared)
        self.N = int(shared * self.T * config.rollout.max_new_tokens / self.sequence)
        self.distils = config.algorithm.method == "sgpo" and config.algorithm.distillation is not None
        self.teaches = self.distils and config.algorithm.distillation != "sft"
        self.checkpointed = config.model.gradient_checkpointing

    def training(self) -> dict[str, Terms]:
        """The phases forward, backward and optimizer, with all that stays."""
        kept = self.states() | self.gradients()
        lasting = self.bucket() if self.stage == 3 else {}
        return {
            "forward": kept | lasting | self.gathered() | self.forward(),
            "backward": kept | lasting | self.gathered() | self.backward(),
            "optimizer": kept | lasting | self.update(),
        }

    # --- what stays ---

    def states(self) -> Terms:
        """Weights, fp32 masters and moments on the training device."""
        share = self.trained / (self.W if self.stage else 1)
        on_device = self.state != "cpu_offload"
        moments = {"full": 8.0, "8bit": 2.0 + 8 / 256, "cpu_offload": 0.0}[self.state]
        with_master = on_device and (self.bf16 or self.stage > 0)
        return {
            "weights": self.s * self.held / (self.W if self.stage == 3 else 1),
            "fp32 master": 4.0 * share * with_master,
            "Adam moments": moments * share,
            "offload buffer": 0.0 if on_device or self.stage == 3 else self.s * self._largest_trained(),
        }

    def host_states(self) -> Terms:
        """What DeepSpeed keeps on the host for each process when it offloads: the update needs all of it there.

        At stage 3 the gradients accumulate there too, in fp32; at stage 2 in fp32 tensor by tensor, while those of bf16
        weights stay on the device (`gradients`).
        """
        if self.state != "cpu_offload":
            return {}
        share = self.trained / self.W
        if self.stage == 3:
            accumulated, on_their_way = self.pinned(4.0 * share), 0.0
        else:
            whole = sum(count * self.pinned(self.s * size) for count, size in self.sizes.tensors())
            accumulated = 0.0 if self.bf16 else self.s * share if self.lora else whole / self.W
            on_their_way = self.pinned(self.s * share) + self.pinned(self.s * self._largest_trained())
        return {
            "fp32 master": self.pinned(4.0 * share),
            "Adam moments": 8.0 * share,
            "fp32 gradients": self.pinned(4.0 * share),
            "accumulated gradients": accumulated,
            "weights on their way": on_their_way,
        }

    def pinned(self, size: float) -> float:
        """Page-locked host memory of a GPU comes from torch's allocator, in powers of two."""
        return 2.0 ** math.ceil(math.log2(size)) if self.cuda and size >= 1 else size

    def gradients(self) -> Terms:
        """Accumulated over the micro-batches of a step, on the device: from bf16 weights even where Adam is not."""
        share = self.trained / self.W
        held = {0: self.s * self.trained, 1: 4.0 * self.trained}.get(self.stage, 4.0 * share)
        away = self.state == "cpu_offload" and (self.stage == 3 or not self.bf16)
        return {"gradients": 0.0 if away else held}

    def bucket(self) -> Terms:
        """In which gradients are reduced: at stages 1 and 2 for the time of a backward pass, at stage 3 for good."""
        return {"gradient bucket": float({0: 0, 1: 4}.get(self.stage, self.s) * bucket_elements(self.trained))}

    def _reduced(self) -> Terms:
        """A full bucket (or a gradient larger than it) is copied to be reduced, and what this process keeps of it is
        added in fp32: at stage 2 tensor by tensor, at stage 3 all of it."""
        full = max(bucket_elements(self.trained), self._largest_trained())
        copied = {0: 0.0, 1: 4.0}.get(self.stage, self.s) * full
        widened = {2: 4.0 * self._largest_trained(), 3: 4.0 * full / self.W}.get(self.stage, 0.0) * self.bf16
        return {"bucket being reduced": copied + widened}

    def gathered(self) -> Terms:
        """Stage 3: the weights of layers at work, and of those whose next use is near. One process has them anyway."""
        several = self.stage == 3 and self.W > 1
        return {"gathered weights": self.s * min(self.P, LIVE_ELEMENTS)} if several else {}

    def update(self) -> Terms:
        """What the optimizer step adds: fp32 or flat copies of gradients, one gradient's norm in fp64, and Adam's
        temporaries where it is not fused: a root and a quotient of one tensor, or both moments where they are 8 bits.

        On a GPU torch's Adam is fused, and torchao's compiled step is assumed to keep the moments in registers.
        """
        share = self.trained / self.W
        norm: Terms = {"one gradient's norm": 8.0 * self._largest_trained()}
        if self.state == "cpu_offload":
            return norm if self.stage == 2 else {}
        temporary = 0.0 if self.cuda else 8.0 * (share if self.stage else self._largest_trained())
        flat, adam = "flat gradients", "Adam's temporaries"
        if self.stage == 0:
            in_fp32 = {adam: temporary, "fp32 gradients of the step": 4.0 * self.trained * self.bf16}
            return fullest({flat: self.s * min(self.trained, FLAT_ELEMENTS)}, in_fp32)
        if self.stage == 3:
            return {adam: temporary, flat: 4.0 * min(share, LIVE_ELEMENTS)}
        # The flat ones take the place of the others (at stage 2 in bf16 they are flat already), of which those of other
        # partitions go first.
        others = 4.0 * share - self.gradients()["gradients"]
        copied = 0.0 if self.stage == 2 and self.bf16 else 4.0 * share
        return fullest(norm, {flat: max(0.0, copied + others)}, {adam: max(0.0, temporary + others)})

    def load(self) -> Terms:
        """While the engine is built: stages 1 and 2 flatten the weights, stage 3 starts from whole ones and cuts them;
        a master is made by way of a copy."""
        if self.stage == 3:
            cut = self.s * self.held / self.W
            return fullest({"weights": self.s * self.held, "weights being cut": cut}, self.states())
        return self.states() | {"weights being flattened": self.s * self.trained if self.stage else 0.0}

    # --- activations, bytes per token of a layer ---

    def saved_around_mlp(self) -> float:
        """Kept for backward by norms (in fp32 where weights are bf16), residuals and attention.

        An adapted layer with a frozen weight keeps its input for the adapter, and the norm before it one copy less.
        """
        a, s = self.sizes, self.s
        full, copies = (4.0, 2) if self.lora is None else (4.0, 1)
        norms = 2 * a.hidden * (full + s * copies)
        attention = s * (2 * a.query + 2 * a.kv) + 4 * a.heads
        if self.per_sequence_attention():
            attention += s * a.query  # the sequences' outputs, and all of them in one row
        return norms + attention + self._adapters_keep(mlp=False)

    def saved_in_mlp(self) -> float:
        """Gate, its activation, up, and their product."""
        return 4.0 * self.s * self.sizes.intermediate + self._adapters_keep(mlp=True)

    def _adapters_keep(self, *, mlp: bool) -> float:
        """The low-rank states, and with DoRA both results of each layer, which its learned lengths multiply."""
        if self.lora is None:
            return 0.0
        chosen = [
            out for name, (_, out) in self.adapted.items() if (name in ("gate_proj", "up_proj", "down_proj")) == mlp
        ]
        return self.s * sum(self.lora.rank + 2 * out * self.lora.dora for out in chosen)

    def working_in_mlp(self) -> float:
        """While the MLP's backward runs: gradients of gate and up."""
        return 2.0 * self.s * self.sizes.intermediate

    def per_sequence_attention(self) -> bool:
        """Packed rows without flash-attn's varlen kernel (sgpo.model.activations.pack_attention)."""
        named = self.config.model.attn_implementation.startswith("flash_attention")
        return self.config.engine.packing == "packed" and not named

    def _tile(self) -> float:
        """Tokens that an MLP takes at a time."""
        return min(self.T, self.config.model.mlp_tile_tokens or self.T)

    def _scores(self) -> float:
        """What one layer's score matrices keep where attention is not fused: softmax in fp32, and in bf16."""
        if self.config.model.attn_implementation != "eager":
            return 0.0
        return self.T * self.sequence * self.sizes.heads * (6.0 if self.bf16 else 4.0)

    def one_layer(self) -> float:
        """All that one layer keeps for backward; of a tiled MLP one tile at a time."""
        mlp = 0.0 if self._tile() < self.T else self.saved_in_mlp() * self.T
        return self.saved_around_mlp() * self.T + mlp + self._scores()

    def activations(self) -> Terms:
        """What waits for backward when the last layer is done."""
        a, model = self.sizes, self.config.model
        if not model.gradient_checkpointing:
            return {"activations": a.layers * self.one_layer()}
        return {} if model.activation_offload and self.cuda else {"checkpoint boundaries": self.boundaries()}

    def boundaries(self) -> float:
        """Bytes of the inputs of all layers, which gradient checkpointing keeps."""
        return self.sizes.layers * self.s * self.sizes.hidden * self.T

    # --- the phases ---

    def forward(self) -> Terms:
        """The fuller of two moments: a layer at work when all but its own is there, and the loss, where the head makes
        its gradients beside all that backward needs."""
        states = self.N * self.sizes.hidden
        loss = {
            **self.activations(),
            "final norm": states * (8.0 if self.bf16 else 12.0),
            "teacher's hidden states": self.s * states * self.teaches,
            "head": self.head(),
        }
        return fullest(loss, self.activations() | self._layer_at_work())

    def _layer_at_work(self) -> Terms:
        """A layer's forward pass beside what it keeps: in its MLP, three inner states beside input and residual."""
        a = self.sizes
        kept = 0.0 if self.checkpointed else self.one_layer()
        inner = self.s * a.intermediate * (3.0 if self.lora is None else 5.0) * self._tile()
        outer = 3.0 if self._tile() == self.T else 5.0  # the tiles' results, and all of them in one tensor
        states = inner + outer * self.s * a.hidden * self.T
        return {"one layer": max(0.0, states - kept) + self._dora_weights(), "attention scores": 2 * self._scores()}

    def _dora_weights(self) -> float:
        """To know the lengths of its rows, peft makes each adapted weight whole: B A (through an identity matrix), its
        multiple, and the sum."""
        if self.lora is None or not self.lora.dora:
            return 0.0
        return self.s * max(inputs * (inputs + 3.0 * outputs) for inputs, outputs in self.adapted.values())

    def backward(self) -> Terms:
        """The fullest of three moments: the loss's gradients on their way, the last layer's backward when everything
        below is still there, and the end, where a tied head's gradient meets that of the embedding."""
        a = self.sizes
        head = 0.0 if self.lora else self.s * a.head_parameters
        states = self.N * a.hidden
        loss = {
            **self.activations(),
            "final norm": states * (8.0 if self.bf16 else 12.0),
            "hidden states' gradients": 2.0 * self.s * states,
            "head's dW": 2 * head,
        }
        outer = 2.0 if self._tile() == self.T else 3.0  # the tiles' gradients wait for one another
        layer = {
            **self.activations(),
            "layer's gradients": self.working_in_mlp() * self._tile() + outer * self.s * a.hidden * self.T,
            "DoRA's whole weights": self._dora_weights() * self.checkpointed,
            "head's dW": head if a.tied else 0.0,
            "attention scores": 2 * self._scores(),
        }
        if self._tile() < self.T:
            layer["one tile's recompute"] = self.saved_in_mlp() * self._tile()
        if self.checkpointed:
            # In fp32 the residual that the first norm keeps is the checkpoint itself.
            own_input = 0.0 if self.bf16 else self.s * a.hidden * self.T
            layer["one layer's recompute"] = self.one_layer() - own_input
        if self.config.model.activation_offload and self.cuda:
            layer["its checkpoint"] = self.boundaries() / a.layers
        end = {"head's and embedding's dW": (2 if a.tied else 1) * head}
        reduction = self.bucket() | self._reduced()
        if self.cuda:
            return fullest(loss, layer, end) | reduction
        return fullest(loss, layer, end | reduction)  # filled when activations are gone

    def scoring(self) -> Terms:
        """A pass without gradient, and the log-probs of its rows."""
        return fullest(
            self._layer_at_work(),
            {"hidden states": 3.0 * self.s * self.sizes.hidden * self.N, "head": self.head("logprob", grad=False)},
        )

    def head(self, op: Any = None, *, grad: bool = True) -> float:
        """The fullest moment of the fused head (sgpo_kernels.sizes.peak_bytes)."""
        import torch
        from sgpo_kernels.sizes import peak_bytes

        op = op or ("sgpo" if self.teaches else "policy")
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        grad = grad and self.lora is None
        return float(
            peak_bytes(op, self.N, self.sizes.hidden, self.sizes.vocab, dtype, self.place.device_type, head_grad=grad)
        )

    def _largest_trained(self) -> float:
        a = self.sizes
        if self.lora:
            return float(max((self.lora.rank * max(shape) for shape in self.adapted.values()), default=0))
        return float(max(a.head_parameters, a.hidden * a.intermediate))
