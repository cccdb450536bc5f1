"""The results of a study: its best trials with intervals, the importance of each parameter, and plots."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType

from specrl.core.statistics import mean_interval
from specrl.io.output import OutputDir, table
from specrl.measure.machine import environment
from specrl.reports.figures import save_plot
from specrl.studies.config import Study, list_values

if TYPE_CHECKING:
    import optuna

    Trial = optuna.trial.FrozenTrial

SHOWN = 5  # best trials in the table


def write_report(study: optuna.Study, spec: Study, out: OutputDir) -> dict[str, Any]:
    """Write trials.csv, values.csv, study.json and the plots, and return the contents of study.json."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    states = [trial.state.name.lower() for trial in trials]
    results = {
        "study": spec.name,
        "objectives": dict(zip(spec.objectives, spec.directions, strict=True)),
        "trials": {state: states.count(state) for state in dict.fromkeys(states)},
        "best": [_row(spec, trial) for trial in _best(study, spec, complete)],
        "importance": {name: _importance(study, target) for name, target in _targets(spec).items()},
        "environment": environment(),
    }
    out.write_csv("trials.csv", [_row(spec, trial) for trial in trials])
    out.write_csv("values.csv", mean_by_value(spec, complete))
    out.write_json("study.json", results)
    if len(complete) > 1:
        _plot(study, spec, out.path)
    return results


def summarize(results: Mapping[str, Any], spec: Study, url: str, directory: Path) -> list[RenderableType]:
    """Return the best trials as a table, and commands for further steps."""
    best: Sequence[Mapping[str, Any]] = results["best"]
    finished = ", ".join(f"{count} {state}" for state, count in results["trials"].items())
    if not best:
        why = " within the constraints" if spec.constraints else ""
        return [f"no trial was completed{why} ({finished}); see {directory / 'trials.csv'}"]
    rows = []
    for trial in best[:SHOWN]:
        row = {"trial": trial["trial"]}
        for name in spec.objectives:
            known = f"{name}_low" in trial
            bounds = f" [{trial[f'{name}_low']:.4g}, {trial[f'{name}_high']:.4g}]" if known else ""
            row[f"{name} [95 %]" if known else name] = f"{trial[name]:.4g}{bounds}"
        rows.append({**row, **{name: trial[name] for name in spec.search}})
    title = "Pareto front" if len(spec.objectives) > 1 else "best trials"
    out: list[RenderableType] = [table(rows, title=f"{spec.name}: {title} of {finished}")]
    if spec.device is not None:
        run = best[0]["directory"]
        out.append(f"to export the best: specrl export --run {run}")
        out.append("the best of many trials looks better than it is; to measure it again, on prompts in another order:")
        out.append(f"  specrl bench --draft {run}/draft --seed 1")
    else:
        out.append("the best settings: " + ", ".join(f"{name} {best[0][name]}" for name in spec.search))
    out.append(f"written: {directory} (plots, trials.csv, values.csv, study.json)")
    out.append(f"to see more: pip install optuna-dashboard; optuna-dashboard {url}")
    return out


def mean_by_value(spec: Study, complete: Sequence[Trial]) -> list[dict[str, object]]:
    """Mean and 95 % interval over trials of each objective, for each value of the parameters with few values."""
    out: list[dict[str, object]] = []
    for name, distribution in spec.distributions.items():
        for value in list_values(distribution):
            chosen = [trial.values for trial in complete if trial.params.get(name) == value]
            for index, objective in enumerate(spec.objectives):
                sample = [values[index] for values in chosen]
                row = {"parameter": name, "value": value, "trials": len(sample), "objective": objective}
                mean = mean_interval(sample, rng=np.random.default_rng(0)) if len(sample) > 1 else None
                row |= {"mean": float(np.mean(sample)) if sample else None}
                out.append({**row, "low": mean and mean.low, "high": mean and mean.high})
    return out


def _best(study: optuna.Study, spec: Study, complete: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front, or the trials within the constraints, best first."""
    if len(spec.objectives) > 1:
        return study.best_trials
    feasible = [trial for trial in complete if all(excess <= 0.0 for excess in trial.constraints.values())]
    return sorted(feasible, key=lambda trial: trial.values[0], reverse=spec.directions[0] == "maximize")


def _row(spec: Study, trial: Trial) -> dict[str, Any]:
    import optuna

    row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower()}
    if trial.values is not None and row["state"] == "complete":
        row.update(zip(spec.objectives, trial.values, strict=True))
    for name, (_, low, high) in trial.user_attrs.get("intervals", {}).items():
        if name in spec.objectives:
            row |= {f"{name}_low": low, f"{name}_high": high}
    row |= {f"measured {k}": v for k, v in trial.user_attrs.get("values", {}).items() if k not in spec.objectives}
    row |= {f"above {name}": excess for name, excess in trial.constraints.items()}
    row |= {name: trial.params.get(name) for name in spec.search}
    row["seconds"] = None if trial.duration is None else trial.duration.total_seconds()
    row["retry_of"] = optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return {**row, "directory": trial.user_attrs.get("directory")}


def _targets(spec: Study) -> dict[str, Callable[[Trial], float] | None]:
    """Return for each of several objectives the function that reads it from a trial; None for a single objective."""

    def target(index: int, trial: Trial) -> float:
        return float(trial.values[index])

    several = len(spec.objectives) > 1
    return {name: partial(target, index) if several else None for index, name in enumerate(spec.objectives)}


def _importance(study: optuna.Study, target: Callable[[Trial], float] | None) -> dict[str, float]:
    """Share of each parameter (PED-ANOVA; Watanabe et al., 2023, arXiv 2304.10255); {} if there are too few trials."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return optuna.importance.get_param_importances(study, target=target)
        except (ValueError, RuntimeError):
            return {}


def _plot(study: optuna.Study, spec: Study, directory: Path) -> None:
    import optuna.visualization.matplotlib as plots

    by_objective: dict[str, Callable[..., object]] = {
        "history": plots.plot_optimization_history,
        "slice": plots.plot_slice,
    }
    if len(spec.search) > 1:
        by_objective["importance"] = plots.plot_param_importances
    for name, target in _targets(spec).items():
        for kind, plot in by_objective.items():
            path = directory / (f"{kind}.png" if target is None else f"{kind}-{name}.png")
            save_plot(partial(plot, study, target=target, target_name=name), path)
    if len(spec.objectives) == 1:
        save_plot(partial(plots.plot_intermediate_values, study), directory / "blocks.png")
    elif len(spec.objectives) <= 3:
        names = list(spec.objectives)
        save_plot(partial(plots.plot_pareto_front, study, target_names=names), directory / "pareto.png")
