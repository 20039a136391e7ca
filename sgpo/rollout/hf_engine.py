"""Rollouts through transformers' generate: runs anywhere, batched, with a KV cache.

generate does the decoding; a logits processor does the sampling. It draws token t of a request from the inverse of the
cumulative distribution at a uniform number that only the request's seed and t decide, and leaves generate a certain
choice. So a completion does not depend on which others share its batch, and its log-probability is known. A prompt
that several requests share is read once, and prompts of several lengths are padded on the left, where the family's
code lets that be: some count padding as positions, or have a cache that cannot be handed on. A trial before the first
rollout finds the fastest way that is right (`_WAYS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from sgpo.rollout.guards import Watchdog, is_out_of_memory
from sgpo.types import Rollout, RolloutRequest, SamplingParams, SgpoError, SyncReceipt
from sgpo.utils.checksums import checksum
from sgpo.utils.lora_names import is_adapter, plain_name

_TRIAL_PROMPT, _TRIAL_NEW = 24, 8  # tokens of a trial
_TRIAL_GAP = {torch.float32: 5e-5}  # mean |log-prob difference| in nats that is rounding; 0.1 in narrower dtypes
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True, slots=True)
class _Way:
    """How a batch goes through `generate`."""

    padded: bool  # prompts of several lengths, padded on the left; else of one length
    shared: bool  # a prompt is read once and its cache handed to each of its requests
    cached: bool = True  # else everything is computed again for each token

    def __str__(self) -> str:
        lengths = "prompts of one length at a time" if not self.padded else "prompts padded on the left"
        reading = "each read once" if self.shared else "each read anew" if self.cached else "no cache, which is slow"
        return f"{lengths}, {reading}"


_WAYS = (_Way(True, True), _Way(True, False), _Way(False, True), _Way(False, False), _Way(False, False, cached=False))


class HfEngine:
    """A RolloutEngine with its own copy of the weights. `lm` is a transformers causal language model, with adapters
    (sgpo.model.lora.add_adapters) where a sync is to bring them instead of merged weights."""

    def __init__(
        self,
        lm: Any,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        device: torch.device,
        max_batch_tokens: int,
        stall_s: float = 600.0,
    ) -> None:
        self._lm: Any = lm.to(device).eval().requires_grad_(False)
        self._lm.config.use_cache = True
        # generate fills what a call leaves open from the model's own defaults: a repetition penalty would sample from
        # another distribution than the one that is trained.
        self._lm.generation_config = GenerationConfig()
        self._weights = {plain_name(name): tensor for name, tensor in self._lm.state_dict().items()}
        self._holds_base = False
        self._device = device
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._max_batch_tokens = max_batch_tokens
        self._stall_s = stall_s
        self._way: _Way | None = None  # not tried yet
        self.policy_version: int | None = 0

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As Sampler.generate."""
        if self.policy_version is None:
            raise SgpoError("the rollout engine holds no weights (a sync failed): call load_weights first")
        if self._way is None and requests:
            self._choose_way(max((request.prompt_ids for request in requests), key=len))
        return self._sample(requests, sampling, on_progress, on_rollout)

    def _sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        sampled = 0
        batches = self._batches(requests, sampling.max_new_tokens)
        while batches:
            batch = batches.pop(0)
            try:
                found = self._sample_batch([requests[i] for i in batch], sampling)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batches[:0] = _halves(batch, error)
                continue
            for index, rollout in zip(batch, found, strict=True):
                rollouts[index] = rollout
                sampled += len(rollout.completion_ids)
                if on_rollout is not None:
                    on_rollout(rollout)
            if on_progress is not None:
                on_progress(len(rollouts), sampled)
        return [rollouts[i] for i in range(len(requests))]

    @torch.no_grad()
    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int, probe_ids: Sequence[int] = ()
    ) -> SyncReceipt:
        """As RolloutEngine.load_weights."""
        self.policy_version = None
        checksums: dict[str, int] = {}
        seen = set()
        held = self._holds_base
        for name, tensor in named_tensors:
            if name not in self._weights or self._weights[name].shape != tensor.shape:
                raise SgpoError(f"weight sync: the rollout model has no weight {name} of shape {tuple(tensor.shape)}")
            if name in checksums:
                raise SgpoError(f"weight sync: {name} arrived twice")
            checksums[name] = checksum(tensor)
            self._holds_base = self._holds_base and is_adapter(name)
            self._weights[name].copy_(tensor)
            seen.add(self._weights[name].data_ptr())
        if held and self._holds_base:  # adapters alone
            seen |= {tensor.data_ptr() for name, tensor in self._weights.items() if not is_adapter(name)}
        missing = [name for name, tensor in self._weights.items() if tensor.data_ptr() not in seen]
        if missing:
            raise SgpoError(f"weight sync: no new value arrived for {', '.join(missing[:3])} ({len(missing)} in all)")
        self._holds_base = any(is_adapter(name) for name in self._weights)
        if self._way is None and len(probe_ids) > 2:  # a family that cannot be sampled is refused before any rollout
            self._choose_way(probe_ids)
        self.policy_version = policy_version
        return SyncReceipt(checksums, self._probe(probe_ids))

    def holds_base(self) -> bool:
        """As RolloutEngine.holds_base."""
        return self._holds_base

    def _choose_way(self, ids: Sequence[int]) -> None:
        """Takes the first of `_WAYS` in which sampled tokens have the log-probs that the model gives them without
        batch, padding and cache. Raises SgpoError where there is none; `ids` is any prompt."""
        long = tuple(ids[:_TRIAL_PROMPT])
        short = long[:2]
        requests = [RolloutRequest(0, "auto", i, prompt, i) for i, prompt in enumerate((long, short, short))]
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=_TRIAL_NEW)  # the likeliest show little
        family = self._lm.config.get_text_config().model_type
        version, self.policy_version = self.policy_version, 0
        problem = ""
        for self._way in _WAYS:
            try:
                gaps = [gap for rollout in self._sample(requests, sampling) for gap in self._gaps(rollout)]
            except _FAILURES as error:
                problem = f"fails with {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                continue
            mean = sum(gaps) / len(gaps)
            if mean <= _TRIAL_GAP.get(self._lm.dtype, 0.1):
                self.policy_version = version
                if self._way != _WAYS[0]:
                    print(f"rollout: {family} is right in transformers' generate with {self._way}", flush=True)
                return
            problem = f"gives log-probs that differ by {mean:.2g} nats from those of the model without a cache"
        self._way, self.policy_version = None, None
        raise SgpoError(
            f"rollout.engine: hf cannot sample from {family}: transformers' generate {problem}; set rollout.engine to "
            "vllm, or take another model"
        )

    def _gaps(self, rollout: Rollout) -> list[float]:
        """|sampled log-prob - the model's own| of each token, in nats."""
        prompt = rollout.request.prompt_ids
        own = self._probe((*prompt, *rollout.completion_ids))[len(prompt) - 1 :]
        return [abs(a - b) for a, b in zip(rollout.rollout_logprobs, own, strict=True)]

    def _probe(self, ids: Sequence[int]) -> tuple[float, ...]:
        if len(ids) < 2:
            return ()
        tokens = torch.tensor([list(ids)], device=self._device)
        logprobs = self._lm(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return tuple(logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist())

    def sleep(self) -> None:
        """The copy stays where it is; only vLLM has memory worth giving back."""

    def wake(self) -> None:
        """See sleep."""

    def close(self) -> None:
        """As RolloutEngine.close."""
        self._weights = {}
        self._lm = None

    def _batches(self, requests: Sequence[RolloutRequest], max_new_tokens: int) -> list[list[int]]:
        """Indices by prompt length: like lengths together, rows x (longest prompt + new tokens) within the budget."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids))
        batches: list[list[int]] = []
        for index in order:
            length = len(requests[index].prompt_ids)
            # Padding costs prefill and cache: a prompt twice as long as the shortest starts a batch of its own.
            shortest = len(requests[batches[-1][0]].prompt_ids) if batches else 0
            fits = batches and (
                (len(batches[-1]) + 1) * (length + max_new_tokens) <= self._max_batch_tokens
                and length <= (2 * shortest + 16 if self._way is None or self._way.padded else shortest)
            )
            if fits:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def _sample_batch(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        assert self._way is not None
        prompts = sorted({request.prompt_ids for request in requests})
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([row_of[request.prompt_ids] for request in requests], device=self._device)
        input_ids, mask = self._pad_left(prompts)
        width = input_ids.shape[1]
        sampler = SeededSampler([request.seed for request in requests], sampling, self._device)
        with Watchdog("rollout: transformers' generate", self._stall_s) as sampler.watchdog:
            output = self._lm.generate(
                input_ids=input_ids[rows],
                attention_mask=mask[rows],
                past_key_values=self._prefill(input_ids, mask, rows) if self._way.shared else None,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self._eos_ids,
                    pad_token_id=self._pad_id,
                    use_cache=self._way.cached,
                ),
            )
        completions = output[:, width:].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        return [
            self._rollout(request, ids, values)
            for request, ids, values in zip(requests, completions, logprobs, strict=True)
        ]

    def _prefill(self, input_ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> DynamicCache | None:
        """The cache of all prompt tokens but the last, computed once per prompt and handed to each of its rows."""
        if input_ids.shape[1] == 1:
            return None
        cache = DynamicCache(config=self._lm.config)
        self._lm.base_model(
            input_ids=input_ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(rows)
        return cache

    def _pad_left(self, prompts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [B, longest]."""
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), width), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return input_ids.to(self._device), mask.to(self._device)

    def _rollout(self, request: RolloutRequest, ids: list[int], logprobs: list[float]) -> Rollout:
        assert self.policy_version is not None
        end = next((t + 1 for t, token in enumerate(ids) if token in self._eos_ids), None)
        length = len(ids) if end is None else end
        return Rollout(
            request=request,
            completion_ids=tuple(ids[:length]),
            rollout_logprobs=tuple(logprobs[:length]),
            truncated=end is None,
            policy_version=self.policy_version,
        )


