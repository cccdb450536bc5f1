"""`SpecRL/Simulated-v0`: the same task in simulation, at thousands of rounds a second, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.envs.rewards import make_reward
from specrl.envs.spec_decode import BatchSizes, SpecDecodeEnv, read_batch_sizes
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.profile import Profile, Shift, load_profile

MAX_ROUNDS = 256  # of an episode, unless it is said otherwise
Lengths = int | tuple[int, int] | None


class SimulatedEnv(SpecDecodeEnv):
    """Speculative decoding as `SpecRL/SpecDecode-v0` has it, over a simulated engine instead of a live one.

    Action space, observation space, rewards, episode end and info are those of `SpecRL/SpecDecode-v0`; time is
    virtual, so a chooser's thinking costs nothing. Where the profile says that results are late, the observation
    lags by so many rounds; reward and info do not.

    ## Starting state
    `reset(seed=...)` begins anew: everything that follows depends on the seed and the actions only. Without a seed,
    the table of plain costs and the running speedup survive, as in the live environment.

    ## Arguments
        profile: a `Profile`, the name of a shipped one (`specrl.simulation.profile.shipped_profiles`), or a .json file.
        batch_size, reward, action, max_tokens, render_mode: as in `SpecRL/SpecDecode-v0`.
        plans: on offer; None: all that the profile knows at all of these batch sizes.
        prompt_tokens, max_new_tokens: of each request: a length, or the least and the greatest; None: the profile's.
        max_rounds: length of an episode, 256 where `max_tokens` is not given either.
        extrapolate: allow plans and batch sizes that the profile does not know.
        shifts: of costs and acceptance within an episode.

    ## Vectorised form
    `gymnasium.make_vec("SpecRL/Simulated-v0", num_envs=1024)`: see `specrl.envs.simulated_vector`.

    ## Version history
    * v0: initial version
    """

    def __init__(
        self,
        *,
        profile: Profile | str | Path = "aurora-qwen3-coder-next-fp8",
        batch_size: BatchSizes = 8,
        plans: str | Sequence[str] | Sequence[Plan] | None = None,
        reward: str = "differential",
        prompt_tokens: Lengths = None,
        max_new_tokens: Lengths = None,
        max_rounds: int | None = None,
        max_tokens: int | None = None,
        action: Literal["discrete", "multi_discrete"] = "discrete",
        extrapolate: bool = False,
        shifts: Sequence[Shift] = (),
        render_mode: str | None = None,
    ) -> None:
        engine, requests, offered = simulation(
            profile, batch_size, plans, prompt_tokens, max_new_tokens, extrapolate=extrapolate, shifts=shifts
        )
        super().__init__(
            engine=engine,
            batch_size=batch_size,
            plans=offered,
            reward=reward,
            workload=requests,
            max_rounds=MAX_ROUNDS if max_rounds is None and max_tokens is None else max_rounds,
            max_tokens=max_tokens,
            action=action,
            render_mode=render_mode,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; with a seed, forget what was measured before."""
        if seed is not None:
            self.baseline = PlainCost()
            self._zero.forget()
            self._reward = make_reward(self._make_reward)
        return super().reset(seed=seed, options=options)


def simulation(
    profile: Profile | str | Path,
    batch_size: BatchSizes,
    plans: str | Sequence[str] | Sequence[Plan] | None,
    prompt_tokens: Lengths,
    max_new_tokens: Lengths,
    *,
    extrapolate: bool,
    shifts: Sequence[Shift],
) -> tuple[SimulatedEngine, Requests, tuple[Plan, ...]]:
    """The engine, the requests and the plans on offer.

    Raises:
        ValueError: the profile does not know the batch sizes, or a plan is not to be had.
    """
    known = load_profile(profile)
    trace, drawn = read_batch_sizes(batch_size)
    sizes = [phase.batch_size for phase in (*trace, *drawn)]
    engine = SimulatedEngine(known, batch_sizes=(min(sizes), max(sizes)), extrapolate=extrapolate, shifts=shifts)
    for size in sizes:
        engine.cost(size, None)
    offered = parse_plans(plans) if plans is not None else tuple(filter(engine.supports, known.plans))
    requests = Requests(_lengths(prompt_tokens, known.prompt_tokens), _lengths(max_new_tokens, known.max_new_tokens))
    return engine, requests, offered


def _lengths(given: Lengths, usual: int) -> tuple[int, int]:
    if given is None:
        return usual, usual
    return (given, given) if isinstance(given, int) else given
