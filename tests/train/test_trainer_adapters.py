"""A whole run with adapters and with states that leave while the rollout engine is awake."""

import shutil

import tiny_runs

from sgpo.model.loading import load_causal_lm


def test_a_run_with_adapters_resumes_exactly_and_exports_a_plain_model(tmp_path):
    arguments = (
        "--model.lora.rank", "4",
        "--model.lora.sync", "adapters",
        "--engine.zero_stage", "2",
        "--engine.offload_states_during_rollout", "true",
        "--train.max_steps", "2",
        "--data.eval", "null",
    )  # fmt: skip
    tiny_runs.finish(tmp_path, *arguments)
    run = tmp_path / "runs" / "tiny"
    assert [row["step"] for row in tiny_runs.rows(run)] == [1, 2]
    assert all(row["sync_gap_max"] < 2e-4 and row["grad_norm"] > 0 for row in tiny_runs.rows(run))
    trained = load_causal_lm(run / "final", dtype="float32").state_dict()
    start = load_causal_lm(run / "builtin-model", dtype="float32").state_dict()
    assert trained.keys() == start.keys()
    moved = {name for name in trained if not trained[name].equal(start[name])}
    assert moved
    assert all("proj" in name for name in moved)
    assert all(row["sync_bytes"] < 200_000 for row in tiny_runs.rows(run))  # of 2 MB

    straight, second = tiny_runs.digest(run), tiny_runs.rows(run)[1]
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "final")
    tiny_runs.finish(tmp_path, *arguments)
    assert tiny_runs.digest(run) == straight
    assert tiny_runs.rows(run)[1]["loss"] == second["loss"]
