"""What a study found: its best trials with intervals, what mattered, and plots of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType

from specrl.core.statistics import mean_interval
from specrl.io.output import OutputDir, environment, table
from specrl.studies.config import Study

if TYPE_CHECKING:
    import optuna

    Trial = optuna.trial.FrozenTrial

SHOWN = 5  # best trials in the table


def write_report(study: optuna.Study, spec: Study, out: OutputDir) -> dict[str, Any]:
    """Write trials.csv, values.csv, importance.csv, study.json and the plots; what study.json holds is returned."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = _best(study, spec, complete)
    states = [trial.state.name.lower() for trial in trials]
    importance = {name: _importance(study, spec, index) for index, name in enumerate(spec.objectives)}
    found = {
        "study": spec.name,
        "objectives": dict(zip(spec.objectives, spec.directions, strict=True)),
        "trials": {state: states.count(state) for state in dict.fromkeys(states)},
        "best": [_row(spec, trial) for trial in best],
        "importance": importance,
        "environment": environment(),
    }
    out.write_csv("trials.csv", [_row(spec, trial) for trial in trials])
    out.write_csv("values.csv", by_value(spec, complete))
    out.write_csv(
        "importance.csv",
        [
            {"objective": o, "parameter": p, "importance": x}
            for o, shares in importance.items()
            for p, x in shares.items()
        ],
    )
    out.write_json("study.json", found)
    _plots(study, spec, complete, out.path)
    return found


def summary(found: Mapping[str, Any], spec: Study, url: str, directory: Path) -> list[RenderableType]:
    """The best trials for people, how to export the best one, and where to see more."""
    best: Sequence[Mapping[str, Any]] = found["best"]
    finished = ", ".join(f"{count} {state}" for state, count in found["trials"].items())
    if not best:
        why = " within the constraints" if spec.constraints else ""
        return [f"no trial was completed{why} ({finished}); see {directory / 'trials.csv'}"]
    rows = []
    for trial in best[:SHOWN]:
        shown = {"trial": trial["trial"]}
        for name in spec.objectives:
            shown[f"{name} [95 %]" if f"{name}_low" in trial else name] = _interval(trial, name)
        rows.append({**shown, **{name: trial[name] for name in spec.search}})
    title = "Pareto front" if len(spec.objectives) > 1 else "best trials"
    out: list[RenderableType] = [table(rows, title=f"{spec.name}: {title} of {finished}")]
    place = best[0]["directory"]
    if spec.trial == "train":
        out.append(f"to export the best: specrl export --run {place}")
        out.append("the best of many looks better than it is; to measure it again, on prompts in another order:")
        out.append(f"  specrl bench --draft {place}/draft --seed 1")
    else:
        out.append("the best settings: " + ", ".join(f"{name} {best[0][name]}" for name in spec.search))
    out.append(f"written: {directory} (plots, trials.csv, values.csv, importance.csv, study.json)")
    out.append(f"to see more: pip install optuna-dashboard; optuna-dashboard {url}")
    return out


def by_value(spec: Study, complete: Sequence[Trial]) -> list[dict[str, object]]:
    """Mean of each objective by value of each parameter that has few, with a 95 % interval over trials."""
    out: list[dict[str, object]] = []
    for name, dimension in spec.search.items():
        for value in dimension.points() or ():
            chosen = [trial.values for trial in complete if trial.params.get(name) == value]
            for index, objective in enumerate(spec.objectives):
                sample = [values[index] for values in chosen]
                mean = mean_interval(sample, rng=np.random.default_rng(0)) if len(sample) > 1 else None
                out.append(
                    {
                        "parameter": name,
                        "value": value,
                        "trials": len(sample),
                        "objective": objective,
                        "mean": float(np.mean(sample)) if sample else None,
                        "low": None if mean is None else mean.low,
                        "high": None if mean is None else mean.high,
                    }
                )
    return out


def _best(study: optuna.Study, spec: Study, complete: Sequence[Trial]) -> list[Trial]:
    """The Pareto front, or the complete trials within the constraints from the best one on."""
    if len(spec.objectives) > 1:
        return list(study.best_trials)
    able = [trial for trial in complete if all(excess <= 0.0 for excess in trial.constraints.values())]
    return sorted(able, key=lambda trial: trial.values[0], reverse=spec.directions[0] == "maximize")


def _row(spec: Study, trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower()}
    if trial.values is not None and row["state"] == "complete":
        row.update(zip(spec.objectives, trial.values, strict=True))
    for name, (_, low, high) in trial.user_attrs.get("intervals", {}).items():
        if name in spec.objectives:
            row.update({f"{name}_low": low, f"{name}_high": high})
    row.update({f"measured {k}": v for k, v in trial.user_attrs.get("values", {}).items() if k not in spec.objectives})
    row.update({f"above {name}": excess for name, excess in trial.constraints.items()})
    row.update({name: trial.params.get(name) for name in spec.search})
    seconds = None if trial.duration is None else trial.duration.total_seconds()
    retry, place = trial.user_attrs.get("retry_of"), trial.user_attrs.get("directory")
    return {**row, "seconds": seconds, "retry_of": retry, "directory": place}


def _interval(trial: Mapping[str, Any], name: str) -> str:
    low, high = trial.get(f"{name}_low"), trial.get(f"{name}_high")
    return f"{trial[name]:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")


def _importance(study: optuna.Study, spec: Study, index: int) -> dict[str, float]:
    """Share of each parameter (PED-ANOVA; Watanabe et al., 2023, arXiv 2304.10255); {} of too few trials."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target = _value(index) if len(spec.objectives) > 1 else None
            return optuna.importance.get_param_importances(study, target=target)
        except (ValueError, RuntimeError):
            return {}


def _value(index: int) -> Callable[[Trial], float]:
    return lambda trial: float(trial.values[index])


def _plots(study: optuna.Study, spec: Study, complete: Sequence[Trial], directory: Path) -> None:
    """PNGs by Optuna's own matplotlib plots, of what there is enough of."""
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as plots

    if len(complete) < 2:
        return
    plt.switch_backend("agg")
    several = len(spec.objectives) > 1

    def save(name: str, draw: Callable[[], Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's notes on what is experimental and on single values
            try:
                drawn = draw()
            except (ValueError, RuntimeError):  # too little for this plot
                return
            figure = np.ravel(drawn)[0].figure
            figure.set_size_inches(max(7.0, 3.2 * np.size(drawn)), 4.2)
            figure.savefig(directory / f"{name}.png", dpi=130, bbox_inches="tight")
            plt.close("all")

    for index, name in enumerate(spec.objectives):
        end = f"-{name}" if several else ""
        given: dict[str, Any] = {"target": _value(index) if several else None, "target_name": name}
        save(f"history{end}", partial(plots.plot_optimization_history, study, **given))
        save(f"slice{end}", partial(plots.plot_slice, study, **given))
        if len(spec.search) > 1:
            save(f"importance{end}", partial(plots.plot_param_importances, study, **given))
    if several:
        names = list(spec.objectives)
        if len(names) <= 3:
            save("pareto", lambda: plots.plot_pareto_front(study, target_names=names))
    else:
        save("blocks", lambda: plots.plot_intermediate_values(study))