class SeededSampler(LogitsProcessor):
    """Samples row i with the uniform numbers of seeds[i]; temperature 0 takes the most likely token.

    Called once per new token with scores [B, V]; returns scores that are 0 at the sampled token and -inf elsewhere.
    `logprobs` collects the log-probability [B] of each sampled token after temperature and top-p.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingParams, device: torch.device) -> None:
        self._sampling = sampling
        self._device = device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.logprobs: list[torch.Tensor] = []
        self.watchdog: Watchdog | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:  # transformers says FloatTensor
        if self.watchdog is not None:
            self.watchdog.beat()
        scores = scores.float()
        if self._sampling.temperature == 0:
            tokens = scores.argmax(-1, keepdim=True)
            logprobs = scores.log_softmax(-1).gather(-1, tokens)
        else:
            tokens, logprobs = self._sample(scores / self._sampling.temperature)
        self.logprobs.append(logprobs.squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter_(-1, tokens, 0.0)

    def _sample(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probs = scores.softmax(-1)
        if self._sampling.top_p < 1:
            probs = probs.masked_fill(probs < nucleus_floor(probs, self._sampling.top_p), 0.0)
        mass = probs.double().cumsum(-1)
        total = mass[:, -1:]
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])
        picked = torch.searchsorted(mass, uniform.to(self._device)[:, None] * total, right=True)
        # Rounding may point past the last token that has any probability.
        last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1, keepdim=True)
        picked = torch.minimum(picked, last)
        logprobs = (probs.gather(-1, picked).double() / total).log().float()
        return picked, logprobs


def _halves(batch: list[int], error: BaseException) -> list[list[int]]:
    if len(batch) == 1:
        raise SgpoError(f"memory ran out with one rollout at a time: {error}; lower rollout.max_new_tokens") from error
    print(f"rollout: memory ran out with {len(batch)} requests at once, trying {len(batch) // 2}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]


def nucleus_floor(probs: torch.Tensor, top_p: float, *, likeliest: int = 1024) -> torch.Tensor:
    """Least probability [B, 1] inside the smallest set of tokens that reaches top_p; tokens tied with it are inside.

    Looks at the `likeliest` tokens first; only rows in which these do not reach top_p have their whole row sorted.
    """

    def floor(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        ordered = rows.topk(width, dim=-1).values
        mass = ordered.double().cumsum(-1)
        index = (mass < top_p).sum(-1, keepdim=True).clamp(max=width - 1)
        return ordered.gather(-1, index), mass[:, -1] < top_p

    result, short = floor(probs, min(likeliest, probs.shape[-1]))
    if bool(short.any()):
        result[short] = floor(probs[short], probs.shape[-1])[0]
    return result
