"""One model family through the trainer's own doors, against what transformers computes in float64.

Each mode takes the folder of a model and ends as one `Outcome`: right, refused by a sentence, wrong, or a traceback.
The truth is `model(...).logits` of the plain model in float64, one sequence at a time, without padding; gradients are
those of a weighted sum of log-probs.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sgpo.algorithm.loss import LabelLogprobs
from sgpo.builders.model_engine import build_engine
from sgpo.builders.rollouts import build_policy_sampler
from sgpo.config import Config
from sgpo.engine.batching import Contexts, collate
from sgpo.engine.export import export_model
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_tokenizer
from sgpo.model.policy import PolicyModel
from sgpo.types import PromptPair, RolloutRequest, SamplingParams, SgpoError, TaskData
from sgpo.utils.config_file import checked

LOGPROB_LIMIT = 1e-4  # nats
GRADIENT_LIMIT = 1e-3  # relative to the truth, the worst parameter
PAD = 0
# Lengths that differ, longer than the windows of benchmarks.tiny_models; ids that every family reads as text.
_LENGTHS = ((5, 9), (11, 6), (3, 14))
_LORA = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}


# Log-probs of all completion tokens, and the gradient of their weighted sum by parameter.
Truth = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one mode. Errors are None where nothing was measured.

    status: "right", "refused" (`message` is the sentence), "wrong" (`message` says what is), or "traceback".
    logprob_error in nats, the largest; gradient_error relative, of the worst parameter.
    """

    status: str
    message: str = ""
    logprob_error: float | None = None
    gradient_error: float | None = None


class Fault(Exception):
    """What an export or the plain model must not be."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Prompts and completions, and a weight for each completion token, in order; `dtype` is that of the truth."""

    prompts: list[list[int]]
    completions: list[list[int]]
    weights: torch.Tensor
    dtype: torch.dtype = torch.float64


def make_sequences(seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 95, (count,), generator=generator).tolist()

    prompts, completions = [ids(p) for p, _ in _LENGTHS], [ids(c) for _, c in _LENGTHS]
    return Sequences(prompts, completions, torch.randn(sum(c for _, c in _LENGTHS), generator=generator))


# ---- the truth -----------------------------------------------------------------------------------------------------


def plain_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model as transformers loads it; Fault where it does not load, or weights are missing or of another shape.
    Left over may be those of other parts than the language model.

    The plainest arithmetic that it has: for attention and experts, too, whose faster forms have no float64.
    """
    from transformers import AutoModelForCausalLM

    plainest = {"attn_implementation": "eager", "experts_implementation": "eager"}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **plainest)
    except (ValueError, KeyError) as error:
        raise Fault(f"transformers does not load {folder.name}: {error}") from error
    lm, info = loaded
    for kind, names in info.items():
        if names and "unexpected" not in kind:
            first = ", ".join(sorted(map(str, names))[:3])
            raise Fault(f"transformers does not find all weights in {folder.name}: {len(names)} {kind} ({first})")
    return lm.eval()


def truth_of(lm: Any, sequences: Sequences) -> Truth:
    """(log-probs of the completion tokens, gradient of their weighted sum by parameter)."""
    lm.zero_grad()
    found = []
    for prompt, completion in zip(sequences.prompts, sequences.completions, strict=True):
        ids = torch.tensor([prompt + completion])
        logits = lm(input_ids=ids, use_cache=False).logits[0].double()
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, ids[0, len(prompt) :, None])[:, 0])
    logprobs = torch.cat(found)
    if not logprobs.isfinite().all():
        raise Fault("the plain model's own logits are not finite")
    if logprobs.requires_grad:
        (logprobs * sequences.weights).sum().backward()
    return logprobs.detach(), _gradients(lm)


def plain_errors(folder: Path, sequences: Sequences, truth: Truth, dtype: torch.dtype) -> tuple[float, float]:
    """Errors of transformers' own logits and gradients in `dtype`, as `judged` measures them: the yardstick."""
    return errors(truth_of(plain_model(folder, dtype), sequences), truth)[:2]


def _gradients(lm: Any) -> dict[str, torch.Tensor]:
    named = {name: p.grad for name, p in lm.named_parameters()}
    return {name: grad.detach().double().clone() for name, grad in named.items() if grad is not None}


# ---- one mode ------------------------------------------------------------------------------------------------------


def settings(folder: Path, **model: Any) -> Config:
    """A run's settings on this model; `packed` and the rest belong to their sections."""
    packing = "packed" if model.pop("packed", False) else "padded"
    raw = {
        "model": {"path": str(folder), "dtype": "float32"} | model,
        "data": {"train": "builtin"},
        "rollout": {"engine": "hf", "max_new_tokens": 8, "top_p": 1.0, "sync_tolerance": LOGPROB_LIMIT},
        "engine": {"packing": packing, "zero_stage": 0},
    }
    return checked(Config, raw, "families")


@contextmanager
def engine_on(config: Config) -> Iterator[ZeroEngine]:
    device = init_distributed(config.run.timeout_s)
    engine = build_engine(config, Path(config.model.path), config.optim, device)
    try:
        yield engine
    finally:
        engine.close()


