"""DeepSpeed as the training engine: ZeRO 0-3, accumulation with final weights, gathered weights, checkpoints.

The only file that imports deepspeed, but for attention across ranks (sgpo.model.sequence_parallel). The loss of a
micro-batch is formed inside the wrapped model's forward, because ZeRO-3 only has the parameters there. Weights of all
rows are final (global denominators), so micro-batches are summed: the gradient is the same however a step is split.
DeepSpeed averages over ranks, so the loss is multiplied by their number.
"""

from __future__ import annotations

import gc
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from sgpo.engine.checkpoint_names import CheckpointNames, tied_names
from sgpo.engine.optimizer import build_optimizer, fit_blocks, forget, is_8bit, set_lr, sketch_of_first_moments
from sgpo.model.activations import tiled_mlps
from sgpo.model.lora import merged_weights
from sgpo.model.policy import PolicyModel
from sgpo.planning.training_memory import bucket_elements
from sgpo.types import SgpoError
from sgpo.utils import distributed
from sgpo.utils.lora_names import is_adapter, plain_name

_BUCKET_BYTES = 256 * 2**20

# (head, bias, hidden rows, teacher's hidden rows or None, micro-batch on the device) -> (loss, stats)
MicroBatchLoss = Callable[..., tuple[torch.Tensor, Any]]

# What is asked for of a model with adapters: a plain model; frozen weights, then adapters; adapters alone.
Parts = Literal["merged", "apart", "adapters"]


def init_distributed(timeout_s: float) -> torch.device:
    """Joins the process group (one process alone included) and returns this rank's device."""
    import deepspeed

    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(distributed.local_rank())
    else:
        # Its shared-memory collectives are compiled for half a minute at the first start; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), auto_mpi_discovery=False, verbose=False
    )
    return torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")


