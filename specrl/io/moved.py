"""Old names of options, and the options or commands that replace them."""

from __future__ import annotations

from collections.abc import Sequence

# Old name: new names, of which a command has at most one. An option that only moved into a group needs no line here.
MOVED_OPTIONS: dict[str, tuple[str, ...]] = {
    "device": ("target.device",),
    "dtype": ("target.dtype",),
    "draft_vocab_size": ("draft.vocab_size",),
    "draft_intermediate_size": ("draft.intermediate_size",),
    "temperature": ("workload.temperature", "temperatures"),
    "sglang_python": ("engine.python",),
    "sglang_flags": ("engine.flags",),
    "traffic": ("serving.batch_schedule", "schedule.batch_sizes"),
    "sync_every": ("serving.weight_sync_interval", "weight_sync_interval"),
    "update": ("serving.deploy",),
    "checkpoint_every": ("checkpoint.interval", "checkpoint_interval"),
    "checkpoint_replay": ("checkpoint.keep_replay_buffer",),
    "in_flight": ("ray.max_pending_calls",),
    "engine_device": ("ray.engine_resource",),
    "learner_device": ("ray.learner_resource",),
    "learner.passes": ("learner.ttt_steps",),
    "learner.pass_decay": ("learner.ttt_decay",),
    "learner.pass_weights": ("learner.ttt_weights",),
    "learner.average": ("learner.ema_decay",),
    "learner.clip": ("learner.max_grad_norm",),
    "learner.replay": ("learner.replay_capacity",),
    "learner.half_life": ("learner.replay_half_life",),
    "learner.sample": ("learner.request_sample_rate",),
    "learner.held_out": ("learner.holdout_fraction",),
    "learner.drafts": ("learner.draft_sampling",),
    "learner.rejected": ("learner.rejected_weight",),
    "learner.patience": ("learner.max_bad_updates",),
}

# Command: old option: command that has it now.
MOVED_TO_COMMANDS: dict[str, dict[str, str]] = {
    "specrl train": {
        "server": "specrl train server URL SOCKET DRAFT",
        "server_traces": "specrl train server URL SOCKET DRAFT",
        "traces": "specrl train offline DIR",
        "epochs": "specrl train offline DIR --epochs N",
        "ray": "specrl train ray --ray ADDRESS",
        "engines": "specrl train ray --ray.engines N",
        "in_flight": "specrl train ray --ray.max_pending_calls N",
        "engine_device": "specrl train ray --ray.engine_resource NAME",
        "learner_device": "specrl train ray --ray.learner_resource NAME",
    },
    "specrl rl": {"live": "specrl rl live"},
}


def moved(command: str, name: str, known: Sequence[str], *, dashes: str = "--") -> str | None:
    """Return the option of `known` or the command that replaces an option of a command; None: nothing does."""
    in_groups = [option for option in known if option.partition(".")[2] == name]
    for new in (*MOVED_OPTIONS.get(name, ()), *(in_groups if len(in_groups) == 1 else ())):
        if new in known:
            return f"{dashes}{new}"
    new_command = MOVED_TO_COMMANDS.get(command, {}).get(name)
    return None if new_command is None else f"'{new_command}'"
