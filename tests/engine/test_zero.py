"""The engine against plain autograd, and against itself: any split, any ZeRO stage, any number of processes."""

import json
import re
from pathlib import Path

import pytest
import torch

from sgpo.engine.zero import lr_factor
from sgpo.model.loading import load_causal_lm

WORKER = Path(__file__).with_name("zero_worker.py")
STAGES = (0, 1, 2, 3)
WHOLE, SPLIT = 4000, 100  # token budgets: everything in one micro-batch, or in many
FP32 = [f"{stage}:float32:{budget}" for stage in STAGES for budget in (WHOLE, SPLIT)]
LEAN = [f"3:float32:{WHOLE}:{option}" for option in ("packed", "checkpointed", "hosted", "tiled")]
LEAN_2 = f"3:float32:{SPLIT}:packed:hosted:tiled"
BF16 = [f"{stage}:bfloat16:{SPLIT}" for stage in STAGES]
# Of step_cases.py: STAGE:CHECKPOINTED:PACKED.
BROKEN = [f"broken:{stage}:float32" for stage in STAGES] + ["broken:0:bfloat16", "broken:2:bfloat16"]
BROKEN_2 = ["broken:0:float32", "broken:2:bfloat16", "broken:3:float32"]
STEPS = [f"step:{case}" for case in ("0:1:0", "0:1:1", "2:1:0", "3:1:0")]


def _run(launcher, tmp_path_factory, folder, cases, processes):
    out = tmp_path_factory.mktemp("zero") / "out.json"
    launcher([str(WORKER), str(out), str(folder), *cases], processes=processes)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one(launcher, tmp_path_factory, builtin_folder):
    return _run(launcher, tmp_path_factory, builtin_folder, [*FP32, *BF16, *LEAN, *STEPS, *BROKEN], 1)


@pytest.fixture(scope="module")
def two(launcher, tmp_path_factory, builtin_folder):
    cases = [f"{stage}:float32:{SPLIT}" for stage in STAGES]
    cases += [f"2:bfloat16:{SPLIT}", LEAN_2, *STEPS, *BROKEN_2]
    return _run(launcher, tmp_path_factory, builtin_folder, cases, 2)


