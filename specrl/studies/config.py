"""The YAML file of a study: its trials, objectives, search space and budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specrl.core.checks import require, require_known
from specrl.core.plan import parse_plans
from specrl.io.options import Options
from specrl.io.output import to_json
from specrl.io.read import read_mapping
from specrl.studies.goals import BY_BLOCK, LEVELS, Budget
from specrl.studies.live import LiveTrial
from specrl.studies.simulated import SimulatedTrial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

STUDIES = Path(__file__).parent
_options = cache(Options)


@dataclass(frozen=True)
class Study:
    """A study, as its file describes it.

    Args:
        trial: 'train' (online training and a paired measurement) or 'simulated' (a chooser on profiles).
        objectives: by name; several make a Pareto front.
        search: searched parameters by name, each as `read_distribution` reads it.
        name: of the study.
        about: the question, in a line.
        fixed: parameters that are the same in every trial.
        levels: that `requests_to_accept_length` and `seconds_to_speedup` wait for.
        budget: of a trial.
        constraints: greatest `peak_memory_mib` and `pause_ms`.
        pruner: arguments of Optuna's WilcoxonPruner; null: no pruning.
        sampler: 'tpe', 'random' or 'grid'.
        seed: of the sampler.
        trials: completed or pruned ones that the study ends with.

    Raises:
        ValueError: a setting that fits neither the study nor the command that its trials run.
    """

    trial: Literal["train", "simulated"]
    objectives: tuple[str, ...]
    search: dict[str, Any]
    name: str = ""
    about: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    budget: Budget = Budget()
    constraints: dict[str, float] = field(default_factory=dict)
    pruner: dict[str, Any] | None = None
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: int = 0
    trials: int = 30

    def __post_init__(self) -> None:
        require(self.trials >= 1, "trials", "at least 1", self.trials)
        require(bool(self.search), "search", "one or more parameters", self.search)
        _check_objectives(self)
        prunable = len(self.objectives) == 1 and self.objectives[0] in BY_BLOCK
        rule = f"one of {', '.join(BY_BLOCK)} with a pruner ('pruner: null' for others)"
        require(self.pruner is None or prunable, "objectives", rule, self.objectives)
        if self.sampler == "grid":
            for name, values in self.grid().items():
                require(
                    bool(values), f"search.{name}", "categorical, plans or int with sampler 'grid'", self.search[name]
                )
            size = prod(map(len, self.grid().values()))
            require(self.trials <= size, "trials", f"at most the {size} points of the grid", self.trials)
        _check_parameters(self)

    @property
    def kind(self) -> type[LiveTrial] | type[SimulatedTrial]:
        """The class of its trials; its fields are the parameters that a study may search or fix."""
        return LiveTrial if self.trial == "train" else SimulatedTrial

    @property
    def device(self) -> str | None:
        """The device that its trials are timed on; None: they read no clock, and many may run at once."""
        return self.make_trial({})[0].device

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """The directions of the objectives."""
        return [self.kind.OBJECTIVES[name] for name in self.objectives]

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The search space."""
        return {name: read_distribution(name, form) for name, form in self.search.items()}

    def grid(self) -> dict[str, list[Any]]:
        """Return every value of each searched parameter; [] for a parameter with too many values."""
        return {name: list_values(distribution) for name, distribution in self.distributions.items()}

    def make_trial(self, params: Mapping[str, Any]) -> tuple[LiveTrial | SimulatedTrial, str]:
        """Return the trial with these parameters, and all its settings as YAML for --config.

        Raises:
            ValueError: they do not fit.
        """
        live = self.trial == "train"
        requests = {"serving.requests": self.budget.requests} if live else {}
        options = _options("specrl train" if live else "specrl study", self.kind)  # type: ignore[arg-type]
        parsed = options.resolve({**requests, **self.fixed, **params})
        return self.kind(**parsed.arguments), parsed.yaml

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of its file, as JSON has them."""
        settings: dict[str, Any] = json.loads(to_json(asdict(self)))
        return settings


def read_distribution(name: str, form: Any) -> BaseDistribution:
    """Read '{float: [0.001, 0.01], log: true}', '{int: [1, 6]}', '{categorical: [a, b]}' or '{plans: 1/1/2,3/1/4}'.

    Raises:
        ValueError: another form, or bounds that Optuna refuses.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        match form:
            case {"plans": str(plans)} if len(form) == 1:
                return CategoricalDistribution([str(plan) for plan in parse_plans(plans)])
            case {"categorical": [*choices]} if choices and len(form) == 1:
                return CategoricalDistribution(choices)
            case {"int": [int(low), int(high)]} if set(form) <= {"int", "log", "step"}:
                return IntDistribution(low, high, form.get("log", False), form.get("step", 1))
            case {"float": [low, high]} if set(form) <= {"float", "log", "step"}:
                return FloatDistribution(float(low), float(high), form.get("log", False), form.get("step"))
        raise ValueError(
            "must be float or int with [low, high] and perhaps log or step, categorical with a list, or plans, "
            f"but got {form!r}; for example {{float: [0.001, 0.01], log: true}}"
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"search.{name}: {error}") from error


