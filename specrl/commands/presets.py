"""`specrl presets`: list published drafts with the source of each figure."""

from __future__ import annotations

from specrl.export.presets import Figure, Preset, load_preset, preset_names
from specrl.io.output import show, table


def presets(*, name: str | None = None, target: str = "TARGET", draft: str = "DRAFT") -> None:
    """List published EAGLE3 drafts, or show the shape, recipe and launch command of one, with sources.

    '?' marks values that no source states. `specrl import` converts a downloaded draft, and `specrl train --draft`
    starts from it.

    Args:
        name: of a preset; by default all are listed.
        target: its target, for the launch command.
        draft: directory of the draft, for the launch command.

    Example:
        specrl presets
        specrl presets minimax-m2.1
    """
    if name is None:
        show(table([_row(load_preset(each)) for each in preset_names()], title="published drafts"))
        return
    preset = load_preset(name)
    rows = [
        {"figure": key, "value": _text(figure), "source": figure.source or "no source states it"}
        for key, figure in {**preset.draft, **preset.recipe, **preset.results}.items()
    ]
    show(table(rows, title=f"{name}: {preset.about['published'] or 'a draft'} for {preset.about['target']}"))
    if (counted := preset.count_parameters()) is not None:
        show(f"parameters of this shape: {counted:,}")
    show(*(f"{key}: {preset.about[key]}" for key in ("plan", "parameters") if preset.about[key]))
    if preset.about["profile"] is not None:
        show(f"simulate its published table: specrl bench --profile {preset.about['profile']}")
    show(f"serve: {preset.launch_command(target, draft)}")


def _row(preset: Preset) -> dict[str, object]:
    counted, draft = preset.count_parameters(), preset.draft
    return {
        "preset": preset.name,
        "hidden": _text(draft["hidden_size"]),
        "MLP": _text(draft["intermediate_size"]),
        "vocabulary": _text(draft["vocab_size"]),
        "of draft": _text(draft["draft_vocab_size"]),
        "heads": _text(draft["num_attention_heads"]),
        "aux layers": _text(draft["taps"]),
        "parameters": "?" if counted is None else f"{counted / 1e6:.0f}M",
        "plan": _text(preset.results["plan"]),
        "accept length": _text(preset.results["accept_length"]),
        "profile": preset.about["profile"] or "–",
    }


def _text(figure: Figure) -> str:
    value = figure.value
    if isinstance(value, list):
        return "/".join(map(str, value))
    return "?" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
