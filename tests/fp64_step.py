"""One step of training in fp64, from the papers' formulas: full logits, plain autograd, AdamW by hand.

Nothing of sgpo's arithmetic is imported. The config says what is asked for; `Step.run` moves the weights of `lm`.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Learnt:
    """A completion that the loss reads. Policy rows have an advantage, the others are distilled or imitated; `weight`
    is of each token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    weight: torch.Tensor
    advantage: float = 0.0
    old: torch.Tensor | None = None
    teacher_prompt: tuple[int, ...] | None = None


@dataclass
class Step:
    """`lm`: a transformers model in fp64; `config`: the run's; `factor`: of the learning rate, by the schedule."""

    lm: torch.nn.Module
    config: object
    factor: float
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    alphas: list[tuple[float, float]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)  # of each group, the places of its teacher completions
    rows: dict[str, list[float]] = field(default_factory=dict)  # per-row numbers of the whole step

    def run(self, groups):
        batches = self.config.algorithm.mini_batches
        size = len(groups) // batches
        parts = [groups[i * size : (i + 1) * size] for i in range(batches)]
        work = [self.learnt(part, size) for part in parts]  # decided before any weight moves
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.lm.parameters()]
        steps = 0
        for learnt in work:
            if not learnt:
                self.losses.append(0.0)
                self.norms.append(None)
                continue
            loss = sum(self.loss_of(one) for one in learnt)
            self.losses.append(float(loss.detach()))
            self.lm.zero_grad()
            loss.backward()
            steps += 1
            self.norms.append(self.adamw(moments, steps))

    def logps(self, prompt, completion):
        """[tokens, V]."""
        logits = self.lm(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return (logits / self.config.rollout.temperature).log_softmax(-1)

    def taken(self, prompt, completion):
        return self.logps(prompt, completion).gather(1, torch.tensor(completion)[:, None])[:, 0]

    def learnt(self, groups, problems):
        """What is learnt of one mini-batch of `problems` problems."""
        algorithm, length = self.config.algorithm, self.config.rollout.max_new_tokens
        method = algorithm.method
        found = []
        if method == "dapo":
            groups = [g for g in groups if 0 < sum(self.correct(g.auto_results)) < len(g.auto)]
        all_tokens = sum(len(r.completion_ids) for g in groups for r in g.auto)
        demo_tokens = sum(len(g.demo_ids) for g in groups)
        for g in groups:
            rewards = torch.tensor([r.reward for r in g.auto_results], dtype=torch.float64)
            solved = self.correct(g.auto_results)
            if method == "sft":
                found.append(Learnt(g.prompts.plain, g.demo_ids, self.each(g.demo_ids, 1 / demo_tokens)))
            elif method in ("sgpo", "grpo"):
                if algorithm.autonomous_grpo:
                    weights = [1 / (problems * len(g.auto) * len(r.completion_ids)) for r in g.auto]
                    found += self.policy(g, rewards, weights)
                found += self.distilled(g, rewards, problems)
            elif method == "dapo":
                zone = algorithm.overlong_share * length
                over = [max(len(r.completion_ids) - (length - zone), 0.0) / zone if zone else 0.0 for r in g.auto]
                found += self.policy(g, rewards - torch.tensor(over).double(), [1 / all_tokens] * len(g.auto))
            elif method == "luffy":
                weight = 1 / (problems * (len(g.auto) + 1) * length)
                pool = torch.cat([rewards, torch.ones(1).double()])
                found += self.policy(g, pool, [weight] * len(g.auto))
                advantage = float(self.advantages(pool)[-1])
                if advantage:
                    found.append(Learnt(g.prompts.plain, g.demo_ids, self.each(g.demo_ids, weight * advantage)))
            elif sum(solved) <= algorithm.demo_gate:
                weight = 1 / (problems * len(g.demo_ids))
                found.append(Learnt(g.prompts.plain, g.demo_ids, self.each(g.demo_ids, weight)))
            else:
                found += self.policy(g, rewards, [1 / (problems * len(g.auto) * length)] * len(g.auto))
        return found

    def correct(self, results):
        return [r.reward > self.config.reward.correct_above for r in results]

    @staticmethod
    def each(completion, weight):
        return torch.full((len(completion),), weight, dtype=torch.float64)

    def advantages(self, rewards):
        if len(set(rewards.tolist())) == 1:
            return torch.zeros_like(rewards)
        centred = rewards - rewards.mean()
        return centred / (rewards.std() + 1e-6) if self.config.algorithm.normalize_std else centred

    def policy(self, group, rewards, weights):
        rollout, found = self.config.rollout, []
        for r, advantage, weight in zip(group.auto, self.advantages(rewards).tolist(), weights, strict=False):
            if not advantage:
                continue
            one = Learnt(group.prompts.plain, r.completion_ids, self.each(r.completion_ids, weight), advantage)
            if self.config.algorithm.mini_batches > 1 or rollout.importance_cap is not None:
                one.old = self.taken(one.prompt, one.completion).detach()
            sampled = torch.tensor(r.rollout_logprobs, dtype=torch.float64)
            now = self.taken(one.prompt, one.completion).detach()
            self.log("sampler_gap_mean", (now if one.old is None else one.old) - sampled, absolute=True)
            if rollout.importance_cap is not None:
                gap = one.old - sampled
                if rollout.importance_level == "sequence":
                    gap = gap.sum().expand_as(gap)
                ratio = gap.exp().clamp(max=rollout.importance_cap)
                self.log("importance_mean", ratio)
                one.weight = one.weight * ratio
            found.append(one)
        return found

    def distilled(self, group, rewards, problems):
        algorithm = self.config.algorithm
        right = [i for i, yes in enumerate(self.correct(group.guided_results)) if yes]
        kind = None if algorithm.method == "grpo" else algorithm.distillation
        self.alphas.append((0.0, 0.0))
        self.targets.append([])
        if not right or kind is None:
            return []
        chosen = right
        if algorithm.selection != "all":
            logps = [self.taken(group.prompts.plain, group.guided[i].completion_ids).detach() for i in right]
            scores = [float(row.sum() if algorithm.selection == "sum" else row.mean()) for row in logps]
            chosen = [right[scores.index(max(scores))]]
        p_auto = sum(self.correct(group.auto_results)) / len(group.auto)
        p_guided = len(right) / len(group.guided)
        if algorithm.alpha == "fixed":
            alpha = uncapped = algorithm.alpha_fixed
        else:
            if algorithm.alpha == "adaptive":
                gamma = algorithm.alpha_gamma
                uncapped = algorithm.alpha_0 * (p_guided - p_auto + gamma) / (p_auto + gamma)
            else:
                reward = sum(group.guided_results[i].reward for i in chosen) / len(chosen)
                pool = torch.cat([rewards, torch.tensor([reward]).double()])
                uncapped = float((reward - pool.mean()) / (pool.std() + 1e-6))
            alpha = min(max(uncapped, 0.0), algorithm.alpha_max)
        self.alphas[-1] = (alpha, uncapped)
        if not alpha:
            return []
        self.targets[-1] = chosen
        found = []
        for i in chosen:
            ids = group.guided[i].completion_ids
            weight = self.each(ids, alpha / (problems * len(chosen) * len(ids)))
            teacher = None if kind == "sft" else group.prompts.guided
            found.append(Learnt(group.prompts.plain, ids, weight, teacher_prompt=teacher))
        return found

    def loss_of(self, one):
        algorithm = self.config.algorithm
        if not one.advantage and one.teacher_prompt is None:
            logps = self.taken(one.prompt, one.completion)
            if algorithm.method == "luffy":
                return -(one.weight * logps.exp() / (logps.exp() + algorithm.demo_shaping)).sum()
            return -(one.weight * logps).sum()
        return self.policy_loss(one) if one.advantage else self.divergence_loss(one)

    def policy_loss(self, one):
        algorithm, every = self.config.algorithm, self.logps(one.prompt, one.completion)
        logps = every.gather(1, torch.tensor(one.completion)[:, None])[:, 0]
        ratio = (logps - (logps.detach() if one.old is None else one.old)).exp()
        low = 0.0 if algorithm.clip_low is None else 1 - algorithm.clip_low
        high = float("inf") if algorithm.clip_high is None else 1 + algorithm.clip_high
        gain = torch.minimum(ratio * one.advantage, ratio.clamp(low, high) * one.advantage)
        outside = (ratio < low) if one.advantage < 0 else (ratio > high)
        if algorithm.dual_clip is not None and one.advantage < 0:
            outside = outside | (gain < algorithm.dual_clip * one.advantage)
            gain = gain.clamp(min=algorithm.dual_clip * one.advantage)
        entropy = -(every.exp() * every).sum(-1)
        self.log("ratio_mean", ratio)
        self.log("clip_share", outside)
        self.log("entropy", entropy)
        return -(one.weight * (gain + algorithm.entropy_coef * entropy)).sum()

    def divergence_loss(self, one):
        algorithm, student = self.config.algorithm, self.logps(one.prompt, one.completion)
        teacher = self.logps(one.teacher_prompt, one.completion).detach()
        middle = ((student.exp() + teacher.exp()) / 2).log()

        def kl(p, q):
            return (p.exp() * (p - q)).sum(-1)

        value = {
            "forward_kl": lambda: kl(teacher, student),
            "reverse_kl": lambda: kl(student, teacher),
            "js": lambda: (kl(student, middle) + kl(teacher, middle)) / 2,
        }[algorithm.distillation]()
        delta = float("inf") if algorithm.max_token_kl is None else algorithm.max_token_kl
        over = value > delta
        self.log("kl_mean", value)
        self.log("kl_kept_mean", value * ~over)  # of the full length, as in Eq. 5
        self.log("kl_masked_share", over)
        limited = {
            "mask": lambda: value * ~over,
            "clamp": lambda: value.clamp(max=delta),
            "scale": lambda: torch.where(over, value * (delta / value.detach()), value),
            "off": lambda: value,
        }[algorithm.over_limit]()
        return (one.weight * limited).sum()

    def adamw(self, moments, steps):
        """The gradient norm before clipping, after one step."""
        optim = self.config.optim
        parameters = list(self.lm.parameters())
        norm = float(torch.stack([p.grad.norm() for p in parameters]).norm())
        shrink = min(1.0, optim.max_grad_norm / (norm + 1e-6))
        (one, two), rate = optim.betas, optim.lr * self.factor
        with torch.no_grad():
            for p, (first, second) in zip(parameters, moments, strict=True):
                gradient = p.grad * shrink
                first.mul_(one).add_(gradient * (1 - one))
                second.mul_(two).add_(gradient.square() * (1 - two))
                p.mul_(1 - rate * optim.weight_decay)
                p.sub_(rate * (first / (1 - one**steps)) / ((second / (1 - two**steps)).sqrt() + optim.eps))
        return norm

    def log(self, name, values, *, absolute=False):
        self.rows.setdefault(name, []).extend((values.abs() if absolute else values).detach().double().tolist())