def measured(model: PolicyModel, sequences: Sequences) -> Truth:
    """What `truth_of` gives, by the trainer's forward and backward."""
    batch = collate(sequences.prompts, sequences.completions, PAD, packed=model.packed)
    logprobs = model(LabelLogprobs(), Contexts(batch))
    (logprobs * sequences.weights).sum().backward()
    return logprobs.detach().double(), _gradients(model.lm)


def errors(found: Truth, truth: Truth) -> tuple[float, float, str]:
    """(largest log-prob error in nats, relative error of the gradient of the worst parameter, its name). A gradient
    that should be nil is measured by a thousandth of the whole."""
    logprob_error = float((found[0] - truth[0]).abs().max())
    whole = sum(float(g.square().sum()) for g in truth[1].values()) ** 0.5
    relative = {}
    for name in {**truth[1], **found[1]}:
        wanted = truth[1].get(name, torch.zeros(()))
        error = float((found[1].get(name, torch.zeros(())) - wanted).norm())
        relative[name] = error / max(float(wanted.norm()), 1e-3 * whole)
    worst = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
    return logprob_error, relative[worst], worst


def judged(found: Truth, truth: Truth, limits: tuple[float, float] = (LOGPROB_LIMIT, GRADIENT_LIMIT)) -> Outcome:
    """Right or wrong by the limits."""
    logprob_error, gradient_error, worst = errors(found, truth)
    problems = []
    if not logprob_error <= limits[0]:
        problems.append(f"log-probs differ by {logprob_error:.2g} nats")
    if not gradient_error <= limits[1]:
        problems.append(f"the gradient of {worst} differs by {gradient_error:.2g} of its size")
    return Outcome("wrong" if problems else "right", "; ".join(problems), logprob_error, gradient_error)


def attempt(check: Callable[[], Outcome]) -> Outcome:
    """The outcome of a check, or what it ended with instead."""
    try:
        return check()
    except SgpoError as error:
        return Outcome("refused", str(error))
    except Fault as error:
        return Outcome("wrong", str(error).splitlines()[0][:300])
    except Exception as error:  # the scan is there to find these
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "site-packages/torch/" not in f.filename]
        text = str(error).strip().splitlines() or [""]
        return Outcome("traceback", f"{type(error).__name__}: {text[0][:200]} ({' < '.join(places[:-5:-1])})")


def check_forward(folder: Path, sequences: Sequences, truth: Any, **model: Any) -> Outcome:
    """Log-probs and gradients under these settings."""
    with engine_on(settings(folder, **model)) as engine:
        return judged(measured(engine.model, sequences), truth)


def check_bfloat16(folder: Path, sequences: Sequences, truth: Truth, **model: Any) -> Outcome:
    """Log-probs as exact as transformers' own in bfloat16, where a token goes to another expert now and then; that a
    gradient is right shows in float32, by the same code, and that it is finite shows here."""
    with engine_on(settings(folder, dtype="bfloat16", **model)) as engine:
        found = measured(engine.model, sequences)
    logprob_error = plain_errors(folder, sequences, truth, torch.bfloat16)[0]
    return judged(found, truth, (2 * logprob_error + 0.05, sys.float_info.max))


def check_dropout(folder: Path, sequences: Sequences, truth: Truth, scratch: Path, **model: Any) -> Outcome:
    """Checkpointed, where the configuration has dropout: nothing is dropped."""
    copy = shutil.copytree(folder, scratch / "dropout", dirs_exist_ok=True)
    config = (folder / "config.json").read_text(encoding="utf-8")
    config = re.sub(r'("\w*(?:dropout|pdrop|layerdrop)\w*": )[\d.]+', r"\g<1>0.2", config)
    (copy / "config.json").write_text(config, encoding="utf-8")
    return check_forward(copy, sequences, truth, gradient_checkpointing=True, **model)


def check_lora(folder: Path, sequences: Sequences, scratch: Path, **model: Any) -> Outcome:
    """Adapters that are not zero: log-probs and the adapters' gradients against the plain model with the same adapters,
    and the export, which is merged, against both."""
    from sgpo.builders.model_engine import with_adapters

    config = settings(folder, lora=_LORA, **model)
    with engine_on(config) as engine:
        disturb(engine.model.lm, 0.05, trainable=True)
        found = measured(engine.model, sequences)
        for parameter in engine.model.lm.parameters():  # a step changes none that the forward pass goes around
            if parameter.requires_grad and parameter.grad is None:
                parameter.detach().zero_()
        adapters = {n: p.detach().double() for n, p in engine.model.lm.named_parameters() if p.requires_grad}
        export_model(engine, load_tokenizer(folder), scratch / "merged")
    plain = with_adapters(config, plain_model(folder, sequences.dtype))
    plain.load_state_dict(adapters, strict=False)
    outcome = judged(found, truth_of(plain, sequences))
    if outcome.status != "right":
        return outcome
    merged = truth_of(plain_model(scratch / "merged", sequences.dtype).requires_grad_(False), sequences)[0]
    export = _within_limit(float((merged - found[0]).abs().max()), "the merged export's log-probs differ")
    return outcome if export.status == "right" else export


