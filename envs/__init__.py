"""Gymnasium environments over every engine, imported as `specrl.envs`."""

if __name__ != "specrl.envs":
    raise ImportError(f"this folder is imported as 'specrl.envs', but got {__name__!r}; write 'import specrl.envs'")

import gymnasium

SPEC_DECODE = "SpecRL/SpecDecode-v0"
DRAFT_TOKENS = "SpecRL/DraftTokens-v0"
SIMULATED = "SpecRL/Simulated-v0"


def register() -> None:
    """Register the environments with Gymnasium; `import specrl` does it."""
    if SIMULATED in gymnasium.registry:
        return
    gymnasium.register(SPEC_DECODE, entry_point="specrl.envs.spec_decode:SpecDecodeEnv", nondeterministic=True)
    gymnasium.register(DRAFT_TOKENS, entry_point="specrl.envs.draft_tokens:DraftTokensEnv", nondeterministic=True)
    gymnasium.register(
        SIMULATED,
        entry_point="specrl.envs.simulated:SimulatedEnv",
        vector_entry_point="specrl.envs.simulated_vector:SimulatedVectorEnv",
    )
