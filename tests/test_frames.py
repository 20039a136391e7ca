"""How many of our frames lie between `sgpo train` and the row arithmetic of the loss, in a real step of the quickstart.

`python tests/test_frames.py` prints the chain.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW_ARITHMETIC = (
    "sgpo_kernels.backend_torch",
    "policy_row_values",
)  # called for the policy rows of every training step
MOST_FRAMES = 13

# The model is untrained here: a reward that varies gives it something to learn in the first step.
REWARD = """
def by_length(completion, answer, problem):
    return float(len(completion.split()) % 2)
"""
CHILD = """
import importlib, json, sys, traceback
from pathlib import Path

module, function = sys.argv[1:3]
owner = importlib.import_module(module)

def here(*_, **__):
    raise RuntimeError("the row arithmetic")

assert callable(getattr(owner, function))
setattr(owner, function, here)
from sgpo import cli

try:
    cli.main(sys.argv[3:])
except RuntimeError as error:
    chain = [[f.filename, f.name] for f in traceback.extract_tb(error.__traceback__)]
    Path("chain.json").write_text(json.dumps(chain))
"""


def frames(folder: Path) -> list[tuple[str, str]]:
    """(file, function) of every frame from the command line to the row arithmetic, this test's own left out."""
    (folder / "frames_reward.py").write_text(REWARD)
    words = [
        "train", str(ROOT / "configs" / "quickstart.yaml"), "--warmup.enabled", "false", "--data.eval", "null",
        "--reward.kind", "frames_reward:by_length", "--reward.workers", "1", "--rollout.problems_per_step", "4",
        "--train.max_steps", "1", "--data.train_limit", "8",
    ]  # fmt: skip
    path = [str(ROOT / "kernels"), str(ROOT), str(folder)]
    code = f"import sys; sys.path[:0] = {path!r}\n{CHILD}"
    done = subprocess.run(
        [sys.executable, "-c", code, *ROW_ARITHMETIC, *words], cwd=folder, capture_output=True, text=True
    )
    assert (folder / "chain.json").exists(), done.stdout + done.stderr
    chain = [(file, name) for file, name in json.loads((folder / "chain.json").read_text()) if file != "<string>"]
    assert chain[0][0] == str(ROOT / "sgpo" / "cli.py")
    return chain


def ours(chain: list[tuple[str, str]]) -> list[str]:
    """Those of sgpo/ and kernels/, as "file: function"."""
    places = [(Path(file), name) for file, name in chain]
    homes = [ROOT / "sgpo", ROOT / "kernels"]
    return [f"{f.relative_to(ROOT)}: {name}" for f, name in places if any(home in f.parents for home in homes)]


def test_few_frames_lie_between_the_command_and_the_row_arithmetic(tmp_path):
    chain = frames(tmp_path)
    found = ours(chain)
    print(f"{len(found)} frames of ours, {len(chain)} in all", *found, sep="\n")
    assert len(found) + 1 <= MOST_FRAMES, found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        chain = frames(Path(scratch))
    print(f"{len(ours(chain))} frames of ours, {len(chain)} in all", *ours(chain), sep="\n")
