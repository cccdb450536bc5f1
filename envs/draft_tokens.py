"""`SpecRL/DraftTokens-v0`: draft the tokens of every round of live speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from specrl.core.batch_schedule import BatchSizes
from specrl.core.checks import require
from specrl.core.interfaces import ProposalSession, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.rollout import Step
from specrl.core.round import Ints
from specrl.decoding.engine import LocalEngine
from specrl.decoding.propose import MAX_DRAFT_TOKENS
from specrl.envs.draft_io import ActionDecoder, Arrays, ObservationWindow, Prefill, SampledDrafts, Sizes
from specrl.envs.timed_env import Episodes, TimedEnv
from specrl.models.config import default_aux_layers
from specrl.models.target import load_target


class DraftTokensEnv(TimedEnv[Arrays, ProposalSession]):
    """Live speculative decoding in which the agent is the draft; every step is one round, rewarded by the clock.

    The agent may draft in any way: with a network, a table or a guess, while the clock runs. B is the largest number of
    live requests in an episode, K is `num_steps`, V the target's vocabulary size, H its hidden size.

    ## Action space
    `MultiDiscrete` [B, K] int64: the drafted tokens of each request, in [-1, V). A draft ends at its first -1, so an
    action of only -1 is a round without speculation. Rows without a live request are ignored. A draft is accepted if it
    is the token that the target itself chooses, so the output is that of the target **for any drafts**: the same tokens
    at temperature 0, the same distribution above.

    An agent that samples its drafts can do better: let the environment draw them, with `draw(q)` of
    `env.unwrapped`, and return what was drawn as the action. Such drafts are accepted by rejection sampling (Leviathan
    et al., 2023, arXiv:2211.17192), which accepts Σ min(p, q) of them instead of Σ p·q. The output keeps the target's
    distribution because the environment has drawn the drafts from q itself.

    ## Observation space
    `Dict` of what a draft may use, since the agent last saw each request. Each row of a request is a committed token
    together with the target's features at the token before it, the pairs that an EAGLE3 draft reads.

    | Key | Shape, dtype | Observation |
    |-----|--------------|-------------|
    | features | [B, K + 1, 3H] float32 | the target's fused features at the token before each |
    | tokens | [B, K + 1] int64 | committed tokens, oldest first: accepted drafts, then the target's own; padding -1 |
    | positions | [B, K + 1] int64 | their positions in the request, prompt included; padding -1 |
    | mask | [B, K + 1] int8 | 1 for a token, 0 for padding |
    | last | [B] int64 | the last committed token, which drafts continue |
    | live | [B] int8 | 1 for rows with a live request |

    With `flat=True`, which Stable-Baselines3 needs, every array is a vector, and so is the action: [B * K] in [0, V],
    where V means -1.

    ## Rewards
    By name, as in `SpecRL/SpecDecode-v0` (`specrl.envs.rewards`). Plain decoding of the same requests, t0, is measured
    between rounds. Drafting is the time between the return of one step and the call of the next, `thinking_s`, and
    counts in full. `drain`, `render`, code inside `paused_timer()` and prefill do not count. Reading prompts
    (`info["prefills"]`) is prefill: do it inside `paused_timer()`.

    ## Starting state
    `reset(seed=...)` reproduces prompts, batch sizes and the first observation. Rounds are timed on a real clock, so
    later observations are not reproducible (`nondeterministic=True`).

    ## Episode end
    Truncated after `max_rounds` rounds, or terminated when `max_tokens` tokens are committed; give exactly one.

    ## Info
    As in `SpecRL/SpecDecode-v0` (`plan` is the longest chain of the round), and `request_ids` [live] int64 of the rows
    to draft for next, and `prefills`: a `specrl.envs.draft_io.Prefill` for each new request (also at reset).

    ## Arguments
        engine: 'local', or a `specrl.LocalEngine` with aux_layers.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        aux_layers: the three layers whose inputs are the features; None: SGLang's default for EAGLE3.
        num_steps: K, the longest draft.
        batch_size, temperature, reward, workload, prompt_tokens, max_new_tokens, ignore_eos, max_rounds, max_tokens,
            allow_parallel, render_mode: as in `SpecRL/SpecDecode-v0`.
        flat: one vector for each array.
        trace: keep traces for `drain`.

    ## Version history
    * v0: initial version
    """

    engine: LocalEngine
    _title = "DraftTokens"
    _needs_traces = True

    def __init__(
        self,
        *,
        engine: str | LocalEngine = "local",
        target: str | Path = "embedded",
        aux_layers: tuple[int, ...] | None = None,
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
        require(1 <= num_steps < MAX_DRAFT_TOKENS, "num_steps", f"in [1, {MAX_DRAFT_TOKENS - 1}]", num_steps)
        episodes = Episodes(batch_size, reward, max_rounds, max_tokens)
        owned = isinstance(engine, str)
        engine = _drafting_engine(engine, target, aux_layers, prompt_tokens + max_new_tokens)
        requests: dict[str, Any] = {"prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens}
        requests |= {"temperature": temperature, "ignore_eos": ignore_eos}
        options: dict[str, Any] = {"trace": trace, "allow_parallel": allow_parallel, "render_mode": render_mode}
        super().__init__(engine, episodes, workload, target, requests, owned=owned, **options)
        config = engine.target.config
        features = len(engine.aux_layers) * config.hidden_size
        sizes = Sizes(episodes.sizes[-1], num_steps, config.vocab_size, features, engine.max_context, flat)
        self._window, self._decoder = ObservationWindow(sizes), ActionDecoder(sizes)
        self._drafts = SampledDrafts(num_steps, config.vocab_size)
        self.observation_space, self.action_space = self._window.space, self._decoder.space
        self.baseline = PlainCost()

    def _begin(self, session: ProposalSession) -> tuple[Arrays, dict[str, Any]]:
        self._drafts.reset(seed=int(self.np_random.integers(2**31)))
        return self._observe(session)

    def _decode(self, session: ProposalSession, action: Any, thinking_s: float) -> Step:
        drafts = self._decoder.read(action, session.batch_size)
        distributions = self._drafts.distributions(drafts)
        self._lock.acquire()
        step = self._rollout.decode(lambda: session.round_with(drafts, distributions), thinking_s)
        self._drafts.clear()
        return step

    def _observe(self, session: ProposalSession, step: Step | None = None) -> tuple[Arrays, dict[str, Any]]:
        prefills, batch = self._read_traces(session), session.batch_size
        self._rollout.prepare()
        if session.batch_size != batch:
            prefills += self._read_traces(session)
        ids = np.array(session.request_ids, dtype=np.int64)
        return self._window.observation(session.batch_size), {"request_ids": ids, "prefills": prefills}

    def _read_traces(self, session: ProposalSession) -> tuple[Prefill, ...]:
        """Add the committed tokens to the window; returns the new requests."""
        traces = session.drain()
        if self._trace:
            self._traces += traces
        return self._window.read(session, traces)

    def draw(self, q: Any) -> Ints:
        """Draw one more draft for each live request, to propose in the next step; on the clock.

        Call it up to K times between two steps: the distribution of the second draft may depend on the first draft.
        The next action must be all that was drawn.

        Args:
            q: [live, V] float32, array or tensor: each request's distribution of its next draft. A row of zeros ends
                its draft. Whether to propose must not depend on what was drawn, only on q.

        Returns:
            [live] int64; -1 where a draft has ended.

        Raises:
            ValueError: before `reset`, another shape or dtype, rows that are not distributions, or too many draws.
        """
        return self._drafts.draw(q, self._running().batch_size)


def _drafting_engine(
    engine: str | LocalEngine, target: str | Path, aux_layers: tuple[int, ...] | None, max_context: int
) -> LocalEngine:
    """Return an engine that provides features: the argument, or a new one for 'local'."""
    features = engine == "local" if isinstance(engine, str) else bool(engine.aux_layers)
    require(features, "engine", "'local' or a LocalEngine with aux_layers", engine)
    if not isinstance(engine, str):
        return engine
    model = load_target(target)
    aux_layers = aux_layers or default_aux_layers(model.config.num_layers)
    return LocalEngine(model, max_context=max_context, aux_layers=aux_layers)
