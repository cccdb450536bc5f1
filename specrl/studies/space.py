"""A study's search space: parameters of a command within bounds, checked against the command's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from specrl.core.plan import parse_plans
from specrl.io.options import build_parser, did_you_mean, explain

if TYPE_CHECKING:
    import optuna
    from jsonargparse import ArgumentParser

# What a trial runs; the function's parameters are those that a study may name.
FUNCTIONS = {"train": "specrl.commands.train:train", "simulated": "specrl.studies.simulated:simulated"}
_OURS = {"config", "help", "output_dir", "resume", "traces", "epochs", "requests", "checkpoint_every"} | {
    "checkpoint_replay", "tensorboard", "wandb",
}  # fmt: skip  # parameters that are not a study's to set
_KINDS: tuple[Literal["float", "int", "categorical", "plans"], ...] = ("float", "int", "categorical", "plans")


@dataclass(frozen=True)
class Dimension:
    """One searched parameter.

    Args:
        kind: 'float' or 'int' within [low, high], 'categorical' or 'plans' one of `choices`.
        low: least value.
        high: greatest value.
        log: whether it is drawn evenly in the logarithm.
        step: between two values; None: any (1 for integers).
        choices: text, numbers, truth values or null.
    """

    kind: Literal["float", "int", "categorical", "plans"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()

    @classmethod
    def read(cls, name: str, given: Any) -> Dimension:
        """Read '{float: [0.001, 0.01], log: true}', '{categorical: [a, b]}' or '{plans: 1/1/2,3/1/4}'.

        Raises:
            ValueError: another form, or bounds the wrong way round.
        """
        given = dict(given) if isinstance(given, Mapping) else {"": given}
        kinds = [kind for kind in _KINDS if kind in given]
        if len(kinds) != 1 or set(given) - {*kinds, "log", "step"}:
            raise ValueError(
                f"search.{name} must be one of float, int, categorical and plans, with log or step beside numbers, "
                f"but got {given!r}; for example {{float: [0.001, 0.01], log: true}}"
            )
        kind, value = kinds[0], given[kinds[0]]
        if kind == "plans":
            return cls("plans", choices=tuple(str(plan) for plan in parse_plans(str(value))))
        if not isinstance(value, list) or (kind == "categorical" and not value):
            raise ValueError(f"search.{name}.{kind} must be a list, but got {value!r}; for example {kind}: [1, 4]")
        if kind == "categorical":
            return cls("categorical", choices=tuple(value))
        try:
            low, high = (float(bound) for bound in value)
            step = None if given.get("step") is None else float(given["step"])
        except (TypeError, ValueError):
            raise ValueError(f"search.{name}.{kind} must be [low, high], two numbers, but got {value!r}") from None
        log = bool(given.get("log", False))
        if not low < high or (log and (low <= 0.0 or step is not None)):
            raise ValueError(
                f"search.{name} must have low < high, and with log low above 0 and no step, but got {given!r}"
            )
        if kind == "int" and any(number is not None and number % 1 for number in (low, high, step)):
            raise ValueError(f"search.{name}.int must be whole numbers, but got {given!r}; write float for others")
        return cls("int" if kind == "int" else "float", low, high, log, step)

    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all: the choices, or the bounds (and what is between them, where it may be had)."""
        if self.choices:
            return self.choices
        if self.kind == "int":
            return int(self.low), int(self.high)
        return self.low, self.low + 0.37 * (self.high - self.low), self.high

    def points(self) -> tuple[Any, ...] | None:
        """Every value, for a grid; None: there are too many."""
        if self.kind == "int" and not self.log:
            return tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        return self.choices or None

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same as Optuna has it."""
        import optuna

        if self.choices:
            return optuna.distributions.CategoricalDistribution(self.choices)
        if self.kind == "int":
            return optuna.distributions.IntDistribution(
                int(self.low), int(self.high), log=self.log, step=int(self.step or 1)
            )
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log, step=self.step)


def check_space(trial: str, fixed: Mapping[str, Any], search: Mapping[str, Dimension]) -> None:
    """Whether every name and value is one that the trial's function takes.

    Raises:
        ValueError: it is not.
    """
    parser = _parser(trial)
    names = [action.dest for action in parser._actions if action.dest not in _OURS]
    for where, keys in (("fixed", fixed), ("search", search)):
        for name in keys:
            if name not in names:
                meant = did_you_mean(name, names) or "; see 'specrl train --help'"
                raise ValueError(f"{where} must name parameters of {trial!r}, but got {name!r}{meant}")
            if where == "search" and name in fixed:
                raise ValueError(f"a parameter is searched or fixed, but {name!r} is both; take it out of one")
    _resolve(parser, fixed)
    for name, dimension in search.items():
        for value in dimension.extremes():
            try:
                _resolve(parser, {**fixed, name: value})
            except ValueError as error:
                raise ValueError(f"search.{name}: {error}") from error


def resolve(trial: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments of the trial's function, defaults filled in, and the same as YAML for --config.

    Raises:
        ValueError: the values do not fit.
    """
    return _resolve(_parser(trial), values)


def _parser(trial: str) -> ArgumentParser:
    module, _, name = FUNCTIONS[trial].partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return build_parser(f"specrl {trial}", function)


def _resolve(parser: ArgumentParser, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    from jsonargparse import ArgumentError

    nested: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        at = nested
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    try:
        config = parser.parse_object(nested)
    except ArgumentError as error:
        raise ValueError(explain(str(error), parser).replace("--", "")) from error
    config.pop("config", None)
    return parser.instantiate(config).as_dict(), parser.dump(config, skip_unset=False)
