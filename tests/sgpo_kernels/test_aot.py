"""Every kernel compiled ahead of time for three generations of GPUs: no spills, shared memory, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from processes import PATIENCE_S
from sgpo_kernels import sizes

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_resources(arch):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sgpo_kernels.aot", "--json", "--arch", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(rows) > 50
    for row in rows:
        print(row)
        assert row["arch"] == arch
        assert row["spills"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[arch], row
        name = row["variant"].split("[")[0]
        if name in ("scan_tiles", "divergence_tiles", "gradient_tiles", "peak_tiles"):
            # 16 bytes at a time: one context's or both contexts' tiles, and nothing of them in single words.
            contexts = 1 if name == "scan_tiles" or "kind=0" in row["variant"] else 2
            block = sizes.DEFAULT_BLOCKS[{"scan_tiles": "scan", "divergence_tiles": "divergence"}.get(
                name, "peaks" if name == "peak_tiles" else "gradient")]  # fmt: skip
            per_thread = block.rows * block.columns // (32 * block.warps) // 4
            assert row["loads"].get("128", 0) >= contexts * per_thread, row
        if name == "gradient_tiles":
            assert set(row["stores"]) == {"128"}, row


def test_a_spill_is_reported(monkeypatch, capsys):
    """The tool's exit status and message, on a result that it did not compile itself."""
    aot = pytest.importorskip("sgpo_kernels.aot")
    spilled = aot.Resources("k[bf16]", 90, 255, 40, 20, 0, {"128": 8}, {"128": 8}, 600, 32)
    monkeypatch.setattr(aot, "variants", lambda arch: [aot.Variant("k", {}, 4)])
    monkeypatch.setattr(aot, "compile_variant", lambda variant, arch: spilled)
    monkeypatch.setattr(sizes, "interpreting", lambda: False)
    assert aot.main(["--arch", "90"]) == 1
    assert "1 kernels spill" in capsys.readouterr().err
