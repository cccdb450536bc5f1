"""Thousands of simulated sessions at once: the rounds of `specrl.simulation.engine`, drawn for all of them in NumPy.

Skills are on a grid of log-odds (a quarter of their standard deviation apart, rounded at random so that the mean is
kept), and a draw of 10 bits per request decides how many of its drafts are accepted: one look-up per request and round.
The word in the table packs the tokens and, for each k, whether k or more drafts were accepted, in bit fields wide
enough to be summed over a batch, so that one sum gives all counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan
from specrl.simulation.acceptance_model import survival
from specrl.simulation.engine import Requests, SimulatedEngine

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_DRAWS = 1024  # 10 random bits
_FINEST = 0.05  # least distance of the skill grid


class Rounds(NamedTuple):
    """One round of each of N sessions."""

    tokens: Ints  # [N] int64, committed and kept
    correct: Ints  # [N] int64, accepted drafts, summed over the batch
    reached: NDArray[np.int64]  # [K, N] int64, requests whose first k drafts were accepted
    seconds: Floats  # [N] float64


class VectorSimulator:
    """N sessions of one engine.

    Args:
        engine: gives costs, acceptance and shifts.
        requests: lengths of the requests.
        plans: that are offered; a round's plan is an index into them.
        sizes: batch sizes, ascending; a session's is an index into them.
        count: N.
    """

    def __init__(
        self, engine: SimulatedEngine, requests: Requests, plans: Sequence[Plan], sizes: Sequence[int], count: int
    ) -> None:
        self._profile, self._shifts = engine.profile, engine.shifts
        self._plans, self.sizes, self.count = tuple(plans), np.array(sizes, dtype=np.int64), count
        self.steps = max(plan.num_steps for plan in plans)
        self._prompt = requests.prompt_tokens
        low, high = requests.max_new_tokens
        if high < 2:
            raise ValueError(f"max_new_tokens must be at least 2 (prefill yields the first), but got {high}")
        self._new = max(low, 2), high
        costs = [[engine.cost(int(b), plan) for plan in (*plans, None)] for b in sizes]
        self._log_seconds = np.array(
            [[math.log(c.seconds) - 0.5 * (c.spread**2 + c.jitter**2) for c in row] for row in costs]
        )
        self._jitter, self._spread, self._per_token = (
            np.array([[getattr(c, name) for c in row] for row in costs]) for name in ("jitter", "spread", "per_token")
        )
        self._keep = math.exp(-1.0 / self._profile.memory)
        self._make_tables(int(max(sizes)))
        rows = int(max(sizes))
        self._skill = np.zeros((rows, count), dtype=np.int32)  # [R, N], position in the grid x 1024
        self._left = np.ones((rows, count), dtype=np.int32)  # [R, N], tokens still to generate
        self._total = np.ones((rows, count), dtype=np.int32)  # [R, N], prompt and all that will be generated
        self._row = np.arange(rows, dtype=np.int32)[:, None]
        self.size = np.zeros(count, dtype=np.int64)  # [N], index into sizes
        self.live = self.sizes[self.size]  # [N], batch sizes
        self._known = np.zeros(count)  # [N], tokens known of the live requests
        self._slow, self._drift = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
        self.rounds = np.zeros(count, dtype=np.int64)

    def _make_tables(self, largest: int) -> None:
        """Words by plan, skill and draw; the grid; where the lanes are."""
        profile, steps = self._profile, self.steps
        moved = np.cumsum([0.0] + [shift.log_odds for shift in sorted(self._shifts, key=lambda s: s.at)])
        self._step = max(max(profile.skill, profile.drift) / 4.0, _FINEST)
        reach = 4.0 * (profile.skill + profile.drift)
        below = math.ceil((reach - moved.min()) / self._step) + 1
        above = math.ceil((reach + moved.max()) / self._step) + 2
        grid = np.arange(-below, above + 1) * self._step
        self._middle, self._points = below, len(grid)
        lane, first = largest.bit_length(), ((steps + 1) * largest).bit_length()
        self._word = [(0, 0)] * steps  # k - 1 -> word and shift
        word, shift = 0, first
        for k in range(steps):
            if shift + lane > 63:
                word, shift = word + 1, 0
            self._word[k] = word, shift
            shift += lane
        self._lane, self._first = (1 << lane) - 1, (1 << first) - 1
        draws = (np.arange(_DRAWS) + 0.5) / _DRAWS
        self._tables = [np.zeros((len(self._plans), len(grid), _DRAWS), dtype=np.int64) for _ in range(word + 1)]
        self._tables[0] += 1  # the bonus token
        for index, plan in enumerate(self._plans):
            for k, stands in enumerate(survival(profile.odds(plan), grid).T if plan.num_steps else ()):
                stood = (draws < stands[:, None]).astype(np.int64)
                word, shift = self._word[k]
                self._tables[word][index] += stood << shift
                self._tables[0][index] += stood
        self._flat = [table.reshape(-1) for table in self._tables]

    @property
    def context(self) -> Floats:
        """Mean tokens known per live request [N]."""
        return self._known / self.live

    def reset(self, which: Ints | None, size: Ints, rng: np.random.Generator) -> None:
        """Begin new sessions (None: all) with fresh requests; `size` [N] are all sessions' batch sizes."""
        at: slice | Ints = slice(None) if which is None else which
        shape = self._left[:, at].shape
        self._left[:, at], self._total[:, at] = self._lengths(shape, rng)
        self._skill[:, at] = self._skills(shape, rng)
        self._slow[at] = rng.standard_normal(shape[1:], dtype=np.float32)
        self._drift[at] = rng.standard_normal(shape[1:], dtype=np.float32)
        self.rounds[at] = 0
        self.resize(size, which)

    def resize(self, size: Ints, which: Ints | None = None) -> None:
        """Set the batch sizes [N], as indices into `sizes`; requests beyond them are parked."""
        if which is None and (size == self.size).all() and self.rounds.all():
            return
        self.size, self.live = size, self.sizes[size]
        self._rows = int(self.live.max())
        level = self._rows == int(self.live.min())
        self._mask = None if level else (self._row[: self._rows] < self.live).astype(np.int64)
        known = (self._total - self._left)[: self._rows]
        self._known = (known if self._mask is None else known * self._mask).sum(0).astype(np.float64)

    def plain(self, cell: Ints, rng: np.random.Generator) -> Floats:
        """Seconds of a plain step of the sessions `cell`, at the profile's context: [len(cell)] float64.

        Without the pauses of the machine, which estimates of plain costs filter out.
        """
        size, plain = self.size[cell], len(self._plans)
        noise = self._jitter[size, plain] * rng.standard_normal(len(cell))
        seconds: Floats = np.exp(self._log_seconds[size, plain] + self._spread[size, plain] * self._slow[cell] + noise)
        return seconds

    def longer(self, plan: Ints | int) -> Floats | float:
        """What a plan's seconds are multiplied by at the context that the sessions have: [N] float64, or 1."""
        if not self._per_token.any():
            return 1.0
        slope = self._per_token[self.size, plan]
        return np.maximum(1.0 + slope * (self.context - self._profile.context), 0.1)

    def round(self, plan: Ints, rng: np.random.Generator) -> Rounds:
        """One round of every session; `plan` [N] are indices into the plans."""
        seconds = self._seconds(plan, rng)
        tokens, correct, reached = self._accept(plan, rng)
        self.rounds += 1
        return Rounds(tokens, correct, reached, seconds)

    def _seconds(self, plan: Ints, rng: np.random.Generator) -> Floats:
        cell = self.size * (len(self._plans) + 1) + plan
        logs = self._log_seconds.take(cell)
        if self._spread.any():
            self._step_on(self._slow, rng)
            logs += self._spread.take(cell) * self._slow
        logs += self._jitter.take(cell) * rng.standard_normal(self.count, dtype=np.float32)
        seconds = np.exp(logs) * self.longer(plan)
        for shift in self._shifts:
            hit = np.array([p.num_steps >= shift.from_steps for p in self._plans])
            seconds *= np.where(hit[plan] & (self.rounds >= shift.at), shift.cost, 1.0)
        return self._with_hiccups(seconds, rng)

    def _with_hiccups(self, seconds: Floats, rng: np.random.Generator) -> Floats:
        if self._profile.hiccup_share:
            hit = np.flatnonzero(rng.random(len(seconds), dtype=np.float32) < self._profile.hiccup_share)
            seconds[hit] *= 1.0 + self._profile.hiccup_extra * rng.standard_exponential(len(hit))
        return seconds

    def _step_on(self, noise: NDArray[np.float32], rng: np.random.Generator) -> None:
        """A step of a stationary AR(1) of variance 1, in place."""
        noise *= np.float32(self._keep)
        noise += np.float32(math.sqrt(1.0 - self._keep**2)) * rng.standard_normal(self.count, dtype=np.float32)

    def _accept(self, plan: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, NDArray[np.int64]]:
        rows, count = self._rows, self.count
        base = self._base(plan, rng)
        index = self._bits(rows, rng)
        index += self._skill[:rows]
        index += base
        words = [flat.take(index) for flat in self._flat]  # [rows, N] each
        if self._mask is not None:
            for word in words:
                word *= self._mask
        sums = [word.sum(0) for word in words]
        words[0] &= self._first
        left = self._left[:rows]
        np.subtract(left, words[0], out=left, casting="unsafe")
        tokens = sums[0] & self._first
        correct = tokens - self.live
        reached = np.empty((self.steps, count), dtype=np.int64)
        for k, (which, shift) in enumerate(self._word):
            reached[k] = (sums[which] >> shift) & self._lane
        ended = np.flatnonzero(left.reshape(-1) <= 0)
        if len(ended):
            tokens = tokens + self._replace(ended, rng)
        self._known += tokens
        if len(ended):
            self._known += self._changed
        return tokens, correct, reached

    def _base(self, plan: Ints, rng: np.random.Generator) -> NDArray[np.int32]:
        """Where each session's part of the table begins, its drift and shifts in it: [N] int32."""
        base = plan * self._points
        moved = np.zeros(self.count)
        moves = bool(self._profile.drift) or any(shift.log_odds for shift in self._shifts)
        if self._profile.drift:
            self._step_on(self._drift, rng)
            moved = moved + np.clip(self._drift, -4.0, 4.0) * self._profile.drift
        for shift in self._shifts:
            if shift.log_odds:
                moved = moved + np.where(self.rounds >= shift.at, shift.log_odds, 0.0)
        if moves:
            base = base + np.floor(moved / self._step + rng.random(self.count)).astype(np.int64)
        return (base * _DRAWS).astype(np.int32)

    def _bits(self, rows: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Uniform draws of 10 bits: [rows, N] int32."""
        need = rows * self.count
        raw = rng.bit_generator.random_raw((need + 3) // 4).view(np.uint16)[:need]
        return (raw & np.uint16(_DRAWS - 1)).astype(np.int32).reshape(rows, self.count)

    def _replace(self, ended: Ints, rng: np.random.Generator) -> Ints:
        """Put new requests where others ended; minus the tokens that ended requests dropped: [N] int64."""
        left, total, skill = (array.reshape(-1) for array in (self._left, self._total, self._skill))
        dropped, gone = left[ended], total[ended]
        left[ended], total[ended] = self._lengths(ended.shape, rng)
        skill[ended] = self._skills(ended.shape, rng)
        session = ended % self.count
        self._changed = np.bincount(session, weights=total[ended] - left[ended] - gone, minlength=self.count)
        return np.bincount(session, weights=dropped, minlength=self.count).astype(np.int64)

    def _lengths(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens left after prefill, and in all."""
        prompt, new = (
            np.full(shape, low, dtype=np.int32)
            if low == high
            else rng.integers(low, high + 1, size=shape, dtype=np.int32)
            for low, high in (self._prompt, self._new)
        )
        return new - 1, prompt + new

    def _skills(self, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int32]:
        """Positions in the grid, times 1024."""
        if not self._profile.skill:
            return np.full(shape, self._middle * _DRAWS, dtype=np.int32)
        skill = np.clip(rng.standard_normal(shape, dtype=np.float32), -4.0, 4.0) * (self._profile.skill / self._step)
        point = np.floor(skill + rng.random(shape, dtype=np.float32)).astype(np.int32)
        return (point + self._middle) * _DRAWS