def check_export(folder: Path, sequences: Sequences, scratch: Path, **model: Any) -> Outcome:
    """Weights after a step, so to say: their export has the names that transformers itself gives a checkpoint, and
    what it loads from there is what was exported."""
    with engine_on(settings(folder, **model)) as engine:
        disturb(engine.model.lm, 0.02)
        with torch.no_grad():
            batch = collate(sequences.prompts, sequences.completions, PAD)
            found = engine.evaluate(LabelLogprobs(), Contexts(batch)).double()
        export_model(engine, load_tokenizer(folder), scratch / "exported")
    plain_model(folder).save_pretrained(scratch / "saved")
    differing = sorted(stored_names(scratch / "saved") ^ stored_names(scratch / "exported"))
    if differing:
        return Outcome("wrong", f"{len(differing)} names are not a checkpoint's: {', '.join(differing[:3])}")
    reloaded = truth_of(plain_model(scratch / "exported", sequences.dtype).requires_grad_(False), sequences)[0]
    return _within_limit(float((reloaded - found).abs().max()), "the export's log-probs differ")


@contextmanager
def synced(folder: Path, sequences: Sequences, **model: Any) -> Iterator[tuple[ZeroEngine, PolicySampler, float]]:
    """(engine, its sampler, the largest gap on the probe) after a sync of changed weights."""
    config = settings(folder, **model)
    with engine_on(config) as engine:
        disturb(engine.model.lm, 0.02)
        probe = PromptPair(tuple(sequences.prompts[1] + sequences.completions[1]), None)
        sampler = build_policy_sampler(config, engine, folder, TaskData([], [probe]), load_tokenizer(folder))
        yield engine, sampler, sampler.sync(1).sync_gap_max
        sampler.close()


def check_sync(folder: Path, sequences: Sequences, **model: Any) -> Outcome:
    """Changed weights arrive at a sampler of its own: all of them, and its log-probs are the trainer's."""
    with synced(folder, sequences, **model) as (_, _, gap):
        return _within_limit(gap, "the sampler's log-probs differ")


def check_sampling(folder: Path, sequences: Sequences, scratch: Path, **model: Any) -> Outcome:
    """What the synced sampler draws, from prompts of several lengths at once, has the log-probs that it reports."""
    requests = [
        RolloutRequest(i, "auto", j, tuple(prompt), seed=10 * i + j)
        for i, prompt in enumerate(sequences.prompts)
        for j in range(2)
    ]
    with synced(folder, sequences, **model) as (engine, sampler, _):
        drawn = sampler.generate(requests, SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=8))
        export_model(engine, load_tokenizer(folder), scratch / "synced")
    asked, got = [list(r.request.prompt_ids) for r in drawn], [list(r.completion_ids) for r in drawn]
    synced_model = plain_model(scratch / "synced", sequences.dtype).requires_grad_(False)
    wanted = truth_of(synced_model, replace(sequences, prompts=asked, completions=got))[0]
    said = torch.tensor([value for r in drawn for value in r.rollout_logprobs], dtype=torch.float64)
    return _within_limit(float((said - wanted).abs().max()), "the log-probs of sampled tokens differ")


def _within_limit(gap: float, what: str) -> Outcome:
    right = gap <= LOGPROB_LIMIT
    return Outcome("right" if right else "wrong", "" if right else f"{what} by {gap:.2g} nats", gap)


@torch.no_grad()
def disturb(lm: Any, size: float, *, trainable: bool = False) -> None:
    """Moves the weights (only those that are trained, if so asked), so that stale ones show."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lm.parameters():
        if parameter.requires_grad or not trainable:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def stored_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder's safetensors."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            names |= set(stored.keys())
    return names


# ---- a family ------------------------------------------------------------------------------------------------------


def checks(
    folder: Path, sequences: Sequences, truth: Any, scratch: Path, **model: Any
) -> dict[str, Callable[[], Outcome]]:
    """Every mode by its name; `model` goes into its settings. The folder `scratch` gets the exports."""
    return {
        "padded": lambda: check_forward(folder, sequences, truth, **model),
        "packed": lambda: check_forward(folder, sequences, truth, packed=True, **model),
        "checkpointed": lambda: check_forward(folder, sequences, truth, gradient_checkpointing=True, **model),
        "packed, checkpointed": lambda: check_forward(
            folder, sequences, truth, packed=True, gradient_checkpointing=True, **model
        ),
        "dropout": lambda: check_dropout(folder, sequences, truth, scratch, **model),
        "bfloat16": lambda: check_bfloat16(folder, sequences, truth, **model),
        "LoRA": lambda: check_lora(folder, sequences, scratch, **model),
        "export": lambda: check_export(folder, sequences, scratch, **model),
        "sync": lambda: check_sync(folder, sequences, **model),
        "sampling": lambda: check_sampling(folder, sequences, scratch, **model),
    }
