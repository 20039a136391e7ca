"""Committed rows of a GPU beside the prediction: every kernel finds its stage."""

from __future__ import annotations

from pathlib import Path

from sgpo_kernels import estimate

ROWS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu_h100.jsonl"


def test_measured_stages_stand_beside_the_predicted(monkeypatch):
    from benchmarks import stages

    asked = []
    nothing = {mode: {"stages": dict.fromkeys(estimate.ORDER, 1.0), "total": 50.0} for mode in stages.MODES}
    monkeypatch.setattr(stages, "predicted", lambda *shape: (asked.append(shape), nothing)[1])
    lines = stages.beside_file(ROWS, markdown=True).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert asked == [((8192, 1024), 3584, 152064)]
    # Modes that the rows do not have are left out.
    assert cells["ms"] == ["predicted exact", "measured exact", "predicted live", "measured live"]
    assert cells["scan"] == ["1.00", "2.15", "1.00", "2.15"]
    assert 13 < float(cells["dH"][1]) < 15
    assert float(cells[estimate.REST][1]) < 1.0