def lr_factor(step: int, total_steps: int, *, warmup_ratio: float, schedule: str) -> float:
    """Multiplier of the peak learning rate at 0-based `step`: linear warm-up, then constant, linear or cosine to 0."""
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def _deepspeed_config(
    zero_stage: int, dtype: str, *, clip: float, elements: int, offloaded_from: torch.device | None
) -> dict[str, Any]:
    """DeepSpeed's own settings; `offloaded_from` is the device whose optimizer states wait on the host."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": bucket_elements(elements)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler on the machine
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    if offloaded_from is not None:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": offloaded_from.type == "cuda",
        }
    if dtype == "bfloat16" and zero_stage > 0:  # DeepSpeed has no fp32 accumulation at stage 0, only fp32 masters
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class ZeroEngine:
    """A PolicyModel under DeepSpeed: `loss` and `backward` for each micro-batch, then one `step`."""

    def __init__(
        self,
        model: PolicyModel,
        *,
        device: torch.device,
        zero_stage: int,
        dtype: str,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        optimizer_state: str = "full",
        offload_during_rollout: bool = False,
    ) -> None:
        import deepspeed

        model.to(device)
        self.device = device
        self.zero_stage = zero_stage
        self._max_grad_norm = max_grad_norm
        self._grad_norm: float | None = None
        self._offloads = offload_during_rollout
        self._with_adapters = any(not p.requires_grad for p in model.parameters())
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            parameters, optimizer_state, device=device, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        # Stage 0 in fp32 runs the bare optimizer: DeepSpeed would clip but not tell the norm.
        self._bare = zero_stage == 0 and dtype == "float32"
        if self._bare:
            optimizer.register_step_pre_hook(self._clip)
        config = _deepspeed_config(
            zero_stage,
            dtype,
            clip=0.0 if self._bare else max_grad_norm,
            elements=sum(p.numel() for p in parameters),
            offloaded_from=device if optimizer_state == "cpu_offload" else None,
        )
        if zero_stage == 3:
            for mlp in tiled_mlps(model):  # gathered once per pass: ranks may have different numbers of tiles
                deepspeed.utils.set_z3_leaf_module(mlp, True)
        self.model = model
        self._names = CheckpointNames(model.lm)
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        # (loss, stats) = engine.loss(loss_object, micro_batch): PolicyModel.forward under DeepSpeed, no frame between.
        self.loss: Callable[[MicroBatchLoss, Any], tuple[torch.Tensor, Any]] = self._engine
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        if zero_stage == 3:  # it lends the optimizer its masters for the moment of a step only
            masters = self._optimizer.fp32_partitioned_groups_flat
        fit_blocks(optimizer, [master.numel() for master in masters])
        if is_8bit(optimizer) and zero_stage < 3:
            # It would cut the moments into views, weight by weight, for other tools to read; blocks cannot be cut so.
            self._optimizer._hp_optimizer_states_linked = True
        # DeepSpeed makes the states of some stages by a step with zero gradients (0.19.8: bf16 at stage 0); left
        # counted, it would shift Adam's bias correction of every later step.
        forget(optimizer)
        self.adam = optimizer  # on this rank's share of the fp32 masters

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, whose row weights already divide by the whole step's counts."""
        self._engine.backward(loss * distributed.world_size())

    def step(self, lr: float) -> float:
        """Applies what has been accumulated and returns the gradient norm before clipping, the same on all ranks.

        Where that is not finite nothing was applied: weights, masters and moments are what they were.
        """
        self.reload_states()
        set_lr(self._optimizer, lr)
        self._engine.step()  # DeepSpeed leaves out a step whose norm is not finite, and forgets its gradient
        norm = self._grad_norm if self._bare else self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def dry_step(self, loss: MicroBatchLoss, micro_batches: Iterable[Any]) -> tuple[float, torch.Tensor]:
        """(gradient norm, sketch of this rank's share of the gradient) of a step that leaves everything as it was.

        The way of a real step, reduction and offload included: Adam's first moment
        after a step with learning rate 0 is the gradient. Only for an engine that has made no step yet. Collective.
        """
        counters = {name: getattr(self._engine, name) for name in ("global_steps", "global_samples", "micro_steps")}
        for micro_batch in micro_batches:
            self.backward(self.loss(loss, micro_batch)[0])
        norm, found = self.step(lr=0.0), sketch_of_first_moments(self.adam)
        if not math.isfinite(norm):
            raise SgpoError(
                f"the gradient norm of a trial step is {norm}: weights of the model are not finite, or its activations "
                "overflow; check the checkpoint, or take model.dtype: float32"
            )
        forget(self.adam)
        for name, value in counters.items():
            setattr(self._engine, name, value)
        return norm, found

    @torch.no_grad()
    def evaluate(self, score: Callable[..., Any], batch: Any) -> Any:
        """score(head, bias, hidden rows, None, batch) without gradient."""
        return self.model(score, batch)

    def named_weights(
        self, parts: Parts = "merged", *, checkpoint_names: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full weight) of every parameter and saved buffer; under ZeRO-3 one bucket at a time.

        Names and shapes are those of a checkpoint (sgpo.engine.checkpoint_names), or those that `lm` has in memory.
        Adapters are merged into the weights that they change, one weight at a time; the model itself keeps them apart.
        "apart": the weights as they are, and after all of them the adapters; "adapters": these alone. An adapter's
        name is that of the state dict.

        Collective: every rank must exhaust it. A tensor keeps its value for as long as somebody holds it, up to the
        next optimizer step.
        """
        convert = self._names.convert if checkpoint_names else dict
        groups = self._groups(parts, checkpoint_names)
        if self.zero_stage < 3:
            for group in groups:
                yield from convert({weight.name: weight.value() for weight in group}).items()
            return
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for bucket in _buckets(groups, _BUCKET_BYTES):
            with GatheredParameters([tensor for group in bucket for weight in group for tensor in weight.needs]):
                for group in bucket:
                    yield from convert({weight.name: weight.value() for weight in group}).items()

    def weight_names(self, parts: Parts = "merged", *, checkpoint_names: bool = True) -> list[str]:
        """The names that named_weights yields, in its order, from no other source than the model itself."""
        groups = self._groups(parts, checkpoint_names)
        if not checkpoint_names:
            return [weight.name for group in groups for weight in group]
        shapes = [{weight.name: torch.empty(weight.shape, device="meta") for weight in group} for group in groups]
        return [name for group in shapes for name in self._names.convert(group)]

    def _groups(self, parts: Parts, checkpoint_names: bool) -> list[list[_Weight]]:
        """The weights asked for, those together that become those of a checkpoint together."""
        weights = {weight.name: weight for weight in self._weights(parts)}
        if not checkpoint_names:
            return [[weight] for weight in weights.values()]
        return [[weights[name] for name in group] for group in self._names.groups(weights)]

    def _weights(self, parts: Parts) -> list[_Weight]:
        lm = self.model.lm
        tied = tied_names(lm)
        merged = merged_weights(lm) if parts == "merged" else {}
        base, adapters = [], []
        for name, tensor in lm.state_dict(keep_vars=True).items():
            shape = getattr(tensor, "ds_shape", tensor.shape)  # under ZeRO-3 a rank has a share of it
            if is_adapter(name):
                adapters.append(_Weight(name, shape, [tensor], tensor.detach))
            elif name not in tied:
                needs, value = merged.get(plain_name(name), ([tensor], tensor.detach))
                base.append(_Weight(plain_name(name), shape, needs, value))
        return {"merged": base, "apart": base + adapters, "adapters": adapters}[parts]

    def offload_states(self) -> None:
        """Moves masters and moments to the host where `offload_during_rollout` asks for it; the weights stay."""
        if self._offloads and not self._optimizer.offloaded_states:
            from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States

            # A quantised moment is a bundle of tensors, which cannot be pinned.
            pinned = self.device.type == "cuda" and not is_8bit(self.adam)
            self._engine.offload_states(include=[States.hp_params, States.optim_states], pin_memory=pinned)

    def reload_states(self) -> None:
        """Takes them back, bit for bit; `step`, `save` and `load` do so by themselves."""
        if self._offloads and self._optimizer.offloaded_states:
            self._engine.reload_states()

    def save(self, folder: Path) -> None:
        """Writes this rank's part of parameters (of adapters only, if there are), masters and moments. Collective."""
        away = self._offloads and bool(self._optimizer.offloaded_states)
        self.reload_states()
        self._engine.save_checkpoint(
            str(folder), tag="state", save_latest=False, exclude_frozen_parameters=self._with_adapters
        )
        if away:
            self.offload_states()

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote, bit for bit. Collective."""
        self.reload_states()
        path, _ = self._engine.load_checkpoint(
            str(folder), tag="state", load_lr_scheduler_states=False, load_module_strict=not self._with_adapters
        )
        if path is None:
            raise SgpoError(f"checkpoint {folder} holds no engine state; delete it to go on from the one before")

    def close(self) -> None:
        """Lets go of DeepSpeed's engine and of its hooks."""
        self._engine.destroy()
        del self._engine, self._optimizer, self.model, self.loss
        gc.collect()

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        if not math.isfinite(self._grad_norm):
            for parameter in parameters:
                parameter.grad = None  # the optimizer leaves it as it is


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight for others to have: `value()` gives it where the parameters in `needs` are whole."""

    name: str
    shape: torch.Size
    needs: list[torch.Tensor]
    value: Callable[[], torch.Tensor]


def _buckets(groups: Sequence[list[_Weight]], limit: int) -> Iterator[list[list[_Weight]]]:
    bucket: list[list[_Weight]] = []
    size = 0
    for group in groups:
        needs = [tensor for weight in group for tensor in weight.needs]
        count = sum(getattr(t, "ds_numel", t.numel()) * t.element_size() for t in needs)
        if bucket and size + count > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(group)
        size += count
    if bucket:
        yield bucket


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
