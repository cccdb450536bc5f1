"""The acceptance model of simulated requests. NumPy only.

Each request has an effect a ~ N(0, s²) on the log-odds of all its drafts. Draft k is accepted, given that the first
k - 1 were, with probability σ(b_k + a), where σ is the logistic function. This is a logit-normal distribution (Atchison
and Shen, Biometrika 67(2), 1980). So P_k(a) = Π_{j≤k} σ(b_j + a) and τ(a) = 1 + Σ_k P_k(a).

A request of n tokens takes n / τ(a) rounds. Over rounds the effect therefore has density φ(a/s) / τ(a): requests with
low acceptance are in more rounds. The mean accept length over rounds is E[τ] = 1 / E_a[1 / τ(a)] (renewal-reward
theorem).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NODES = 41


def request_effects(spread: float) -> tuple[Floats, Floats]:
    """Nodes and weights of N(0, spread²) by Gauss-Hermite quadrature: [41] and [41] float64, the weights sum to 1."""
    nodes, weights = _standard_normal()
    return nodes * spread, weights


@cache
def _standard_normal() -> tuple[Floats, Floats]:
    nodes, raw = np.polynomial.hermite_e.hermegauss(_NODES)
    weights: Floats = raw / raw.sum()
    nodes.flags.writeable = weights.flags.writeable = False
    return nodes, weights


def survival(log_odds: Sequence[float] | Floats, effect: float | Floats) -> Floats:
    """P_k(a) for k = 1 .. K: [..., K] float64 for request effects [...]."""
    odds = np.asarray(log_odds, dtype=np.float64) + np.asarray(effect, dtype=np.float64)[..., None]
    reached: Floats = np.cumprod(1.0 / (1.0 + np.exp(-odds)), axis=-1, dtype=np.float64)
    return reached


def round_survival(log_odds: Sequence[float] | Floats, spread: float) -> Floats:
    """P_k over rounds of K steps, averaged over all requests: [K] float64."""
    effects, weights = request_effects(spread)
    by_effect = survival(log_odds, effects)  # [41, K]
    in_rounds = weights / (1.0 + by_effect.sum(-1))
    shares: Floats = (in_rounds[:, None] * by_effect).sum(0) / in_rounds.sum()
    return shares


def accept_length(log_odds: Sequence[float] | Floats, spread: float, drift: float = 0.0) -> float:
    """E[τ] over rounds: 1 / E_a[1 / τ(a)], averaged over an effect ~ N(0, drift²) that all requests share."""
    effects, weights = request_effects(spread)
    shared, chances = request_effects(drift) if drift else (np.zeros(1), np.ones(1))
    lengths = 1.0 + survival(log_odds, effects + shared[:, None]).sum(-1)  # [shared, 41]
    return float(chances @ (1.0 / (weights / lengths).sum(-1)))


def spread_of_length(log_odds: Sequence[float] | Floats, spread: float) -> float:
    """Standard deviation over requests of log τ(a)."""
    effects, weights = request_effects(spread)
    return _deviation(np.log1p(survival(log_odds, effects).sum(-1)), weights)


def spread_of_rate(log_odds: float, spread: float) -> float:
    """Standard deviation over requests of σ(b + a)."""
    effects, weights = request_effects(spread)
    return _deviation(survival([log_odds], effects)[:, 0], weights)


def _deviation(values: Floats, weights: Floats) -> float:
    return float(np.sqrt(weights @ (values - weights @ values) ** 2))


def solve(increasing: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Solve increasing(x) = value in [low, high] by bisection; return the nearer end if there is no solution."""
    for _ in range(44):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if increasing(middle) < value else (low, middle)
    return 0.5 * (low + high)
