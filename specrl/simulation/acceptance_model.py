"""How far a simulated request's drafts survive: log-odds by position, moved by the request's skill. NumPy only.

Draft k of a request of skill a is accepted, given that the first k - 1 were, with probability σ(b_k + a), where σ is
the logistic function and a ~ N(0, s²) over requests: the logit-normal distribution (Atchison and Shen, Biometrika
67(2), 1980). So P_k(a) = Π_{j≤k} σ(b_j + a) and τ(a) = 1 + Σ_k P_k(a).

A request of n tokens is in n / τ(a) rounds: rounds see the skill a with density φ(a/s) / τ(a), so more of the
unskilled, and the accept length that an engine reports, tokens over rounds, is E[τ] = 1 / E_a[1 / τ(a)] (the
renewal-reward theorem).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NODES = 41


def skills(spread: float) -> tuple[Floats, Floats]:
    """Nodes and weights of N(0, spread²) by Gauss-Hermite quadrature: [41] and [41] float64, the weights sum to 1."""
    nodes, weights = _standard()
    return nodes * spread, weights


@cache
def _standard() -> tuple[Floats, Floats]:
    nodes, raw = np.polynomial.hermite_e.hermegauss(_NODES)
    weights: Floats = raw / raw.sum()
    nodes.flags.writeable = weights.flags.writeable = False
    return nodes, weights


def survival(log_odds: Sequence[float] | Floats, skill: float | Floats) -> Floats:
    """P_k(a) for k = 1 .. K: [..., K] float64 of skills [...]."""
    odds = np.asarray(log_odds, dtype=np.float64) + np.asarray(skill, dtype=np.float64)[..., None]
    reached: Floats = np.cumprod(1.0 / (1.0 + np.exp(-odds)), axis=-1, dtype=np.float64)
    return reached


def round_survival(log_odds: Sequence[float] | Floats, spread: float) -> Floats:
    """P_k as rounds of this many steps see it, over requests of all skills: [K] float64."""
    nodes, weights = skills(spread)
    by_skill = survival(log_odds, nodes)  # [41, K]
    seen = weights / (1.0 + by_skill.sum(-1))
    shares: Floats = (seen[:, None] * by_skill).sum(0) / seen.sum()
    return shares


def accept_length(log_odds: Sequence[float] | Floats, spread: float, drift: float = 0.0) -> float:
    """E[τ] over rounds: 1 / E_a[1 / τ(a)], and its mean over a drift ~ N(0, drift²) common to all requests."""
    nodes, weights = skills(spread)
    moved, chances = skills(drift) if drift else (np.zeros(1), np.ones(1))
    lengths = 1.0 + survival(log_odds, nodes + moved[:, None]).sum(-1)  # [moved, 41]
    return float(chances @ (1.0 / (weights / lengths).sum(-1)))


def spread_of_length(log_odds: Sequence[float] | Floats, spread: float) -> float:
    """Standard deviation over requests of log τ(a)."""
    nodes, weights = skills(spread)
    logs = np.log1p(survival(log_odds, nodes).sum(-1))
    return float(np.sqrt(weights @ (logs - weights @ logs) ** 2))


def spread_of_rate(log_odds: float, spread: float) -> float:
    """Standard deviation over requests of σ(b + a)."""
    nodes, weights = skills(spread)
    rates = survival([log_odds], nodes)[:, 0]
    return float(np.sqrt(weights @ (rates - weights @ rates) ** 2))


def solve(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a rising function takes `value`, by bisection; the nearer end where it does not."""
    for _ in range(44):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return 0.5 * (low + high)
