"""The losses per row in a loop of one's own: a Hugging Face model, a reduction that is not ours, a few steps on a CPU.

    python examples/own_loop.py [--steps 4]

A trainer that normalises per sequence, drops tokens or rescales by what it finds in the losses cannot give its weights
beforehand. `token_weight=None` returns the losses [N] and takes any gradient that comes back. Every step is held
against the same loss in plain PyTorch, with all logits [N, V]; the largest differences are printed.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from sgpo_kernels import linear_divergence, linear_policy_loss
from torch import Tensor, nn

from sgpo.data.builtin import make_model

CLIP_LOW, CLIP_HIGH, MAX_TOKEN_KL, GUIDANCE_COEF = 0.2, 0.28, 1.0, 0.5


class Batch(NamedTuple):
    """B completions of T tokens each; the rows, N = B T, are their positions in order."""

    input_ids: Tensor  # int64 [B, T]
    guided_ids: Tensor  # int64 [B, T], another context of the same completions
    targets: Tensor  # int64 [N]
    sequence: Tensor  # int64 [N], whose row it is
    old_logprobs: Tensor  # float32 [N]
    advantages: Tensor  # float32 [N]


def reduce(losses_N: Tensor, sequence_N: Tensor) -> Tensor:
    """The mean over sequences of the root mean square of a sequence's losses: no set of weights gives this."""
    count_B = torch.bincount(sequence_N).to(losses_N.dtype)
    squares_B = torch.zeros_like(count_B).index_add(0, sequence_N, losses_N.square())
    return (squares_B / count_B + 1e-12).sqrt().mean()


def fused(hidden: Tensor, guided: Tensor, head: Tensor, x: Batch) -> Tensor:
    policy, _ = linear_policy_loss(
        hidden,
        head,
        x.targets,
        old_logprobs=x.old_logprobs,
        advantages=x.advantages,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
    )
    divergence, _ = linear_divergence(hidden, guided, head, max_token_kl=MAX_TOKEN_KL)
    return reduce(policy, x.sequence) + GUIDANCE_COEF * reduce(divergence, x.sequence)


def plain(hidden: Tensor, guided: Tensor, head: Tensor, x: Batch) -> Tensor:
    logp = (hidden @ head.t()).log_softmax(1)
    teacher = (guided @ head.t()).log_softmax(1).detach()
    ratio = (logp.gather(1, x.targets.unsqueeze(1)).squeeze(1) - x.old_logprobs).exp()
    policy = -torch.minimum(ratio * x.advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * x.advantages)
    divergence = (teacher.exp() * (teacher - logp)).sum(1)
    divergence = torch.where(divergence <= MAX_TOKEN_KL, divergence, 0.0)
    return reduce(policy, x.sequence) + GUIDANCE_COEF * reduce(divergence, x.sequence)


def make_batch(vocab: int, sequences: int = 6, length: int = 20) -> Batch:
    """Random tokens; the guided context differs in the first four."""
    input_ids = torch.randint(vocab, (sequences, length + 1))
    guided_ids = input_ids.clone()
    guided_ids[:, :4] = torch.randint(vocab, (sequences, 4))
    sequence = torch.arange(sequences).repeat_interleave(length)
    old = -torch.tensor(float(vocab)).log() + 0.3 * torch.randn(sequences * length)
    advantages = torch.randn(sequences)[sequence]
    return Batch(input_ids[:, :-1], guided_ids[:, :-1], input_ids[:, 1:].reshape(-1), sequence, old, advantages)


def states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Last hidden states [N, H], without logits."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)  # type: ignore[operator]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """max |a - b| over all tensors, relative to the largest entry of theirs."""
    size = max(float(b.abs().max()) for b in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / size


def train(steps: int) -> tuple[list[float], float, float]:
    """(loss of each step, largest relative error of the loss, largest relative error of a gradient)."""
    torch.manual_seed(0)
    model = make_model(seed=0, hidden=32)
    head = model.lm_head.weight
    batch = make_batch(head.shape[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, loss_error, grad_error = [], 0.0, 0.0
    for _ in range(steps):
        hidden = states(model, batch.input_ids)
        with torch.no_grad():
            guided = states(model, batch.guided_ids)
        expected = plain(hidden, guided, head, batch)
        wanted = gradients(model, expected)
        loss = fused(states(model, batch.input_ids), guided, head, batch)
        found = gradients(model, loss)
        loss_error = max(loss_error, abs(loss.item() - expected.item()) / abs(expected.item()))
        grad_error = max(grad_error, largest_error(found, wanted))
        for parameter, grad in zip(model.parameters(), found, strict=True):
            parameter.grad = grad
        optimizer.step()
        losses.append(loss.item())
    return losses, loss_error, grad_error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Losses per row in a loop of one's own.")
    parser.add_argument("--steps", type=int, default=4)
    losses, loss_error, grad_error = train(parser.parse_args(arguments).steps)
    print("loss by step: " + " ".join(f"{loss:.4f}" for loss in losses))
    print(f"largest difference to plain PyTorch, relative: loss {loss_error:.1e}, gradients {grad_error:.1e}")


if __name__ == "__main__":
    main()
