"""Rollouts through vLLM, inside the training process: continuous batching, prefix sharing, weights by reference.

With vllm_adapters the only file that imports vllm. Token ids go in, token ids and sampled log-probabilities come out;
vLLM never sees a tokenizer. With tensor parallelism every rank of a group runs such an engine, all over the same
requests.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Read when vllm is imported. One process: weights are handed over by reference, and the trainer's threads stay its own.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams as VllmSampling  # noqa: I001
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.sampling_params import RequestOutputKind

from sgpo.utils.lora_names import is_adapter
from sgpo.utils.checksums import checksum
from sgpo.rollout.guards import Watchdog, is_out_of_memory
from sgpo.rollout.vllm_adapters import VllmAdapters, adapter_options
from sgpo.rollout.vllm_guest import ClassesKept, keeping_the_process_group, undisturbed
from sgpo.types import Rollout, RolloutRequest, SamplingParams, SgpoError, SyncReceipt

_PROGRESS_S = 0.5


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Sizes of the engine; None leaves the choice to vLLM.

    max_model_len: prompt and completion together, in tokens. kv_cache_mib: memory of the KV cache; otherwise on a GPU
    what gpu_memory_utilization of the card leaves, on a CPU 512 MiB. sleep_level: 0 never sleeps, 1 keeps the weights
    in host memory, 2 drops them. from_scratch: start with meaningless weights, so that the first sync proves that
    each of them is replaced. lora_rank: above 0, the engine samples with adapters of this rank (LoRA; vLLM has no DoRA)
    scaled by lora_alpha / lora_rank, beside the layers named in lora_modules (None: all that vLLM knows of).
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    kv_cache_mib: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    sleep_level: int = 0
    from_scratch: bool = False
    stall_s: float = 600.0
    lora_rank: int = 0
    lora_alpha: float = 1.0
    lora_modules: tuple[str, ...] | None = None


class VllmEngine:
    """A RolloutEngine on the model in `folder`; it samples from that model until load_weights brings other weights."""

    _owns_group = False  # torch's process group is vLLM's, and ends with it

    def __init__(self, folder: Path, *, eos_ids: Sequence[int], dtype: str, options: VllmOptions) -> None:
        self._eos_ids = list(eos_ids)
        self._options = options
        self._asleep = False
        self._holds_base = False
        self._cuda = torch.cuda.is_available()
        self._is_guest = dist.is_initialized() and not VllmEngine._owns_group
        VllmEngine._owns_group = not self._is_guest
        self.policy_version: int | None = None if options.from_scratch else 0
        with undisturbed(), ClassesKept(folder) as classes:
            self._llm: Any = _build(folder, dtype, options, cuda=self._cuda)
        self._engine: Any = self._llm.llm_engine
        self._on_model(classes.hand_over)
        self._adapters: Any = VllmAdapters(self._llm, options.lora_rank, options.lora_alpha)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As Sampler.generate."""
        self._check(requests)
        everyone, mine = self._of_the_group(list(requests))
        rollouts: dict[int, Rollout] = {}

        def finished(index: int, rollout: Rollout) -> None:
            rollouts[index] = rollout
            if on_rollout is not None and index in mine:
                on_rollout(rollout)

        def progress() -> None:
            if on_progress is not None:
                tokens = sum(len(rollout.completion_ids) for rollout in rollouts.values())
                on_progress(len(rollouts), tokens + self._tokens_under_way())

        at_once = len(everyone)
        while len(rollouts) < len(everyone):
            left = [i for i in range(len(everyone)) if i not in rollouts]
            try:
                self._sample(everyone, left[:at_once], sampling, finished, progress)
            except (RuntimeError, MemoryError) as error:
                self._forget_unfinished()
                if not is_out_of_memory(error) or self._options.tensor_parallel_size > 1:
                    self.policy_version = None
                    raise
                at_once = self._fewer(min(at_once, len(left)), error)
        progress()
        return [rollouts[i] for i in mine]

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int, probe_ids: Sequence[int] = ()
    ) -> SyncReceipt:
        """As RolloutEngine.load_weights."""
        self.policy_version = None
        if self._asleep:
            self._wake("weights")
        checksums: dict[str, int] = {}
        named_tensors = iter(named_tensors)
        problem = None
        try:
            self._load(named_tensors, checksums)
        except SgpoError as error:
            problem = str(error)
        if problem := self._of_any_rank(problem, named_tensors):
            raise SgpoError(problem)
        if self._asleep:
            self._wake("kv_cache")
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise SgpoError("weight sync: vLLM could not drop its prefix cache, which holds keys of the old weights")
        self._engine.set_weight_version(str(policy_version))
        self.policy_version = policy_version
        return SyncReceipt(checksums, self._probe(tuple(probe_ids)))

    def holds_base(self) -> bool:
        """As RolloutEngine.holds_base."""
        return self._holds_base

    def sleep(self) -> None:
        """As RolloutEngine.sleep."""
        level = self._options.sleep_level
        if level and not self._asleep:
            self._llm.sleep(level=level)
            self._asleep = True
            if level == 2:
                self.policy_version = None
                self._holds_base = False

    @property
    def asleep_bytes(self) -> int:
        """What a sleeping engine has unmapped from the GPU; torch's statistics never hear of it."""
        if not (self._asleep and self._cuda):
            return 0
        from vllm.device_allocator.cumem import CuMemAllocator

        return CuMemAllocator.get_instance().get_current_usage()

    def wake(self) -> None:
        """As RolloutEngine.wake."""
        if self._asleep:
            self._wake("weights")
            self._wake("kv_cache")
            self._asleep = False

    def close(self) -> None:
        """As RolloutEngine.close."""
        if self._llm is not None:
            with keeping_the_process_group() if self._is_guest else nullcontext():
                self._engine.engine_core.shutdown()
            VllmEngine._owns_group = False
            self._llm = self._engine = self._adapters = None
            if self._cuda:
                gc.collect()  # else the card stays full until Python gets round to it

    def _check(self, requests: Sequence[RolloutRequest]) -> None:
        if self._asleep or self.policy_version is None:
            raise SgpoError("the rollout engine holds no weights (asleep, or a sync failed): call load_weights first")
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest >= self._options.max_model_len:
            raise SgpoError(
                f"a prompt has {longest} tokens, the vLLM engine was built for {self._options.max_model_len} with the "
                "completion; lower data.max_prompt_tokens or raise rollout.vllm.max_model_len"
            )

    def _of_the_group(self, requests: list[RolloutRequest]) -> tuple[list[RolloutRequest], range]:
        """The requests of all ranks that share this engine's layers, and where this rank's own stand among them."""
        if self._options.tensor_parallel_size == 1:
            return requests, range(len(requests))
        group = get_tp_group()
        parts: list[list[RolloutRequest]] = [[] for _ in range(group.world_size)]
        dist.all_gather_object(parts, requests, group=group.cpu_group)
        start = sum(len(part) for part in parts[: group.rank_in_group])
        return [request for part in parts for request in part], range(start, start + len(requests))

    def _sample(
        self,
        requests: Sequence[RolloutRequest],
        chosen: Sequence[int],
        sampling: SamplingParams,
        finished: Callable[[int, Rollout], None],
        progress: Callable[[], None],
    ) -> None:
        """Runs the chosen requests to their end, in one continuous batch."""
        for index in chosen:
            request = requests[index]
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            room = self._options.max_model_len - len(request.prompt_ids)
            params = self._params(sampling, request.seed, min(sampling.max_new_tokens, room))
            self._engine.add_request(str(index), prompt, params, lora_request=self._adapters.request)
        reported = time.monotonic()
        with Watchdog("rollout: vLLM", self._options.stall_s) as watchdog:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    index = int(output.request_id)
                    finished(index, self._rollout(requests[index], output.outputs[0]))
                watchdog.beat()
                if time.monotonic() - reported > _PROGRESS_S:
                    reported = time.monotonic()
                    progress()

    def _params(self, sampling: SamplingParams, seed: int, max_tokens: int) -> VllmSampling:
        return VllmSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=self._eos_ids,
            ignore_eos=True,  # stop_token_ids holds every EOS id
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, request: RolloutRequest, completion: Any) -> Rollout:
        assert self.policy_version is not None
        return Rollout(
            request=request,
            completion_ids=tuple(completion.token_ids),
            rollout_logprobs=tuple(completion.logprobs.logprobs),
            truncated=completion.finish_reason != "stop",
            policy_version=self.policy_version,
        )

    def _tokens_under_way(self) -> int:
        states = self._engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)

    def _forget_unfinished(self) -> None:
        """Takes out what a failed call has left behind; the blocks are freed with the requests."""
        if left := list(self._engine.output_processor.request_states):
            self._engine.abort_request(left, internal=True)
            gc.collect()
            if self._cuda:
                torch.cuda.empty_cache()

    def _fewer(self, at_once: int, error: BaseException) -> int:
        if at_once == 1:
            raise SgpoError(f"memory ran out with one rollout at a time: {error}; lower rollout.max_new_tokens")
        print(f"rollout: memory ran out with {at_once} requests at once, trying {at_once // 2}", flush=True)
        return at_once // 2

    def _probe(self, ids: tuple[int, ...]) -> tuple[float, ...]:
        if len(ids) < 2:
            return ()
        params = VllmSampling(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._engine.add_request("probe", {"prompt_token_ids": list(ids)}, params, lora_request=self._adapters.request)
        try:
            with Watchdog("weight sync: vLLM", self._options.stall_s):
                while not (outputs := self._engine.step()):
                    pass
        except (RuntimeError, AttributeError) as error:  # what its kernels lack shows in the first forward pass
            self.policy_version = None
            advice = "; set model.lora.sync to merged" if self._options.lora_rank else ""
            reason = " ".join(str(error).split())[:600]
            raise SgpoError(f"weight sync: vLLM cannot run this model: {reason}{advice}") from error
        rows = outputs[0].prompt_logprobs[1:]
        return tuple(row[token].logprob for row, token in zip(rows, ids[1:], strict=True))

    def _wake(self, tag: str) -> None:
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps in reserve is what vLLM now needs
        self._llm.wake_up(tags=[tag])

    def _load(self, named_tensors: Iterator[tuple[str, torch.Tensor]], checksums: dict[str, int]) -> None:
        """All weights, or adapters alone where the others are here."""
        first = next(named_tensors, None)
        named_tensors = chain([] if first is None else [first], named_tensors)
        arriving = _checked(named_tensors, checksums)
        if not (self._holds_base and first is not None and is_adapter(first[0])):
            self._holds_base = False
            arriving = self._load_base(arriving)
        if self._options.lora_rank:
            self._adapters.replace(dict(arriving))
            self._holds_base = True

    def _load_base(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Loads all but the adapters, which come back.

        vLLM's own loader fuses and shards what comes; a layer changes in place once all its parts are there.

        One call for all tensors, since the loader walks the whole model at every call.
        """
        # What vLLM is at; empty while the sender is at work, whose errors are its own.
        loading: list[str] = []
        adapters: list[tuple[str, torch.Tensor]] = []

        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                if self._options.lora_rank and is_adapter(name):
                    adapters.append((name, tensor))
                    continue
                loading.append(f"{name} of shape {tuple(tensor.shape)}")
                yield name, tensor
                loading.clear()

        if not self._cuda:
            self._on_model(_forget_kernels)
        self._on_model(initialize_layerwise_reload)
        try:
            self._on_model(lambda model: model.load_weights(arriving()))  # type: ignore[operator]
        except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
            if not loading:
                raise
            raise SgpoError(f"weight sync: vLLM has no weight {loading[0]}: {error}") from error
        finally:
            missing = self._on_model(lambda model: _finish(model, self._engine.model_config))
        if missing:
            names = f"{', '.join(missing[:3])} ({len(missing)} in all)"
            raise SgpoError(f"weight sync: no new value, or only a part of one, arrived for {names}")
        return adapters

    def _of_any_rank(self, problem: str | None, named_tensors: Iterator[Any]) -> str | None:
        """A problem on any of the ranks that share this engine: none may go on to a forward pass without the others."""
        if self._options.tensor_parallel_size == 1:
            return problem
        for _ in named_tensors:  # gathering what is left may need all ranks too
            pass
        group = get_tp_group()
        problems: list[str | None] = [None] * group.world_size
        dist.all_gather_object(problems, problem, group=group.cpu_group)
        return next((found for found in problems if found), None)

    def _on_model(self, function: Callable[[torch.nn.Module], Any]) -> Any:
        with set_current_vllm_config(self._engine.vllm_config):
            return self._engine.apply_model(function)[0]


def _checked(
    named_tensors: Iterable[tuple[str, torch.Tensor]], checksums: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named_tensors:
        if name in checksums:
            raise SgpoError(f"weight sync: {name} arrived twice")
        checksums[name] = checksum(tensor)
        yield name, tensor


def _forget_kernels(model: torch.nn.Module) -> None:
    """vLLM (0.32) has a CPU pad and pack experts only where a layer has no kernel yet: after a reload they would lie
    there as a checkpoint has them. On a GPU CUDA graphs hold the kernel, and it takes the weights without packing.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def _finish(model: torch.nn.Module, model_config: Any) -> list[str]:
    """Ends the update; names of the layers that got no new value, or only a part of one."""
    layers = {name: layer for name, layer in model.named_modules() if list(layer.parameters(recurse=False))}
    short = {name: layer for name, layer in layers.items() if _is_short(layer)}
    for layer in short.values():  # keeps its old value whole rather than a half of each
        info = get_layerwise_info(layer)
        info.load_numel, info.loaded_weights = 0, []
    late = [(layer, *found) for layer in layers.values() for found in _registered_late(layer)]
    finalize_layerwise_reload(model, model_config)
    for layer, name, parameter in late:
        if layer._parameters.get(name) is None:
            layer.register_parameter(name, parameter)
    whole = {id(p) for name, layer in layers.items() if name not in short for p in layer.parameters(recurse=False)}
    tied = {name for name, layer in short.items() if all(id(p) in whole for p in layer.parameters(recurse=False))}
    for name in tied:  # the new weight is its partner's too, but what a CPU once packed from the old one is not
        short[name].quant_method.process_weights_after_loading(short[name])  # type: ignore[operator,union-attr]
    return sorted(set(short) - tied)


def _registered_late(layer: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that a layer has only since they arrived (an output bias, after a start without weights): the end of a
    reload puts back those of its beginning, and would lose them."""
    info = get_layerwise_info(layer)
    known = {*(info.kernel_tensors or ({},))[0], *info.restore_metadata[0]}
    return [(name, p) for name, p in layer.named_parameters(recurse=False) if info.can_load() and name not in known]


def _is_short(layer: torch.nn.Module) -> bool:
    """Whether a part of the layer's weights has not arrived. The padding of a vocabulary never does, and what vLLM does
    not count (a router's correction bias) is written at once."""
    info = get_layerwise_info(layer)
    if not info.can_load() or not info.load_numel_total:
        return False
    return info.load_numel == 0 or not isinstance(layer, VocabParallelEmbedding)


def _build(folder: Path, dtype: str, options: VllmOptions, *, cuda: bool) -> LLM:
    sizes: dict[str, Any] = {"max_num_seqs": options.max_num_seqs, "max_model_len": options.max_model_len}
    if options.max_num_batched_tokens is not None:
        sizes["max_num_batched_tokens"] = options.max_num_batched_tokens
    if options.kv_cache_mib is not None or not cuda:
        sizes["kv_cache_memory_bytes"] = (options.kv_cache_mib or 512) * 2**20
    if cuda:
        sizes["gpu_memory_utilization"] = options.gpu_memory_utilization
    else:
        sizes["block_size"] = 32  # vLLM's 128 on a CPU would share few prompts
        # A prompt cut in two would draw twice, and vLLM (0.32) cannot take a draw back from a CPU's generator.
        sizes["enable_chunked_prefill"] = False
        if options.max_num_batched_tokens is not None:
            sizes["max_num_batched_tokens"] = max(options.max_num_batched_tokens, options.max_model_len)
    if options.lora_rank:
        sizes |= adapter_options(options.lora_rank, options.lora_modules)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        sizes["distributed_executor_backend"] = "external_launcher"
    try:
        return LLM(
            str(folder),
            dtype=dtype,  # type: ignore[arg-type]
            load_format="dummy" if options.from_scratch else "auto",
            tensor_parallel_size=options.tensor_parallel_size,
            enforce_eager=options.enforce_eager or not cuda,
            enable_prefix_caching=True,
            enable_sleep_mode=cuda and options.sleep_level > 0,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # none of the model's own sampling defaults
            skip_tokenizer_init=True,
            trust_remote_code=False,
            use_tqdm_on_load=False,
            **sizes,
        )
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise SgpoError(f"vLLM cannot run the model in {folder}: {' '.join(str(error).split())[:600]}") from error
