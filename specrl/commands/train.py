"""`specrl train`: learn a draft and a plan per batch size on live traffic, or a draft from recorded traces."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from specrl.agents.draft.learner import LearnerConfig
from specrl.core.interfaces import Workload
from specrl.core.plan import parse_plans
from specrl.core.registry import make_engine
from specrl.io.output import OutputDir, hint, show
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.models.target import Target, default_device, load_target
from specrl.training.checkpoint import load_checkpoint
from specrl.training.logger import Reporter, sinks
from specrl.training.offline import learn_from
from specrl.training.run import Run
from specrl.training.server_learner import Follower, Source, follow
from specrl.training.trace_files import Traces
from specrl.training.vocabulary import served_vocabulary
from specrl.workloads.stream import Shifting, open_stream

DRAFT_MLP = 256  # width of the MLP of a draft made anew for an embedded target
VOCABULARY_REQUESTS = 96  # served plainly for `draft_vocab_size`


def train(
    *,
    engine: Literal["local", "sglang"] = "local",
    server: str | None = None,
    server_traces: Path | None = None,
    sglang_python: Path | None = None,
    sglang_flags: str = "",
    target: str = "embedded",
    device: str | None = None,
    dtype: str = "float32",
    draft: Path | None = None,
    draft_vocab_size: int | None = None,
    draft_intermediate_size: int | None = None,
    plans: str = "0,1/1/2,2/1/3,3/1/4,4/1/5,5/1/6",
    chooser: str = "adaptive",
    traffic: str = "16x96,4x24,1x24",
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    requests: int = 2000,
    sync_every: int = 16,
    update: Literal["always", "better"] = "always",
    learn: bool = True,
    learner: LearnerConfig = LearnerConfig(),  # noqa: B008  (frozen)
    traces: Path | None = None,
    epochs: int = 1,
    ray: str | None = None,
    engines: int = 1,
    shard: bool = False,
    in_flight: int = 2,
    engine_device: str = "CPU",
    learner_device: str = "CPU",
    checkpoint_every: int = 256,
    checkpoint_replay: bool = False,
    tensorboard: bool = True,
    wandb: str | None = None,
    resume: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Serve live traffic, learn the draft from it, and choose each round's plan.

    Writes draft/ (an EAGLE3 checkpoint), plans.json (the plan per batch size), log.csv, tensorboard/ and checkpoint/,
    from which --resume goes on after any interruption; with --update better, gate.csv; where traffic drifts, drift.csv.
    Requests in flight at a checkpoint are given up, so that a resumed run does what an uninterrupted one does.

    Args:
        engine: 'local', or 'sglang': an SGLang server is launched (and one without speculation, to compare with), and
            chooser and learner work as ever.
        server: with 'sglang', URL of one that runs: learn from the traffic it serves to others, and swap what was
            learnt in, without a request being touched. Of the other options target, draft (that it was started with),
            learner, requests, sync_every, checkpoint_every, resume and seed matter then. Its API key comes from
            SPECRL_API_KEY.
        server_traces: socket of its plugin, where it was started with SPECRL_TRACES=unix:PATH.
        sglang_python: Python of an environment with SGLang and this package, to launch it in; by default this one.
        sglang_flags: further flags for sglang.launch_server, where it is launched.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        device: of the target and, unless learner.device names another, of the learner; by default a GPU where there
            is one, but the CPU beside SGLang and over Ray.
        dtype: of the target here; greedy output is exactly lossless in float32.
        draft: EAGLE3 draft directory to start from; by default random initialisation.
        draft_vocab_size: tokens that a new draft can say, the most frequent ones of 96 requests served plainly first;
            by default all.
        draft_intermediate_size: width of a new draft's MLP; by default 256 for an embedded target, else the target's.
        plans: that the chooser may choose, separated by commas.
        chooser: 'adaptive', or one plan for every round, such as 3/1/4.
        traffic: batch sizes over time: batch_size x rounds, repeated.
        workload: 'stdlib', or a .txt, .jsonl or directory of prompts (lines of .jsonl hold "prompt", "text", or a
            conversation as "messages", "conversations" or "turns", which goes through the target's chat template; one
            with "learn": false is not learnt from), or a stream that changes: 'stdlib@500,pydoc_data@500' is 500
            requests of each in turn, 'stdlib*3+tests*1@400,notes.txt' a mixture, then one's own. Of the library there
            are 'pydoc_data', 'encodings' and 'tests' too.
        prompt_tokens: tokens of a prompt; a conversation in a chat template is never cut, but left out if longer.
        max_new_tokens: tokens generated per request.
        temperature: of sampling; 0 is greedy.
        requests: to serve, those before a resumption included.
        sync_every: finished requests between two updates of the serving draft.
        update: 'always' serves what was learnt; 'better' only what is surely better on held-out recent sequences, and
            then surely no slower in a trial of 128 to 512 rounds on the traffic; what is worse is rolled back. A
            checkpoint ends a trial, so checkpoint_every must leave room for one.
        learn: whether the draft learns.
        learner: how it learns.
        traces: directory of `specrl record`: learn from it without serving; of the other options target, draft,
            learner, resume and seed matter then.
        epochs: through the traces.
        ray: address of a Ray cluster, 'auto' or 'local': engines and the learner are processes of their own on it, and
            serving never waits for learning. Updates are 'always', log.csv tells of engines, a learner that was killed
            comes back from its checkpoint (output_dir must be where every node finds it), and requests are counted
            from 0 when it is resumed.
        engines: with `ray`: how many serve, each a stream and a chooser of its own; with `traces` how many processes
            share every batch.
        shard: with `ray` and `traces`: each process keeps its part of the weights and of the optimiser's state, for a
            draft that is too large for one; what is learnt is the same.
        in_flight: with `ray`: calls of an engine that the learner may owe an answer; what finishes meanwhile is
            dropped and counted.
        engine_device: with `ray`: a resource of the cluster of which each engine owns one: 'CPU' or your own name.
        learner_device: with `ray`: the same for the learner.
        checkpoint_every: requests between two checkpoints.
        checkpoint_replay: keep the sequences that are learnt from in the checkpoint too, each at least 2 bytes x
            tokens x vocabulary; without them a resumed run gathers new ones.
        tensorboard: write tensorboard/.
        wandb: project of Weights & Biases to report to; WANDB_MODE=offline reports to this machine.
        resume: go on from the checkpoint in output_dir; --config <output_dir>/config.yaml repeats the options.
        seed: of everything random.
        output_dir: where results go; by default runs/train-<time>.

    Raises:
        ValueError: an argument out of range, or nothing to resume.

    Example:
        specrl train --requests 500 --output_dir runs/day0
        specrl train --config runs/day0/config.yaml --resume --requests 1000
        specrl train --learner.learning_rate 2e-3 --learner.passes 5 --chooser 4/1/5 --traffic 8
        specrl train --ray 10.0.0.1:6379 --engines 7 --requests 20000 --output_dir /shared/run
        specrl train --ray 10.0.0.1:6379 --engines 4 --traces /shared/traces --output_dir /shared/offline
    """
    if requests < 1 or checkpoint_every < 1:
        raise ValueError(f"requests and checkpoint_every must be at least 1, but got {requests} and {checkpoint_every}")
    if draft is not None and draft_vocab_size is not None:
        raise ValueError("a draft that is there has its vocabulary, so name --draft or --draft_vocab_size, not both")
    if draft is not None and draft_intermediate_size is not None:
        raise ValueError("a draft that is there has its width, so name --draft or --draft_intermediate_size, not both")
    if ray is not None and (engine != "local" or update != "always" or wandb or not learn):
        raise ValueError(
            "--ray goes with the engine 'local', --update always, --learn true and without --wandb, but got "
            f"{engine!r}, {update!r}, {learn} and {wandb}; leave the others out"
        )
    if shard and (ray is None or traces is None):
        raise ValueError("--shard is for processes that share traces, so name --ray and --traces, or leave it out")
    followed = _followed(engine, server, server_traces, draft)
    directory = OutputDir(output_dir or Path("runs/train"))
    model = load_target(target, device=device or ("cpu" if engine != "local" or ray else default_device()), dtype=dtype)
    if followed is not None and draft is not None:
        checkpoint = directory.path / "checkpoint" if resume else None
        taught = Follower(
            model, load_draft(draft), learner, followed, sync_every=sync_every, seed=seed, resume=checkpoint
        )
        follow(taught, directory, requests=requests, checkpoint_every=checkpoint_every)
        return
    if traces is not None:
        if draft_vocab_size is not None:
            raise ValueError("--traces does not go with --draft_vocab_size; name a --draft of that vocabulary")
        first = (
            load_draft(draft) if draft is not None else fresh_draft(model, target, seed, width=draft_intermediate_size)
        )
        going: dict[str, Any] = {"epochs": epochs, "seed": seed, "resume": resume}
        if ray is not None:
            from specrl.cluster.shared import learn_over_ray

            begin = directory.path / "first"
            first.save(begin)
            learn_over_ray(ray, traces, target, begin, learner, directory, workers=engines, shard=shard, **going)
            return
        learn_from(Traces(traces), model, first, learner, directory, target=target, **going)
        show(f"written: {directory.path}")
        return
    source = open_stream(
        workload,
        target,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        split="train",
    )
    checkpoint = directory.path / "checkpoint" if resume else None
    context = prompt_tokens + max_new_tokens
    if draft is not None:
        first = load_draft(draft)
    else:
        ids = (
            None
            if draft_vocab_size is None
            else _vocabulary(model, source, draft_vocab_size, context, seed, checkpoint)
        )
        first = fresh_draft(model, target, seed, ids, draft_intermediate_size)
    if ray is not None:
        from specrl.cluster.command import train_over_ray
        from specrl.cluster.serving import Serving

        limits: dict[str, Any] = {"prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens}
        doing = Serving(
            target,
            partial(open_stream, workload, target, **limits, temperature=temperature, split="train"),
            plans,
            chooser,
            traffic,
            context,
            sync_every,
            in_flight,
            learner,
            seed,
        )
        owned = {"engine_device": engine_device, "learner_device": learner_device}
        train_over_ray(ray, doing, first, directory, requests=requests, engines=engines, resume=resume, **owned)
        return
    with ExitStack() as ending:
        launched = None
        if engine != "local":
            options = {"python": sglang_python, "flags": shlex.split(sglang_flags)}
            named = [*parse_plans(plans), *([] if chooser == "adaptive" else parse_plans(chooser))]
            launched = make_engine(
                engine, target=target, draft=first, plans=tuple(dict.fromkeys(named)), trace=learn, **options
            )
            ending.callback(getattr(launched, "close", lambda: None))
        run = Run.start(
            model,
            first,
            source,
            target=target,
            plans=plans,
            chooser=chooser,
            traffic=traffic,
            learner=learner if learn else None,
            sync_every=sync_every,
            max_context=context,
            seed=seed,
            update=update,
            resume=checkpoint,
            engine=launched,
        )
        report = Reporter(
            run,
            directory,
            sinks=sinks(directory, tensorboard=tensorboard, wandb=wandb),
            part=_parts(source, workload),
        )
        serve(run, report, directory, requests=requests, checkpoint_every=checkpoint_every, replay=checkpoint_replay)
    run.write_results(directory)
    show(f"written: {directory.path}")
    show(hint(directory.path))


def _followed(engine: str, server: str | None, traces: Path | None, draft: Path | None) -> Source | None:
    """The server to learn from; None: we serve."""
    named = {"--server": server, "--server_traces": traces}
    if engine == "local":
        strange = [name for name, value in named.items() if value is not None]
        if strange:
            raise ValueError(f"{strange[0]} is for --engine sglang, but the engine is 'local'; name that engine")
        return None
    if server is None and traces is None:
        return None
    missing = [name for name, value in {**named, "--draft": draft}.items() if value is None]
    if server is None or traces is None or missing:
        raise ValueError(
            f"to learn from a server that runs, {', '.join(missing)} must be named too; it is started with launch.sh "
            "of a 'specrl export' and SPECRL_TRACES=unix:PATH"
        )
    return Source.of(server, traces)


def serve(
    run: Run, report: Reporter, directory: OutputDir, *, requests: int, checkpoint_every: int, replay: bool = False
) -> None:
    """Serve until `requests` have been, those before a resumption included, with a checkpoint at the end."""
    saved = run.served
    while run.served < requests:
        run.loop.step()
        report.maybe()
        if run.served - saved >= checkpoint_every or run.served >= requests:
            saved = run.served
            run.loop.rest()
            report.line()
            run.save(directory.path, seconds=report.seconds, replay=replay)
            if run.served < requests:
                run.loop.begin()
    report.last()


def _parts(source: Workload, spec: str) -> Callable[[int], str] | None:
    """The name of the part of a stream that the request of a number is of; None: it has no parts."""
    if not isinstance(source, Shifting):
        return None
    names = [name.strip() for name in spec.split(",")]
    return lambda number: names[source.part_of(number)]


def _vocabulary(
    model: Target, source: Workload, size: int, max_context: int, seed: int, checkpoint: Path | None
) -> Tensor:
    """The checkpoint's vocabulary, or one from the workload."""
    if checkpoint is not None:
        ids = load_checkpoint(checkpoint).tensors.get("vocabulary", torch.arange(model.config.vocab_size))
        if len(ids) != size:
            raise ValueError(f"a draft's vocabulary is fixed for a run, of {len(ids)} tokens, but got {size}")
        return ids
    found, coverage = served_vocabulary(
        model, source, size, max_context=max_context, seed=seed, requests=VOCABULARY_REQUESTS
    )
    show(
        f"draft vocabulary: {size} of {model.config.vocab_size} tokens, {found.seen} were seen, {coverage:.1%} covered"
    )
    return found.ids


def fresh_draft(
    model: Target, target: str, seed: int, vocabulary: Tensor | None = None, width: int | None = None
) -> Draft:
    """A draft from random initialisation.

    Args:
        model: the target.
        target: its name.
        seed: of the initialisation.
        vocabulary: [Vd] int64, tokens that it can say; None: all.
        width: of its MLP; None: narrow for an embedded target, else the target's.
    """
    if width is not None and width < 1:
        raise ValueError(f"draft_intermediate_size must be at least 1, but got {width}")
    if width is None and target.startswith("embedded"):
        width = DRAFT_MLP
    return new_draft(model, intermediate_size=width, vocabulary=vocabulary, seed=seed)
