"""What only a CUDA device can show: widening products, compiled kernels at real shapes, host syncs, the allocator."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import launch, reference, testing
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (H, V) of Qwen2.5-7B, Qwen2.5-1.5B, Llama-3.1-8B and SmolLM2-135M.
HEADS = ((3584, 152064), (1536, 151936), (4096, 128256), (576, 49152))


def to_cuda(case):
    for store in (case.leaves, case.fixed):
        store.update({name: value.cuda() for name, value in store.items() if isinstance(value, Tensor)})
    case.upstream = case.upstream.cuda()
    return case


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 64, 1003), (130, 128, 4096)], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": "rows", "logit_softcap": 4.0}], ids=str)
def test_cuda_agrees_with_float64(make_case, op, dtype, shape, impl, options):
    case = make_case(op, dtype, shape, **options)
    truth, plain = case.results(reference, torch.float64), case.results(reference)
    first, second = (to_cuda(case).results(chunk_rows=32, impl=impl) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if value.dtype == torch.bool:
            assert torch.equal(value.cpu(), truth[name]), name
        else:
            testing.assert_close_to_reference(value.cpu(), plain[name], truth[name], name=name, cancelled=8.0)


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def exact_sgpo(states, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 values and gradients of the on-policy SGPO loss without clips or limits, in blocks of rows."""
    head = states.head.double()
    dhead = torch.zeros_like(head)
    rows: dict[str, list[Tensor]] = {"logprobs": [], "kl": [], "dpolicy": [], "ddistill": []}
    for block in range(0, len(states.policy_hidden), 64):
        part = slice(block, block + 64)
        hidden, targets = states.policy_hidden[part].double(), states.policy_targets[part].unsqueeze(1)
        logp = (hidden @ head.t()).log_softmax(1)
        rows["logprobs"].append(logp.gather(1, targets).squeeze(1))
        dz = logp.exp().scatter_add_(1, targets, torch.full_like(targets, -1, dtype=logp.dtype))
        dz *= (weights["advantages"] * weights["policy_weight"])[part].double().unsqueeze(1)
        rows["dpolicy"].append(dz @ head)
        dhead.addmm_(dz.t(), hidden)
    for block in range(0, len(states.distill_hidden), 64):
        part = slice(block, block + 64)
        hidden, teacher = states.distill_hidden[part].double(), states.teacher_hidden[part].double()
        logp, logt = ((x @ head.t()).log_softmax(1) for x in (hidden, teacher))
        rows["kl"].append((logt.exp() * (logt - logp)).sum(1))
        dz = (logp.exp() - logt.exp()) * weights["distill_weight"][part].double().unsqueeze(1)
        rows["ddistill"].append(dz @ head)
        dhead.addmm_(dz.t(), hidden)
    return {"dhead": dhead, **{name: torch.cat(parts) for name, parts in rows.items()}}


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["calibrated", "spread:0.1"])
@pytest.mark.parametrize(("width", "vocab"), HEADS, ids=str)
def test_real_shapes(width, vocab, kind, impl):
    """bf16 at the published shapes, dense and with live columns, against float64."""
    from benchmarks import states as sources

    states = sources.make(kind, width, vocab, 512, 256, dtype=torch.bfloat16, device="cuda", seed=0)
    gen = torch.Generator("cuda").manual_seed(1)
    weights = {
        "advantages": torch.randn(512, generator=gen, device="cuda"),
        "policy_weight": torch.full((512,), 1 / 512, device="cuda"),
        "distill_weight": torch.full((256,), 1 / 256, device="cuda"),
    }
    truth = exact_sgpo(states, weights)
    for tolerance in (0.0, 2.0**-12):
        leaves = [
            x.detach().clone().requires_grad_() for x in (states.policy_hidden, states.distill_hidden, states.head)
        ]
        loss, stats = sgpo_kernels.sgpo_loss(
            leaves[0],
            states.policy_targets,
            leaves[1],
            states.teacher_hidden,
            leaves[2],
            **weights,
            clip_low=None,
            clip_high=None,
            column_tolerance=tolerance,
            impl=impl,
        )
        loss.backward()
        assert float((stats.policy.logprobs.double() - truth["logprobs"]).abs().max()) < 5e-5
        kl = stats.divergence.divergence.double()
        assert bool(((kl - truth["kl"]).abs() <= 2e-6 + 1e-4 * truth["kl"]).all())
        for leaf, name in zip(leaves, ("dpolicy", "ddistill", "dhead"), strict=True):
            assert leaf.grad is not None
            assert relative(leaf.grad, truth[name]) < 4e-3, (name, tolerance)


