"""Where the numbers of a run go: metrics.jsonl, TensorBoard, wandb, and the samples of each step.

A resumed run drops the rows beyond its checkpoint, and a straight run and a resumed one leave the same file.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

from sgpo.reporting.run_files import METRICS_FILE, ROLLOUTS_FILE, TRAJECTORIES_FILE, JsonlWriter, Phase
from sgpo.types import Kind, SgpoError

Value: TypeAlias = float | int | str | None


class MetricsLogger:
    """Writes one row of metrics per step and phase to run_dir/metrics.jsonl, and to TensorBoard and wandb on request.

    Args:
        run_dir: the folder of the run; created if absent.
        tensorboard: also write run_dir/tensorboard/<phase>/, tags "<phase>/<key>".
        wandb_project: also log to this Weights & Biases project; a resumed run goes on in the same wandb run.
        is_main: False on every rank but one; such a logger accepts all calls and writes nothing.
        resume_step: last step to keep per phase, e.g. {"train": 40, "eval": 40}; rows beyond it are dropped, -1 drops
            the phase altogether. A phase that is not named keeps all its rows. wandb cannot drop what it was sent.

    Raises:
        SgpoError: tensorboard or wandb was asked for and is not installed, or an existing metrics.jsonl is damaged.
        ValueError: a phase other than "warmup", "train", "eval".
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        is_main: bool = True,
        resume_step: Mapping[str, int] | None = None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._resume_step = dict(resume_step or {})
        for phase in self._resume_step:
            _check_phase(phase)
        self._jsonl: JsonlWriter | None = None
        self._tensorboard: Callable[[str], Any] | None = None
        self._tensorboard_writers: dict[str, Any] = {}
        self._wandb: Any = None
        if is_main:
            self._jsonl = JsonlWriter(self._run_dir / METRICS_FILE, self._keep)
            self._tensorboard = self._tensorboard_factory() if tensorboard else None
            self._wandb = _start_wandb(wandb_project, self._run_dir) if wandb_project else None

    def log(self, phase: Phase, step: int, values: Mapping[str, Value]) -> None:
        """One row: {"phase": phase, "step": step, **values}. Floats that are not finite become null in the file.

        Raises ValueError for an unknown phase or for a value named "phase" or "step".
        """
        _check_phase(phase)
        if "phase" in values or "step" in values:
            raise ValueError('the names "phase" and "step" belong to the row itself; rename the value')
        if self._jsonl is None:
            return
        self._jsonl.write({"phase": phase, "step": step, **values})
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._log_tensorboard(phase, step, numbers)
        if self._wandb is not None:
            # Phases count their own steps, while wandb wants one step that only grows: so it is a plain column here.
            self._wandb.log({f"{phase}/step": step, **{f"{phase}/{key}": value for key, value in numbers.items()}})

    def close(self) -> None:
        """Flushes and closes every sink; a second call does nothing."""
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
        for writer in self._tensorboard_writers.values():
            writer.close()
        self._tensorboard_writers = {}
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keep(self, row: dict[str, Any]) -> bool:
        last = self._resume_step.get(row["phase"])
        return last is None or row["step"] <= last

    def _tensorboard_factory(self) -> Callable[[str], Any]:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SgpoError(
                "tensorboard logging is on but the tensorboard package is not installed; "
                "run `pip install tensorboard` or switch it off"
            ) from None

        def open_writer(phase: str) -> Any:
            last = self._resume_step.get(phase)
            # One folder per phase, because purge_step hides every later event of its folder whatever its tag.
            return SummaryWriter(
                str(self._run_dir / "tensorboard" / phase), purge_step=None if last is None else last + 1
            )

        return open_writer

    def _log_tensorboard(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            return
        if phase not in self._tensorboard_writers:
            self._tensorboard_writers[phase] = self._tensorboard(phase)
        for key, value in numbers.items():
            self._tensorboard_writers[phase].add_scalar(f"{phase}/{key}", value, step)
        self._tensorboard_writers[phase].flush()


def _check_phase(phase: str) -> None:
    if phase not in get_args(Phase):
        raise ValueError(f"phase: expected one of {get_args(Phase)}, got {phase!r}")


def _start_wandb(project: str, run_dir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SgpoError(
            f"wandb_project is {project!r} but the wandb package is not installed; "
            "run `pip install wandb` or leave wandb_project empty"
        ) from None
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8").strip()
    run = wandb.init(project=project, name=run_dir.resolve().name, id=run_id, resume="allow", dir=str(run_dir))
    for phase in get_args(Phase):
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run


class RolloutTable:
    """Appends sampled rollouts to run_dir/rollouts.jsonl and per-token KL values to run_dir/trajectories.jsonl.

    `resume_step` is the last training step to keep (None keeps all); `is_main` as in `MetricsLogger`.
    """

    def __init__(self, run_dir: str | Path, *, is_main: bool = True, resume_step: int | None = None) -> None:
        def keep(row: dict[str, Any]) -> bool:
            return resume_step is None or row["step"] <= resume_step

        self._rollouts = JsonlWriter(Path(run_dir) / ROLLOUTS_FILE, keep) if is_main else None
        self._trajectories = JsonlWriter(Path(run_dir) / TRAJECTORIES_FILE, keep) if is_main else None

    def add_rollout(
        self,
        step: int,
        *,
        problem_id: str,
        kind: Kind,
        reward: float,
        status: str,
        truncated: bool,
        is_target: bool,
        text: str,
        **extra: Any,
    ) -> None:
        """One sampled completion; `is_target` marks the o+ of its problem; `extra` is any further JSON value."""
        if self._rollouts is not None:
            self._rollouts.write(
                {
                    "step": step,
                    "problem_id": problem_id,
                    "kind": kind,
                    "reward": reward,
                    "status": status,
                    "truncated": truncated,
                    "is_target": is_target,
                    "text": text,
                    **extra,
                }
            )

    def add_trajectory(
        self,
        step: int,
        *,
        problem_id: str,
        tokens: Sequence[str],
        kl: Sequence[float],
        masked: Sequence[bool],
        max_token_kl: float | None,
    ) -> None:
        """The teacher completion of one problem by tokens: text, KL in nats before the mask, masked or not.

        `max_token_kl` is the threshold delta, None where the run has none. Raises ValueError if the lengths differ.
        """
        if not len(tokens) == len(kl) == len(masked):
            raise ValueError(
                f"tokens, kl and masked: expected equal lengths, got {len(tokens)}, {len(kl)} and {len(masked)}"
            )
        if self._trajectories is not None:
            self._trajectories.write(
                {
                    "step": step,
                    "problem_id": problem_id,
                    "tokens": list(tokens),
                    "kl": list(kl),
                    "masked": list(masked),
                    "max_token_kl": max_token_kl,
                }
            )

    def close(self) -> None:
        """Closes both files; a second call does nothing."""
        for writer in (self._rollouts, self._trajectories):
            if writer is not None:
                writer.close()
        self._rollouts = self._trajectories = None

    def __enter__(self) -> RolloutTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
