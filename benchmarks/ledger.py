"""Results on disk while a long benchmark runs, so that it can be stopped and gone on with.

`plan.json` says what is run; `trials.jsonl` has a line for each finished trial. It knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import save_text
from benchmarks.sweep import Setting
from benchmarks.trial import Trial
from models.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run does, decided once."""

    run: Mapping[str, Any]  # what results depend on: model, prompts, length, steps, seed
    settings: tuple[Setting, ...]  # all that are compared
    presets: Mapping[str, Setting]  # settings that have a name
    calibrated: Mapping[str, float]
    """Thresholds at which the presets of that name would do the paper's share of the work."""


class Ledger:
    """The results in one folder.

    Args:
        folder: it is there already.
        run: what the results depend on; results of another run are refused.

    Raises:
        InputError: the folder holds another run, or files that are damaged.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._plan_file, self._trials_file, self._run = folder / "plan.json", folder / "trials.jsonl", dict(run)
        self.plan: Plan | None = self._read_plan()
        self.trials: list[Trial] = self._read_trials() if self.plan else []

    def begin(self, plan: Plan) -> None:
        """Note what will be run; older results go."""
        self._trials_file.unlink(missing_ok=True)
        save_text(self._plan_file, json.dumps(asdict(plan), indent=1))
        self.plan, self.trials = plan, []

    def add(self, trial: Trial) -> None:
        """Note a finished trial."""
        with self._trials_file.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        self.trials.append(trial)

    def missing(self, prompt: str, seed: int) -> list[Setting]:
        """Settings that are still to be run on a prompt."""
        assert self.plan is not None
        done = {trial.setting for trial in self.trials if (trial.prompt, trial.seed) == (prompt, seed)}
        return [setting for setting in self.plan.settings if setting not in done]

    def _read_plan(self) -> Plan | None:
        if not self._plan_file.exists():
            return None
        try:
            values = json.loads(self._plan_file.read_text())
            settings = tuple(Setting(**one) for one in values["settings"])
            presets = {name: Setting(**one) for name, one in values["presets"].items()}
            found = Plan(run=values["run"], settings=settings, presets=presets, calibrated=values["calibrated"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self._plan_file} is damaged ({error}): remove the folder") from None
        for key in sorted({*found.run, *self._run}):
            if found.run.get(key) != self._run.get(key):
                before, now = found.run.get(key), self._run.get(key)
                raise InputError(
                    f"{self._plan_file.parent} holds results of another run ({key} was {before}, is now {now}): "
                    "remove it, or choose another folder with --out"
                )
        return found

    def _read_trials(self) -> list[Trial]:
        """Finished trials. A last line that was cut off when the run was stopped is taken off the file."""
        try:
            text = self._trials_file.read_text()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            save_text(self._trials_file, whole) if whole else self._trials_file.unlink()
        try:
            return [_trial(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._trials_file} is damaged ({error}): remove the folder") from None


def _trial(values: dict[str, Any]) -> Trial:
    return Trial(**{**values, "setting": Setting(**values["setting"])})
