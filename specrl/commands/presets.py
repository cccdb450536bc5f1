"""`specrl presets`: drafts that others published, with every figure's source."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specrl.export.presets import (
    SHAPE,
    Preset,
    checkpoint_header,
    complete,
    count,
    draft_config,
    launch_command,
    load_preset,
    meta_tensors,
    preset_names,
)
from specrl.io.output import OutputDir, show, table


def presets(
    *,
    name: str | None = None,
    target: Path | None = None,
    draft_vocab_size: int | None = None,
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """List published EAGLE3 drafts, or show one: its shape, recipe, launch command, and where each figure stands.

    What no source states is unknown ('?'). Of one preset, what is unknown is read from its target's configuration
    (a directory with config.json; no weights are needed), and its checkpoint's header is written: names, shapes and
    dtypes as SGLang reads them. Taps are layers whose input is read, as SGLang counts its defaults; the explicit ids
    in config.json are one less.

    Args:
        name: of a preset; by default all are listed.
        target: directory of its target.
        draft_vocab_size: entries of the draft's vocabulary, where no source states them.
        output_dir: where presets.json goes, and of one preset launch.sh, model.safetensors.header and, once all of it
            is known, config.json; by default runs/presets-<time>.

    Raises:
        ValueError: no such preset, or a target that is not its own.

    Example:
        specrl presets
        specrl presets minimax-m2.1
        specrl presets minimax-m2.7 --target path/to/MiniMax-M2.7
    """
    if name is None and (target is not None or draft_vocab_size is not None):
        raise ValueError("target and draft_vocab_size are of one preset: name it, as in 'specrl presets minimax-m2.1'")
    chosen = [complete(load_preset(n), target, draft_vocab_size=draft_vocab_size) for n in [name or ""] if n]
    chosen = chosen or [load_preset(n) for n in preset_names()]
    lines = [line(preset) for preset in chosen]
    show(table([{key: _text(value) for key, value in row.items()} for row in lines], title="published drafts"))
    if name is not None:
        _show(chosen[0], str(target or "TARGET"))
    if output_dir is not None:
        directory = OutputDir(output_dir)
        directory.write_json("presets.json", [asdict(preset) | {"counted": counted(preset)} for preset in chosen])
        if name is not None:
            _write(chosen[0], directory, str(target or "TARGET"))
    return lines


def counted(preset: Preset) -> int | None:
    """Parameters of the draft as it is built on the meta device; None: too little is known."""
    return None if any(preset.draft[key].value is None for key in SHAPE) else count(meta_tensors(preset))


def line(preset: Preset) -> dict[str, object]:
    """A preset as a row of the list."""
    d = {key: figure.value for key, figure in preset.draft.items()}
    heads = [d[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    return {
        "preset": preset.name,
        "hidden": d["hidden_size"],
        "heads": "/".join(map(_text, heads)) if any(heads) else None,
        "MLP": d["intermediate_size"],
        "vocabulary": f"{_text(d['vocab_size'])}/{_text(d['draft_vocab_size'])}" if d["vocab_size"] else None,
        "rope theta": d["rope_theta"],
        "taps": "/".join(map(str, d["taps"])) if d["taps"] else None,
        "parameters": _millions(counted(preset)),
        "published": _millions(preset.parameters.value),
        "plan": preset.plan.value,
        "accept length": preset.accept_length.value,
        "profile": preset.profile or "–",
    }


def _millions(parameters: int | None) -> str | None:
    return None if parameters is None else f"{parameters / 1e6:.0f}M"


def _text(value: Any) -> str:
    return "?" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _show(preset: Preset, target: str) -> None:
    """Every figure with its source, and what follows from them."""
    figures = {**preset.draft, **preset.recipe, "plan": preset.plan, "accept length": preset.accept_length}
    rows = [
        {"figure": key, "value": _text(figure.value), "source": figure.source or "no source states it"}
        for key, figure in figures.items()
    ]
    show(table(rows, title=f"{preset.name}: {preset.published or 'a draft'} for {preset.target}"))
    ours, missing = counted(preset), [key for key in preset.unknown if key != "draft_vocab_size"]
    if ours is None:
        show("not built: no source states what the shapes of its tensors follow from")
    else:
        show(f"built on the meta device: {ours:,} parameters" + _difference(preset, ours))
    if missing:
        show(
            f"not known, for config.json: {', '.join(missing)}; read from the target's own configuration: --target DIR"
        )
    if "draft_vocab_size" in preset.unknown:
        show("not known, and in no target's configuration: draft_vocab_size; given by hand: --draft_vocab_size N")
    if preset.note:
        show(f"plan: {preset.note}")
    if preset.profile is not None:
        show(f"its published table, simulated: specrl bench --engine simulated --profile {preset.profile}")
    show(f"serve: {launch_command(preset, target)}")


def _difference(preset: Preset, ours: int) -> str:
    theirs = preset.parameters.value
    if theirs is None:
        return "; none are published"
    return f"; published are {theirs / 1e6:.0f}M, {(theirs - ours) / 1e6:+.0f}M to ours. {preset.difference or ''}"


def _write(preset: Preset, directory: OutputDir, target: str) -> None:
    """What of the checkpoint can be known without its weights."""
    written = ["presets.json", "launch.sh"]
    directory.write_text(
        "launch.sh", f"#!/usr/bin/env bash\n# DRAFT: the directory of the draft\n{launch_command(preset, target)}\n"
    )
    if counted(preset) is not None:
        (directory.path / "model.safetensors.header").write_bytes(checkpoint_header(meta_tensors(preset)))
        written.append("model.safetensors.header")
    if not preset.unknown:
        directory.write_text("config.json", json.dumps(draft_config(preset), indent=2) + "\n")
        written.append("config.json")
    show(f"written: {directory.path}: {', '.join(written)}")
