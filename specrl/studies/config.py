"""A study's file: what is asked, of which trials, within which space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specrl.core.plan import parse_plans
from specrl.io.options import did_you_mean
from specrl.studies.space import FUNCTIONS, Dimension, check_space, resolve

if TYPE_CHECKING:
    import optuna

STUDIES = Path(__file__).parent
OBJECTIVES: dict[str, dict[str, Literal["maximize", "minimize"]]] = {
    "train": {
        "speedup": "maximize",
        "accept_length": "maximize",
        "requests_to_accept_length": "minimize",
        "seconds_to_speedup": "minimize",
        "learner_seconds": "minimize",
        "peak_memory_mib": "minimize",
        "pause_ms": "minimize",
    },
    "simulated": {"share": "maximize", "end": "maximize", "speedup": "maximize", "regret": "minimize"},
}
BY_BLOCK = ("speedup", "accept_length", "share", "end", "regret")  # objectives that are known block by block
LEVELS = {"accept_length": "requests_to_accept_length", "speedup": "seconds_to_speedup"}  # level: who waits for it


@dataclass(frozen=True)
class Budget:
    """What a trial may use.

    Args:
        requests: that a live trial serves and learns from.
        batch_sizes: at which it is then measured against plain decoding, on held-out prompts.
        blocks: paired blocks measured at each of them.
        plan: that is measured; None: the one chosen for each batch size while it served.
        rounds: of a simulated play.
        seeds: plays of a simulated trial on each profile, the same luck in every trial.
    """

    requests: int = 400
    batch_sizes: tuple[int, ...] = (1, 4)
    blocks: int = 12
    plan: str | None = None
    rounds: int = 1200
    seeds: int = 6

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_sizes", tuple(self.batch_sizes))
        if min(self.requests, self.rounds, *self.batch_sizes) < 1 or min(self.blocks, self.seeds) < 2:
            raise ValueError(
                "budget must have requests, rounds and batch_sizes of at least 1, blocks and seeds of at least 2, but "
                f"got {asdict(self)}"
            )
        if self.plan is not None:
            parse_plans(self.plan)


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Args:
        name: of the study.
        about: the question, in a line.
        trial: 'train' (online training and a paired measurement) or 'simulated' (a chooser on profiles).
        objectives: by name; several make a Pareto front.
        search: searched parameters by name.
        fixed: parameters that are the same in every trial.
        levels: what `requests_to_accept_length` and `seconds_to_speedup` wait for.
        budget: of a trial.
        constraints: greatest `peak_memory_mib` and `pause_ms`.
        pruner: Optuna's WilcoxonPruner's arguments; None: no trial is cut short.
        sampler: 'tpe', 'random' or 'grid'.
        seed: of the sampler.
        trials: finished ones (completed or pruned) that the study ends with.
    """

    name: str
    about: str
    trial: Literal["train", "simulated"]
    objectives: tuple[str, ...]
    search: Mapping[str, Dimension]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    constraints: Mapping[str, float] = field(default_factory=dict)
    pruner: Mapping[str, Any] | None = None
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: int = 0
    trials: int = 30

    @property
    def timed(self) -> bool:
        """Whether its trials read the clock, so that nothing else may run on their device."""
        return self.trial == "train"

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Of the objectives."""
        return [OBJECTIVES[self.trial][name] for name in self.objectives]

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The search space as Optuna has it."""
        return {name: dimension.distribution() for name, dimension in self.search.items()}

    def options(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The function's arguments in a trial of these parameters, and the same as YAML for --config.

        Raises:
            ValueError: they do not fit.
        """
        return resolve(self.trial, {**self.fixed, **params})


def find_study(name: str | Path) -> Path:
    """The file of a ready study, or a path as it is.

    Raises:
        ValueError: neither.
    """
    ready = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    if str(name) in ready:
        return ready[str(name)]
    if not Path(name).is_file():
        meant = did_you_mean(str(name), list(ready))
        raise ValueError(f"a study must be a YAML file or one of {', '.join(ready)}, but got {str(name)!r}{meant}")
    return Path(name)


def read_study(name: str | Path) -> Study:
    """Read and check a study's file, or a ready study by name.

    Raises:
        ValueError: it is no such file, or something in it fits neither the study nor the command it runs.
    """
    import yaml  # type: ignore[import-untyped]

    path = find_study(name)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} must be YAML, but {' '.join(str(error).split())}") from error
    try:
        return make_study(found, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_study(found: object, name: str) -> Study:
    """A study from what its file holds (`read_study`)."""
    known = [f.name for f in fields(Study)]
    if not isinstance(found, dict) or not {"trial", "objectives", "search"} <= set(found):
        raise ValueError(f"a study must say trial, objectives and search, but got {found!r}")
    for key in found:
        if key not in known:
            raise ValueError(f"a study must hold {', '.join(known)} only, but got {key!r}{did_you_mean(key, known)}")
    for key in ("search", "fixed", "levels", "budget", "constraints"):
        if not isinstance(found.get(key, {}), dict):
            raise ValueError(f"{key} must be a mapping, but got {found[key]!r}")
    search = {key: Dimension.read(key, value) for key, value in found["search"].items()}
    budget = _budget(found.get("budget", {}))
    objectives = found["objectives"]
    objectives = (objectives,) if isinstance(objectives, str) else tuple(objectives or ())
    study = Study(**{"name": name, "about": "", **found, "search": search, "budget": budget, "objectives": objectives})
    _check(study)
    return study


def _check(study: Study) -> None:
    if study.trial not in FUNCTIONS:
        raise ValueError(f"trial must be one of {', '.join(FUNCTIONS)}, but got {study.trial!r}")
    known = OBJECTIVES[study.trial]
    for name in study.objectives or ("",):
        if name not in known:
            meant = did_you_mean(name, list(known))
            raise ValueError(f"objectives of {study.trial!r} must be of {', '.join(known)}, but got {name!r}{meant}")
    for level, name in LEVELS.items():
        if (name in study.objectives) != (level in study.levels):
            raise ValueError(f"objective {name} and levels.{level} go together, but got {dict(study.levels)!r}")
    for level, least in dict[str, Any](study.levels).items():
        if level not in LEVELS or not isinstance(least, (int, float)) or not least > 0:
            raise ValueError(f"levels must be {' or '.join(LEVELS)}, above 0, but got {level}: {least!r}")
    for name, most in study.constraints.items():
        if name not in ("peak_memory_mib", "pause_ms") or study.trial != "train" or not most > 0:
            raise ValueError(
                f"constraints must be peak_memory_mib or pause_ms of live trials, above 0, but got {name}: {most}"
            )
    if study.pruner is not None and (len(study.objectives) > 1 or study.objectives[0] not in BY_BLOCK):
        raise ValueError(
            f"a pruner needs one objective, of {', '.join(BY_BLOCK)}, but got {', '.join(study.objectives)}; "
            "write 'pruner: null'"
        )
    if study.trials < 1 or study.sampler not in ("tpe", "random", "grid"):
        raise ValueError(
            f"sampler must be tpe, random or grid and trials at least 1, but got {study.sampler!r} and {study.trials}"
        )
    if not study.search:
        raise ValueError("search must name at least one parameter, but got none")
    if study.sampler == "grid":
        grid = {name: dimension.points() for name, dimension in study.search.items()}
        if endless := [name for name, points in grid.items() if points is None]:
            raise ValueError(f"a grid needs categorical, plans or int, but got another kind for {', '.join(endless)}")
        size = prod(len(points or ()) for points in grid.values())
        if study.trials > size:
            raise ValueError(f"trials must be at most the {size} points of the grid, but got {study.trials}")
    if {"accept_length"} & set(study.levels) and not str(study.fixed.get("chooser", ""))[:1].isdigit():
        raise ValueError("levels.accept_length needs one plan, fixed.chooser, but got none; for example chooser: 4/1/5")
    check_space(study.trial, study.fixed, study.search)


def _budget(given: Mapping[str, Any]) -> Budget:
    known = [f.name for f in fields(Budget)]
    for key in given:
        if key not in known:
            raise ValueError(f"budget must hold {', '.join(known)} only, but got {key!r}{did_you_mean(key, known)}")
    try:
        return Budget(**given)
    except TypeError as error:
        raise ValueError(f"budget must hold numbers, but got {dict(given)!r}") from error