@pytest.fixture(scope="module")
def plain(builtin_folder):
    """Loss and gradient of the same sequences with plain autograd in fp64, sequence by sequence, no fused op."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("zero_worker", WORKER)
    worker = module_from_spec(spec)
    spec.loader.exec_module(worker)
    lm = load_causal_lm(builtin_folder, dtype="float32").double()

    def hidden(prompt, completion):
        states = lm.base_model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        return states[len(prompt) - 1 : -1]

    head = lm.get_output_embeddings().weight
    total = torch.zeros((), dtype=torch.float64)
    for s in worker.make_sequences():
        rows, targets = hidden(s.prompt_ids, s.completion_ids), torch.tensor(s.completion_ids)
        logp = torch.log_softmax(rows @ head.T, -1)
        if s.distill_weight:
            with torch.no_grad():
                teacher = torch.log_softmax(hidden(s.teacher_prompt_ids, s.completion_ids) @ head.T, -1)
            kl = (teacher.exp() * (teacher - logp)).sum(-1)
            kl = kl * (1.0 / kl.detach()).clamp(max=1.0)
            total = total + (s.distill_weight * kl).sum()
        elif s.advantage:
            taken = logp.gather(-1, targets[:, None])[:, 0]
            total = total - (s.policy_weight * s.advantage * (taken - taken.detach()).exp()).sum()
    total.backward()
    return total.item(), {name: p.grad.flatten()[::37] for name, p in lm.named_parameters()}


def _relative(ours: dict, truth: dict) -> float:
    ours = torch.cat([torch.as_tensor(ours[name], dtype=torch.float64) for name in sorted(truth)])
    truth = torch.cat([torch.as_tensor(truth[name], dtype=torch.float64) for name in sorted(truth)])
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("case", FP32)
def test_gradient_is_that_of_plain_autograd_for_every_stage_and_split(one, plain, case):
    loss, truth = plain
    assert one[case]["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert _relative(one[case]["gradient"], truth) < 1e-5


@pytest.mark.parametrize("case", [*LEAN, LEAN_2])
def test_what_saves_memory_gives_the_plain_gradient_over_cut_weights_too(one, two, plain, case):
    loss, truth = plain
    run = one.get(case) or two[case]
    assert run["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert _relative(run["gradient"], truth) < 1e-5
    assert run["losses"] == pytest.approx(one[f"0:float32:{WHOLE}"]["losses"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_does_not_depend_on_the_split(one, stage):
    whole, split = one[f"{stage}:float32:{WHOLE}"], one[f"{stage}:float32:{SPLIT}"]
    assert split["batches"] > 3 * whole["batches"]
    assert _relative(split["gradient"], whole["gradient"]) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_loss_curve_of_one(one, two, stage):
    alone, pair = one[f"{stage}:float32:{SPLIT}"], two[f"{stage}:float32:{SPLIT}"]
    assert pair["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert pair["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert _relative(pair["gradient"], alone["gradient"]) < 1e-5


@pytest.mark.parametrize("case", FP32 + BF16)
def test_training_lowers_the_loss_and_moves_every_weight(one, case):
    losses = one[case]["losses"]
    assert losses[2] < losses[0]
    assert all(norm > 0 for norm in one[case]["norms"])


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32_with_fp32_masters(one, stage):
    low, full = one[f"{stage}:bfloat16:{SPLIT}"], one[f"{stage}:float32:{SPLIT}"]
    assert low["fp32_masters"]
    assert low["losses"] == pytest.approx(full["losses"], rel=0.1, abs=2e-3)


@pytest.mark.parametrize("case", FP32)
def test_scores_and_full_weights_agree_across_stages(one, case):
    reference_case = one[f"0:float32:{WHOLE}"]
    assert one[case]["scores"] == pytest.approx(reference_case["scores"], rel=1e-4)
    assert one[case]["weights"].keys() == reference_case["weights"].keys()
    for name, total in one[case]["weights"].items():
        assert total == pytest.approx(reference_case["weights"][name], rel=1e-3, abs=1e-2), name


@pytest.mark.parametrize("case", FP32 + BF16)
def test_a_step_without_live_rows_leaves_the_optimizer_alone(one, case):
    assert one[case]["stepped_on_nothing"] is False


@pytest.fixture(params=["one process", "two processes"])
def run(request):
    return request.getfixturevalue("one" if request.param == "one process" else "two")


@pytest.mark.parametrize("case", STEPS)
def test_a_whole_step_is_the_same_for_every_stage_packing_and_number_of_processes(one, run, case):
    """Choice, gradient, the later steps and every number that is logged of loss and guidance."""
    truth, found = one[STEPS[0]], run[case]
    # Of each group (index, sample): three choices, of which the second is a tie, and a lone correct one.
    assert found["first"]["teacher_completions"] == truth["first"]["teacher_completions"]
    assert [1, 0] in found["first"]["teacher_completions"]
    assert _relative(found["gradient"], truth["gradient"]) < 1e-5
    for step, expected in zip([found["first"], *found["later"]], [truth["first"], *truth["later"]], strict=True):
        assert step["teacher_completions"] == expected["teacher_completions"]
        assert (step["loss"], step["grad_norm"]) == pytest.approx((expected["loss"], expected["grad_norm"]), rel=1e-4)
        for name, value in expected["metrics"].items():
            if name not in ("micro_batches", "train_tokens", "padding_share"):
                wanted = None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)
                assert step["metrics"][name] == wanted, name
    for name, total in truth["weights"].items():
        assert found["weights"][name] == pytest.approx(total, rel=1e-3, abs=1e-2), name


def _through_the_backbone(result: dict, *, with_graph: bool) -> list[list[int]]:
    """Sequences over all ranks, sorted."""
    return sorted(
        row for rank in result["first"]["inputs"] for graph, rows in rank if graph == with_graph for row in rows
    )


@pytest.mark.parametrize("case", [case for case in STEPS if case != "step:0:1:1"])
def test_only_what_is_learnt_or_decides_goes_through_the_backbone(run, case, monkeypatch):
    """Each sequence once to be scored and once to be learnt: no dead rollout, no teacher pass but of what is
    distilled, no lone o+ scored. The last norm sees the rows of completions alone."""
    monkeypatch.syspath_prepend(WORKER.parent)
    import step_cases

    groups, result = step_cases.make_groups(), run[case]
    taught = [groups[group].guided[sample] for group, sample in result["first"]["teacher_completions"]]
    live = [rollout for g in groups if len(set(g.auto_rewards)) > 1 for rollout in g.auto]
    scored = [
        rollout
        for g in groups
        for rollout, reward in zip(g.guided, g.guided_rewards, strict=True)
        if reward and sum(g.guided_rewards) > 1
    ]
    learnt = live + taught

    def plain(rollouts):
        return [[*groups[r.request.problem_index].prompts.plain, *r.completion_ids] for r in rollouts]

    guided = [[*target.request.prompt_ids, *target.completion_ids] for target in taught]
    assert _through_the_backbone(result, with_graph=True) == sorted(plain(learnt))
    assert _through_the_backbone(result, with_graph=False) == sorted(plain(scored) + guided)
    rows = sum(len(rollout.completion_ids) for rollout in learnt + scored + taught)
    assert sum(result["first"]["norm_rows"]) == rows


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (0, "constant", 0.1),
        (4, "constant", 0.5),
        (9, "cosine", 1.0),
        (10, "constant", 1.0),
        (10, "linear", 1.0),
        (55, "linear", 0.5),
        (55, "cosine", 0.5),
        (100, "linear", 0.0),
        (100, "cosine", 0.0),
    ],
)
def test_learning_rate_schedule(step, schedule, expected):
    assert lr_factor(step, 100, warmup_ratio=0.1, schedule=schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("processes", "case"), [(1, case) for case in BROKEN] + [(2, case) for case in BROKEN_2])
def test_a_step_that_is_not_finite_changes_nothing(one, two, processes, case):
    """On no rank, whichever has it: neither weights nor Adam's moments; all ranks say the same place."""
    found = (one if processes == 1 else two)[case]
    alone, with_broken_steps = found["weights"]
    assert alone == with_broken_steps
    said = found["said"]
    assert len(said["stop row"]) == processes
    assert len(set(said["stop row"])) == len(set(said["stop gradient"])) == 1
    place = r"not finite: the completion of a prompt of \d+ tokens, token \d+ of \d+ \(\d+\): nan \(\d+ in all\)"
    assert re.match(place, said["stop row"][0])
    assert "last checkpoint is whole" in said["stop row"][0]
    assert "no log-prob, but the gradient itself" in said["stop gradient"][0]
    for what in ("row", "gradient"):
        for sentence, norm, passes in said[f"skip {what}"]:
            assert (norm, passes) == (None, 0)
            assert sentence.startswith("not finite: " + ("the one, token" if what == "row" else "no log-prob"))
