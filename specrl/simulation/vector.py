"""Many simulated sessions at once: the rounds of `specrl.simulation.engine`, drawn for all sessions with NumPy.

Effects of requests on their log-odds lie on a grid (spaced by a quarter of their standard deviation; values are rounded
up or down at random so that the mean is kept). A random number of 10 bits decides how many drafts of a request are
accepted, so each request and round needs one look-up in a table. A table entry is a packed word: the first bit field
holds the tokens, and field k holds 1 if at least k drafts were accepted. Fields are wide enough for the sum over a
batch, so one sum of words gives all counts.
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
from specrl.simulation.shifts import cost_factor, log_odds_change

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_DRAWS = 1024  # values of a random number of 10 bits
_MIN_GRID_STEP = 0.05
_WORD_BITS = 63
_CLIP = 4.0  # standard deviations beyond which effects and drift are clipped


class Rounds(NamedTuple):
    """One round of each of N sessions."""

    tokens: Ints  # [N] int64, committed and kept
    correct: Ints  # [N] int64, accepted drafts, summed over the batch
    reached: Ints  # [K, N] int64, requests whose first k drafts were accepted
    seconds: Floats  # [N] float64


class VectorSimulator:
    """N sessions of one engine.

    Args:
        engine: gives costs, acceptance and shifts.
        requests: lengths of the requests.
        plans: the plan of a round is an index into them.
        sizes: batch sizes, ascending; the batch size of a session is an index into them.
        count: N.

    Attributes:
        size: [N] int64, index of each session's batch size.
        live: [N] int64, batch size of each session.
        rounds: [N] int64, rounds since the reset of each session.

    Raises:
        ValueError: requests of one token, or a plan or batch size without costs.
    """

    def __init__(
        self, engine: SimulatedEngine, requests: Requests, plans: Sequence[Plan], sizes: Sequence[int], count: int
    ) -> None:
        self._profile, self._shifts = engine.profile, engine.shifts
        self._plans, self.sizes, self.count = tuple(plans), np.array(sizes, dtype=np.int64), count
        self._num_steps = np.array([plan.num_steps for plan in plans])
        self.steps = int(self._num_steps.max())
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
        rows = int(max(sizes))
        self._make_tables(rows)
        self._effect = np.zeros((rows, count), dtype=np.int32)  # [R, N], position in the grid x 1024
        self._left = np.ones((rows, count), dtype=np.int32)  # [R, N], tokens to generate
        self._total = np.ones((rows, count), dtype=np.int32)  # [R, N], tokens of the prompt and the whole output
        self._row = np.arange(rows, dtype=np.int32)[:, None]
        self.size = np.zeros(count, dtype=np.int64)
        self.live = self.sizes[self.size]
        self._known = np.zeros(count)  # [N], known tokens of all live requests
        self._slow, self._drift = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
        self.rounds = np.zeros(count, dtype=np.int64)

    def _make_tables(self, largest: int) -> None:
        """Make the grid of effects, the layout of the bit fields, and the table of words by plan, effect and draw."""
        profile, steps = self._profile, self.steps
        changes = np.cumsum([0.0] + [shift.log_odds for shift in sorted(self._shifts, key=lambda s: s.at)])
        self._grid_step = max(max(profile.request_spread, profile.drift) / 4.0, _MIN_GRID_STEP)
        reach = _CLIP * (profile.request_spread + profile.drift)
        below = math.ceil((reach - changes.min()) / self._grid_step) + 1
        above = math.ceil((reach + changes.max()) / self._grid_step) + 2
        grid = np.arange(-below, above + 1) * self._grid_step
        self._middle, self._points = below, len(grid)
        width, token_width = largest.bit_length(), ((steps + 1) * largest).bit_length()
        self._fields = []  # of each k: word and shift
        word, shift = 0, token_width
        for _ in range(steps):
            if shift + width > _WORD_BITS:
                word, shift = word + 1, 0
            self._fields.append((word, shift))
            shift += width
        self._field_mask, self._token_mask = (1 << width) - 1, (1 << token_width) - 1
        draws = (np.arange(_DRAWS) + 0.5) / _DRAWS
        tables = np.zeros((word + 1, len(self._plans), len(grid), _DRAWS), dtype=np.int64)
        tables[0] += 1  # the bonus token
        for index, plan in enumerate(self._plans):
            reached = survival(profile.odds(plan), grid).T if plan.num_steps else ()
            for (word, shift), chance in zip(self._fields, reached, strict=False):
                accepted = (draws < chance[:, None]).astype(np.int64)
                tables[word, index] += accepted << shift
                tables[0, index] += accepted
        self._tables = [table.reshape(-1) for table in tables]

    @property
    def context(self) -> Floats:
        """Mean known tokens per live request: [N] float64."""
        return self._known / self.live

    def reset(self, sessions: Ints | None, size: Ints, rng: np.random.Generator) -> None:
        """Restart `sessions` (indices; None: all) with new requests; `size` [N] are the batch sizes of all sessions."""
        chosen: slice | Ints = slice(None) if sessions is None else sessions
        shape = self._left[:, chosen].shape
        self._left[:, chosen], self._total[:, chosen] = self._draw_lengths(shape, rng)
        self._effect[:, chosen] = self._draw_effects(shape, rng)
        self._slow[chosen] = rng.standard_normal(shape[1:], dtype=np.float32)
        self._drift[chosen] = rng.standard_normal(shape[1:], dtype=np.float32)
        self.rounds[chosen] = 0
        self._set_size(size)

    def resize(self, size: Ints) -> None:
        """Set the batch sizes [N], as indices into `sizes`; requests beyond them are parked."""
        if (size != self.size).any():
            self._set_size(size)

    def _set_size(self, size: Ints) -> None:
        self.size, self.live = size, self.sizes[size]
        self._rows = int(self.live.max())
        known = (self._total - self._left)[: self._rows]
        self._mask = None  # [rows, N], 1 for live requests; None: all are live
        if int(self.live.min()) < self._rows:
            self._mask = (self._row[: self._rows] < self.live).astype(np.int64)
            known = known * self._mask
        self._known = known.sum(0).astype(np.float64)

    def plain(self, sessions: Ints, rng: np.random.Generator) -> Floats:
        """Draw the seconds of a plain step of these sessions at the profile's context: [len(sessions)] float64.

        There are no hiccups, because estimates of plain costs filter them out.
        """
        size, plain = self.size[sessions], len(self._plans)
        noise = self._jitter[size, plain] * rng.standard_normal(len(sessions))
        slow = self._spread[size, plain] * self._slow[sessions]
        return np.asarray(np.exp(self._log_seconds[size, plain] + slow + noise))

    def context_factor(self, plan: Ints | int) -> Floats | float:
        """Return the factor on a plan's seconds at each session's context: [N] float64, or 1."""
        if not self._per_token.any():
            return 1.0
        slope = self._per_token[self.size, plan]
        return np.maximum(1.0 + slope * (self.context - self._profile.context), 0.1)

    def round(self, plan: Ints, rng: np.random.Generator) -> Rounds:
        """Draw one round of every session; `plan` [N] are indices into the plans."""
        seconds = self._draw_seconds(plan, rng)
        tokens, correct, reached = self._accept(plan, rng)
        self.rounds += 1
        return Rounds(tokens, correct, reached, seconds)

    def _draw_seconds(self, plan: Ints, rng: np.random.Generator) -> Floats:
        profile = self._profile
        cell = self.size * (len(self._plans) + 1) + plan
        logs = self._log_seconds.take(cell)
        if self._spread.any():
            self._slow = profile.next_noise(self._slow, rng.standard_normal(self.count, dtype=np.float32))
            logs += self._spread.take(cell) * self._slow
        logs += self._jitter.take(cell) * rng.standard_normal(self.count, dtype=np.float32)
        seconds: Floats = np.exp(logs) * self.context_factor(plan)
        seconds *= cost_factor(self._shifts, self.rounds, self._num_steps[plan])
        if profile.hiccup_share:
            hit = np.flatnonzero(rng.random(self.count, dtype=np.float32) < profile.hiccup_share)
            seconds[hit] *= 1.0 + profile.hiccup_extra * rng.standard_exponential(len(hit))
        return seconds

    def _accept(self, plan: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """Draw tokens [N], correct drafts [N] and requests by accepted drafts [K, N], and replace ended requests."""
        rows = self._rows
        begin = self._table_rows(plan, rng)
        need = rows * self.count
        raw = rng.bit_generator.random_raw((need + 3) // 4).view(np.uint16)[:need]
        index = (raw & np.uint16(_DRAWS - 1)).astype(np.int32).reshape(rows, self.count)
        index += self._effect[:rows]
        index += begin
        words = [table.take(index) for table in self._tables]  # [rows, N] each
        if self._mask is not None:
            for word in words:
                word *= self._mask
        sums = [word.sum(0) for word in words]
        left = self._left[:rows]
        np.subtract(left, words[0] & self._token_mask, out=left, casting="unsafe")
        tokens = sums[0] & self._token_mask
        correct = tokens - self.live
        reached = np.empty((self.steps, self.count), dtype=np.int64)
        for k, (number, shift) in enumerate(self._fields):
            reached[k] = (sums[number] >> shift) & self._field_mask
        ended = np.flatnonzero(left.reshape(-1) <= 0)
        if len(ended):
            tokens = tokens - self._replace(ended, rng)
        self._known += tokens
        return tokens, correct, reached

    def _table_rows(self, plan: Ints, rng: np.random.Generator) -> NDArray[np.int32]:
        """Return the first table entry of each session's plan, moved by its drift and shifts: [N] int32."""
        profile = self._profile
        point = plan * self._points
        change = np.zeros(self.count)
        if profile.drift:
            self._drift = profile.next_noise(self._drift, rng.standard_normal(self.count, dtype=np.float32))
            change += np.clip(self._drift, -_CLIP, _CLIP) * profile.drift
        change += log_odds_change(self._shifts, self.rounds)
        if profile.drift or any(shift.log_odds for shift in self._shifts):
            point = point + np.floor(change / self._grid_step + rng.random(self.count)).astype(np.int64)
        return (point * _DRAWS).astype(np.int32)

    def _replace(self, ended: Ints, rng: np.random.Generator) -> Ints:
        """Replace ended requests by new ones; return the tokens that were drawn beyond their ends: [N] int64."""
        left, total, effect = (array.reshape(-1) for array in (self._left, self._total, self._effect))
        session = ended % self.count
        excess = np.bincount(session, weights=-left[ended], minlength=self.count)
        before = total[ended]
        left[ended], total[ended] = self._draw_lengths(ended.shape, rng)
        effect[ended] = self._draw_effects(ended.shape, rng)
        self._known += np.bincount(session, weights=total[ended] - left[ended] - before, minlength=self.count)
        return excess.astype(np.int64)

    def _draw_lengths(
        self, shape: tuple[int, ...], rng: np.random.Generator
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Draw the tokens to generate after prefill, and all tokens of the request."""
        prompt, new = (
            np.full(shape, low, dtype=np.int32)
            if low == high
            else rng.integers(low, high + 1, size=shape, dtype=np.int32)
            for low, high in (self._prompt, self._new)
        )
        return new - 1, prompt + new

    def _draw_effects(self, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int32]:
        """Draw positions in the grid, times 1024."""
        spread = self._profile.request_spread
        if not spread:
            return np.full(shape, self._middle * _DRAWS, dtype=np.int32)
        effect = np.clip(rng.standard_normal(shape, dtype=np.float32), -_CLIP, _CLIP) * (spread / self._grid_step)
        point = np.floor(effect + rng.random(shape, dtype=np.float32)).astype(np.int32)
        return (point + self._middle) * _DRAWS