def attributes(distribution: BaseDistribution) -> dict[str, Any]:
    """Return the choices of a categorical distribution; low, high, log and step of another one."""
    from optuna.distributions import distribution_to_json

    attributes: dict[str, Any] = json.loads(distribution_to_json(distribution))["attributes"]
    return attributes


def list_values(distribution: BaseDistribution) -> list[Any]:
    """Return every value of a categorical distribution or of integers; [] for other distributions."""
    limits = attributes(distribution)
    if type(limits.get("low")) is int and not limits["log"]:
        return list(range(limits["low"], limits["high"] + 1, limits["step"]))
    return list(limits.get("choices", []))


def read_study(name: str | Path) -> Study:
    """Read a study's file, or a ready-made study by name.

    Raises:
        ValueError: no such file, or something in it does not fit.
    """
    ready = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    path = ready.get(str(name), Path(name))
    if not path.is_file():
        require_known("a study", name, ready, " or a YAML file")
    try:
        return make_study(read_mapping(path), path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_study(settings: Mapping[str, Any], name: str) -> Study:
    """Make a study from the contents of its file; it has the name `name` if the file has none.

    Raises:
        ValueError: something in it does not fit.
    """
    return Study(**_options("specrl study", Study).resolve({"name": name, **settings}).arguments)


def _check_objectives(study: Study) -> None:
    known = study.kind.OBJECTIVES
    for name in study.objectives or ("",):
        require_known(f"objectives of {study.trial!r}", name, known)
    for level, name in LEVELS.items():
        if (name in study.objectives) != (level in study.levels):
            raise ValueError(f"objective {name} and levels.{level} go together, but got {study.levels}")
    levels, limits = study.levels, study.constraints
    fits = set(levels) <= set(LEVELS) and all(level > 0 for level in levels.values())
    require(fits, "levels", f"{' or '.join(LEVELS)}, above 0", levels)
    if "accept_length" in levels and not str(study.fixed.get("serving.chooser", ""))[:1].isdigit():
        raise ValueError("levels.accept_length needs a fixed plan, but got none; for example serving.chooser: 4/1/5")
    fits = set(limits) <= {"peak_memory_mib", "pause_ms"} & set(known) and all(limit > 0 for limit in limits.values())
    require(fits, "constraints", "peak_memory_mib or pause_ms of live trials, above 0", limits)


def _check_parameters(study: Study) -> None:
    """Check the names and values of fixed parameters, and the choices or bounds of searched ones."""
    if both := sorted(set(study.fixed) & set(study.search)):
        raise ValueError(f"a parameter is searched or fixed, but {both[0]!r} is both; take it out of one")
    study.make_trial({})
    for name, distribution in study.distributions.items():
        limits = attributes(distribution)
        for value in limits["choices"] if "choices" in limits else (limits["low"], limits["high"]):
            try:
                study.make_trial({name: value})
            except ValueError as error:
                raise ValueError(f"search.{name}: {error}") from error
