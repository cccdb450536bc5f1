"""Programs that run for a fraction of a second or inside SGLang do not import large libraries."""

import subprocess
import sys

import pytest

SIMULATED = 'import gymnasium, specrl; env = gymnasium.make("SpecRL/Simulated-v0"); env.reset(seed=0); env.step(1)'
PLUGIN = "import specrl.sglang.plugin.entry, specrl.sglang.plugin.lookahead, specrl.sglang.plugin.traces"
HUGGING_FACE = ("transformers", "tokenizers", "huggingface_hub")


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import specrl", ("torch", *HUGGING_FACE)),
        (SIMULATED, ("torch", *HUGGING_FACE)),
        ("import specrl.models.target, specrl.workloads.stream, specrl.sglang.client.hot_swap", HUGGING_FACE),
        (PLUGIN, HUGGING_FACE),
    ],
    ids=["package", "simulated environment", "models", "plugin"],
)
def test_large_libraries_are_imported_only_when_they_are_needed(code: str, modules: tuple[str, ...]) -> None:
    code += f"\nimport sys\nassert not {set(modules)} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
