"""`SpecRL/DraftTokens-v0`: draft the tokens of every round of live speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from specrl.core.batch_schedule import batch_sizes
from specrl.core.interfaces import ProposalSession, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.round import Ints, Trace
from specrl.decoding.engine import LocalEngine
from specrl.decoding.propose import MAX_DRAFT_TOKENS
from specrl.envs.draft_io import Arrays, Prefill, Reader, Window
from specrl.envs.rewards import Outcome, make_reward
from specrl.envs.sampled_drafts import Draws
from specrl.envs.spec_decode import BatchSizes, read_batch_sizes
from specrl.envs.timed_env import OnTheClock, check_episode, measure_plain, named_workload
from specrl.models.config import default_taps
from specrl.models.target import load_target


class DraftTokensEnv(OnTheClock[ProposalSession], gymnasium.Env[Arrays, Any]):
    """Live speculative decoding in which the agent is the draft; every step is one round, rewarded by the clock.

    The agent drafts in whatever way it likes, a network, a table or a guess, while the clock runs. B is the most live
    requests of an episode, K `num_steps`, V the target's vocabulary, H its hidden size.

    ## Action space
    `MultiDiscrete` [B, K] int64: the drafted tokens of each request, in [-1, V). A draft ends at its first -1, so
    that all -1 is a round without speculation; rows of requests that do not live are not read. Drafts stand where the
    target itself chooses them, so that the output is the target's own **whatever is drafted**: token by token at
    temperature 0, in distribution above.

    An agent that samples its drafts can do better: let the environment draw them, with `draw(q)` of
    `env.unwrapped`, and propose what it drew. Such drafts are accepted by rejection sampling (Leviathan et al., 2023,
    arXiv:2211.17192), which accepts more, Σ min(p, q) instead of Σ p·q, and leaves the output the target's own because
    the drafts truly are samples of q.

    ## Observation space
    `Dict`: what a draft may see, since the agent last saw the request. Row i of a request are a token that was
    committed and the features of the token before it (an EAGLE3 draft reads just these pairs).

    | Key | Shape, dtype | Observation |
    |-----|--------------|-------------|
    | features | [B, K + 1, 3H] float32 | the target's fused features at the token before each |
    | tokens | [B, K + 1] int64 | committed tokens, oldest first: accepted drafts, then the target's own; else -1 |
    | positions | [B, K + 1] int64 | their positions in the request, prompt included; else -1 |
    | mask | [B, K + 1] int8 | 1 where there is such a token |
    | last | [B] int64 | the last committed token, after which to draft |
    | live | [B] int8 | 1 for the requests that decode |

    With `flat=True`, as Stable-Baselines3 wants it, every array is a vector, and so is the action: [B * K] in [0, V],
    where V stands for -1.

    ## Rewards
    By name, as in `SpecRL/SpecDecode-v0` (`specrl.envs.rewards`): plain decoding of the same requests, t0, is measured
    between rounds. Drafting is the time between the return of one step and the call of the next, `thinking_s`, and
    counts in full; `drain`, `render` and what runs inside `off_the_clock()` do not count, nor does prefill. Reading
    prompts (`info["prefills"]`) is prefill: do it inside `off_the_clock()`.

    ## Starting state
    `reset(seed=...)` reproduces prompts, batch sizes and the first observation. Timings are real, so what follows is
    not reproducible (`nondeterministic=True`).

    ## Episode end
    Truncated after `max_rounds` rounds, or terminated when `max_tokens` tokens were committed; exactly one is given.

    ## Info
    As in `SpecRL/SpecDecode-v0` (`plan` is the longest chain of the round), and `request_ids` [live] int64 of the rows
    to draft for next, `prefills`: a `specrl.envs.draft_io.Prefill` for each request that came in (also at reset).

    ## Arguments
        engine: 'local', or an engine ready-made: a `specrl.LocalEngine` with taps.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        taps: the three layers whose inputs are the features; None: SGLang's default for EAGLE3.
        num_steps: K, the longest draft.
        batch_size, temperature, reward, workload, prompt_tokens, max_new_tokens, ignore_eos, max_rounds, max_tokens,
            allow_parallel, render_mode: as in `SpecRL/SpecDecode-v0`.
        flat: vectors for everything.
        trace: keep traces for `drain`.

    ## Version history
    * v0: initial version
    """

    engine: LocalEngine
    _title = "DraftTokens"
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 30}

    def __init__(
        self,
        *,
        engine: str | LocalEngine = "local",
        target: str | Path = "embedded",
        taps: tuple[int, ...] | None = None,
        num_steps: int = 4,
        batch_size: BatchSizes = 4,
        temperature: float = 0.7,
        reward: str = "differential",
        workload: str | Path | Workload = "stdlib",
        prompt_tokens: int = 64,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        max_rounds: int | None = None,
        max_tokens: int | None = None,
        flat: bool = False,
        trace: bool = False,
        allow_parallel: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if not 1 <= num_steps < MAX_DRAFT_TOKENS:
            raise ValueError(f"num_steps must be in [1, {MAX_DRAFT_TOKENS - 1}], but got {num_steps}")
        check_episode(max_rounds, max_tokens, reward)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, 'ansi' or 'human', but got {render_mode!r}")
        self.render_mode = render_mode
        self._phases, self._drawn = read_batch_sizes(batch_size)
        self._max_rounds, self._max_tokens, self._trace = max_rounds, max_tokens, trace
        self._reward = make_reward(reward)
        owned = isinstance(engine, str)
        self.engine = _drafting_engine(engine, target, taps, prompt_tokens + max_new_tokens)
        if isinstance(workload, (str, Path)):
            workload = named_workload(workload, target, prompt_tokens, max_new_tokens, temperature, ignore_eos)
        self.workload: Workload = workload
        config = self.engine.target.config
        rows = max(phase.batch_size for phase in (*self._phases, *self._drawn))
        self._rows, features = rows, len(self.engine.aux_layers) * config.hidden_size
        self._window_of = (rows, num_steps, features, config.vocab_size, self.engine.max_context, flat)
        self._window, self._draws_of = Window(*self._window_of), (num_steps, config.vocab_size)
        self._reader = Reader(rows, num_steps, config.vocab_size, flat)
        self.observation_space, self.action_space = self._window.space, self._reader.space
        self.baseline = PlainCost()
        self._set_up(owned=owned, allow_parallel=allow_parallel)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Begin an episode with fresh prompts; no options are known."""
        super().reset(seed=seed)
        self._schedule = batch_sizes(self._begin(self.np_random, options))
        session = self.engine.start(
            self.workload,
            batch_size=next(self._schedule),
            max_batch_size=self._rows,
            seed=int(self.np_random.integers(2**31)),
            trace=True,
        )
        self._session, self._window, self._traces = session, Window(*self._window_of), list[Trace]()
        self._draws = Draws(*self._draws_of, seed=int(self.np_random.integers(2**31)))
        came = self._take(session)
        self._agents_turn()
        return self._window.show(session.batch_size), self._who(session, came)

    def step(self, action: Any) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """Verify the drafts in one round.

        Raises:
            ValueError: before `reset`, an action that is not in the space or not what was drawn, or another timed
                environment is in the middle of an episode on the same device. Nothing is committed then.
        """
        session = self._running()
        thinking_s = self._thinking_s()
        batch = session.batch_size
        drafted = self._reader.read(action, batch)
        distributions = self._draws.proposed(drafted)
        if self._exclusive is not None:
            self._exclusive.take()
        context = sum(session.context_lengths) / batch
        measure_plain(session, self.baseline, context)
        done = session.round_with(drafted, distributions)
        self._draws.clear()
        t0 = self.baseline.estimate(batch, context)
        outcome = Outcome(sum(done.tokens.tolist()), batch, done.seconds + thinking_s, t0.seconds)
        reward, terminated, truncated, info = self._count(done, outcome, thinking_s, t0.standard_error)
        came = self._take(session)
        size = next(self._schedule)
        if size != batch:
            session.resize(size)
            came += self._take(session)
        info |= self._who(session, came) | {"batch_size": batch}
        if self.render_mode == "human":
            self.render()
        observation = self._window.show(size)
        self._agents_turn()
        return observation, reward, terminated, truncated, info

    def draw(self, q: Any) -> Ints:
        """Draw one more draft for each live request, to be proposed in the next step; on the clock.

        Call it up to K times between two steps: what an agent says of the second draft may depend on the first. All
        that is drawn must then be the action.

        Args:
            q: [live, V] float32, array or tensor: each request's distribution of its next draft. A row of zeros ends
                its draft. Proposing depends on q alone, never on what was drawn.

        Returns:
            [live] int64; -1 where a draft has ended.

        Raises:
            ValueError: before `reset`, another shape or dtype, rows that are no distributions, or a draw too many.
        """
        return self._draws.draw(q, self._running().batch_size)

    def drain(self) -> list[Trace]:
        """Take the traces of the rounds so far; off the clock. Needs `trace=True`.

        Raises:
            ValueError: the environment keeps no traces.
        """
        if not self._trace:
            raise ValueError("drain needs traces, but the environment keeps none; make it with trace=True")
        self._running()
        with self.off_the_clock():
            traces, self._traces = self._traces, []
        return traces

    def _take(self, session: ProposalSession) -> tuple[Prefill, ...]:
        """Let the window read what happened; the requests that came in."""
        traces = session.drain()
        if self._trace:
            self._traces += traces
        return self._window.take(session, traces)

    def _who(self, session: ProposalSession, came: tuple[Prefill, ...]) -> dict[str, Any]:
        ids = np.array(session.request_ids, dtype=np.int64)
        return {"request_ids": ids, "prefills": came, "batch_size": session.batch_size}


def _drafting_engine(
    engine: str | LocalEngine, target: str | Path, taps: tuple[int, ...] | None, max_context: int
) -> LocalEngine:
    """The engine of that name, or the one given, which hands out features."""
    if not isinstance(engine, str):
        if not getattr(engine, "taps", ()):
            raise ValueError("the engine must hand out features, but has no aux_layers; pass them to LocalEngine")
        return engine
    if engine != "local":
        raise ValueError(f"engine must be 'local' or a LocalEngine with taps, but got {engine!r}")
    model = load_target(target)
    return LocalEngine(model, max_context=max_context, aux_layers=taps or default_taps(model.config.num_layers))
