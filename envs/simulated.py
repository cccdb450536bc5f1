"""`SpecRL/Simulated-v0`: the same task in simulation, at thousands of rounds a second and reproducible by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from specrl.core.batch_schedule import BatchSizes, read_schedules
from specrl.core.plan import Plan, parse_plans
from specrl.envs.rewards import make_reward
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.profile import Profile, load_profile
from specrl.simulation.shifts import Shift

MAX_ROUNDS = 256  # default length of an episode
Lengths = int | tuple[int, int] | None


class SimulatedEnv(SpecDecodeEnv):
    """Speculative decoding as in `SpecRL/SpecDecode-v0`, on a simulated engine instead of a live one.

    Action space, observation space, rewards, episode end and info are those of `SpecRL/SpecDecode-v0`. Time is virtual,
    so choosing a plan takes no time. If results are late in the profile, the observation lags by that many rounds;
    reward and info do not.

    ## Starting state
    `reset(seed=...)` forgets all measurements: everything that follows depends on the seed and the actions only.
    Without a seed, the measured plain costs and the running speedup are kept, as in the live environment.

    ## Arguments
        profile: a `Profile`, the name of a shipped one (`specrl.simulation.profile.shipped_profiles`), or a .json file.
        batch_size, reward, action, max_tokens, render_mode: as in `SpecRL/SpecDecode-v0`.
        plans: the plans to choose from; None: all plans that the profile has at all of these batch sizes.
        prompt_tokens, max_new_tokens: of each request: a length, or the least and the greatest; None: the profile's.
        max_rounds: length of an episode; 256 if neither `max_rounds` nor `max_tokens` is given.
        extrapolate: allow plans and batch sizes that are not in the profile.
        shifts: changes of costs and acceptance within an episode.

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
        """Begin an episode; with a seed, forget all earlier measurements."""
        if seed is not None:
            self.baseline = self._new_baseline()
            self._reward = make_reward(self._episodes.reward)
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
    """Return the engine, the requests and the plans of a simulation; raises ValueError for unknown batch sizes."""
    loaded = load_profile(profile)
    sizes = [phase.batch_size for schedule in read_schedules(batch_size) for phase in schedule]
    engine = SimulatedEngine(loaded, batch_sizes=(min(sizes), max(sizes)), extrapolate=extrapolate, shifts=shifts)
    for size in sizes:
        engine.cost(size, None)
    offered = parse_plans(plans) if plans is not None else tuple(filter(engine.supports, loaded.plans))
    requests = Requests(_lengths(prompt_tokens, loaded.prompt_tokens), _lengths(max_new_tokens, loaded.max_new_tokens))
    return engine, requests, offered


def _lengths(lengths: Lengths, default: int) -> tuple[int, int]:
    if lengths is None:
        lengths = default
    return (lengths, lengths) if isinstance(lengths, int) else lengths