@pytest.mark.parametrize("op", ["policy", "forward_kl"])
def test_offsets_beyond_32_bits(op):
    """70,000 rows of 32,768 columns in one chunk: the last row begins at element 2,293,727,232 (20 GiB of memory)."""
    rows, vocab, width = 70_000, 32_768, 16
    gen = torch.Generator("cuda").manual_seed(0)
    hidden, teacher = (torch.randn(rows, width, generator=gen, device="cuda") for _ in range(2))
    head = torch.randn(vocab, width, generator=gen, device="cuda") / 4
    weight = torch.ones(rows, device="cuda")
    targets = torch.randint(vocab, (rows,), generator=gen, device="cuda")
    results = []
    for chunk in (rows, 1000):
        leaf = hidden.clone().requires_grad_()
        if op == "policy":
            loss, stats = sgpo_kernels.linear_policy_loss(
                leaf, head, targets, advantages=weight, token_weight=weight, clip_low=None, clip_high=None,
                impl="triton", chunk_rows=chunk,
            )  # fmt: skip
        else:
            loss, stats = sgpo_kernels.linear_divergence(
                leaf, teacher, head, token_weight=weight, impl="triton", chunk_rows=chunk
            )
        loss.backward()
        results.append((stats[0], leaf.grad))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-8])
def test_host_syncs_are_the_counts_that_shapes_need(make_case, op, impl, tolerance):
    """One per group of rows; with live columns one more per chunk."""
    case = to_cuda(make_case(op, torch.bfloat16, (70, 64, 1003)))
    extra = {} if op == "logprob" else {"column_tolerance": tolerance}
    case.results(chunk_rows=32, impl=impl, **extra)
    groups = 2 if op == "sgpo" else 1
    chunks = 0 if op == "logprob" or not tolerance else 3 * groups
    assert testing.host_syncs(lambda: case.results(chunk_rows=32, impl=impl, **extra)) <= groups + chunks


@pytest.mark.parametrize(("op", "formula"), [("policy", "policy"), ("forward_kl", "divergence"), ("js", "divergence")])
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-8])
def test_peak_is_below_the_formula(make_case, op, formula, tolerance):
    shape = (2048, 512, 32000)
    case = to_cuda(make_case(op, torch.bfloat16, shape, dead=0.0))
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}

    def run() -> None:
        function = case.function(sgpo_kernels)
        function(**leaves, **case.fixed, chunk_rows=256, column_tolerance=tolerance)[0].backward()

    run()
    for leaf in leaves.values():
        leaf.grad = None
    assert testing.cuda_peak(run).peak_bytes <= launch.extra_bytes(formula, *shape, torch.bfloat16, "cuda", chunk=256)


def test_annealing_does_not_recompile(make_case):
    """Clips, limit, tolerance and weights are run-time arguments of the compiled kernels."""
    from sgpo_kernels import triton_kernels

    kernels = (triton_kernels.settle_scores, triton_kernels.settle_divergence, triton_kernels.peak_tiles)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    counts = []
    for step in range(4):
        case = to_cuda(make_case("sgpo", torch.bfloat16, (70, 64, 1003)))
        case.fixed.update(clip_low=0.1 + 0.01 * step, clip_high=0.2 + 0.01 * step, max_token_kl=1.0 + step)
        case.fixed["distill_weight"] *= 0.9**step
        case.results(impl="triton", column_tolerance=2.0 ** -(8 + step))
        counts.append(compiled())
    assert counts[0] > 0
    assert counts == counts[:1] * 4
