import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from chooser_scripts import TABLES, Script, Table

from specrl.agents.choosers.rules import ThresholdStopping, ThroughputRule
from specrl.agents.choosers.sglang_rule import DEFAULTS, SGLangRule
from specrl.agents.choosers.table import ClairvoyantLength, FixedPlan, best_table
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observer
from specrl.core.plan import Plan, parse_plans
from specrl.testing.agent import made_up_round

CHAINS = parse_plans("0,1,3,5,7")


def rounds(chooser: PlanChooser, batch: int, correct: int, count: int) -> list[int]:
    """The num_steps chosen in `count` rounds in which every request accepts up to `correct` drafts."""
    steps = []
    for _ in range(count):
        plan = chooser.choose(Observer(CHAINS).observe(batch, 100.0))
        chooser.learn(made_up_round(plan, batch, [min(correct, plan.num_steps)] * batch))
        steps.append(plan.num_steps)
    return steps


def test_sglangs_rule_on_a_trace_computed_by_hand() -> None:
    rule = SGLangRule(CHAINS)
    # Tier 1, 8: 3 steps, e = 2. All drafts are accepted: e = 3 - 0.8^n, after 15 rounds 2.965 > 2.5, so 5 steps.
    assert rounds(rule, 1, 9, 16) == [3] * 15 + [5]
    # That was one round at 5 steps: e = 0.8 * 2.965 + 1. After five: e = 5 - 0.8^5 * 2.035 = 4.333 <= 4.5: stays.
    # After ten: 4.782 > 4.5, so 7 steps.
    assert rounds(rule, 1, 9, 10) == [5] * 9 + [7]
    # Now no draft is accepted. The first round at 7 gave e = 0.8 * 4.782 + 1.4 = 5.225, four of 0 give 2.140: below 5 -
    # 0.75 = 4.25 and 3 - 0.75 = 2.25, above 1 - 0.75: down two candidates at once, to 3.
    assert rounds(rule, 1, 0, 5) == [7] * 4 + [3]
    # Tier 8 had no round: it starts with the server's 3 steps.
    assert rounds(rule, 8, 0, 16) == [3] * 15 + [0]  # 2 * 0.8^15 = 0.07 <= 0.5 and <= 0.5: down to 0
    assert rounds(rule, 8, 0, 6) == [0] * 4 + [1, 1]  # it drafts again after five rounds, one of them above
    assert rounds(rule, 64, 9, 30) == [0] * 30  # its only candidate


def test_a_new_tier_drafts_again_with_the_neutral_mean_and_the_ceiling_never_adds_steps() -> None:
    rule = SGLangRule(CHAINS, config={"1": {"candidate_steps": [0, 3]}}, initial_steps=0)
    assert rounds(rule, 1, 2, 21) == [0] * 15 + [3] * 6  # e = 2 > 0.5 stays
    limited = SGLangRule(CHAINS, config={"1": {"candidate_steps": [1, 3, 5]}, "ceiling_coeff": 0.5}, initial_steps=5)
    assert rounds(limited, 1, 5, 16) == [5] * 15 + [3]  # ceil(0.5 * 4.96) = 3


def test_graph_padding_moves_a_batch_to_the_tier_of_its_graph() -> None:
    config = {"1": {"candidate_steps": [5]}, "8": {"candidate_steps": [1]}}
    assert str(SGLangRule(CHAINS, config=config).best(6)) == "5/1/6"
    assert str(SGLangRule(CHAINS, config=config, graph_batch_sizes=(1, 2, 4, 8)).best(6)) == "1/1/2"


def original_source() -> Path | None:
    """SGLang's own file, in an installed sglang or in an unpacked wheel in $SPECRL_SGLANG_SOURCE."""
    package = importlib.util.find_spec("sglang")
    roots = [os.environ.get("SPECRL_SGLANG_SOURCE"), *((package.submodule_search_locations or []) if package else [])]
    paths = [Path(root) / folder for root in roots if root for folder in (".", "sglang")]
    files = [path / "srt/speculative/adaptive_spec_params.py" for path in paths]
    return next((file for file in files if file.exists()), None)


@pytest.mark.skipif(original_source() is None, reason="no sglang; unpack its wheel and name it in SPECRL_SGLANG_SOURCE")
def test_sglangs_rule_chooses_as_the_original_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported = {
        "sglang.srt.arg_groups.overrides": ("resolved_view", "resolving_view"),
        "sglang.srt.runtime_context": ("attn_dp_enabled_of",),
        "sglang.srt.speculative.spec_info": ("SpeculativeAlgorithm",),
        "sglang.srt.utils": ("log_info_on_rank0",),
    }
    for name in ("sglang", "sglang.srt", "sglang.srt.arg_groups", "sglang.srt.speculative", *imported):
        module = ModuleType(name)
        for attribute in imported.get(name, ()):
            setattr(module, attribute, lambda *args, **kwargs: None)
        monkeypatch.setitem(sys.modules, name, module)
    file = original_source()
    assert file is not None
    spec = importlib.util.spec_from_file_location("the_original", file)
    assert spec is not None and spec.loader is not None
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    candidates = {bound: tier["candidate_steps"] for bound, tier in original.DEFAULT_ADAPTIVE_CONFIG.items()}
    assert candidates == {bound: tier["candidate_steps"] for bound, tier in DEFAULTS.items()}
    rng, plans, path = np.random.default_rng(0), tuple(Plan(s) for s in range(8)), tmp_path / "config.json"
    for trial in range(40):
        config: dict[str, Any] | None = None if trial < 10 else random_config(rng)
        path.write_text(json.dumps(config))
        initial, graphs = int(rng.integers(0, 8)), ([1, 2, 4, 8, 16, 32, 64] if trial % 2 else [])
        theirs = original.AdaptiveSpeculativeParams(initial, None if config is None else str(path))
        theirs.set_cuda_graph_bs(graphs or None)
        ours = SGLangRule(plans, config=config, initial_steps=initial, graph_batch_sizes=graphs)
        rate = 0.5
        for _ in range(400):
            batch = int(rng.choice([1, 3, 7, 8, 20, 33, 70, 100]))
            plan = ours.best(batch)
            assert plan.num_steps == theirs.get_steps_for_batch(batch)
            rate = float(np.clip(rate + 0.1 * rng.standard_normal(), 0.0, 1.0))
            correct = rng.binomial(plan.num_steps, rate, size=batch).tolist()
            theirs.on_verify_complete(correct, batch)
            ours.learn(made_up_round(plan, batch, correct))


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    config: dict[str, Any] = {"ema_alpha": float(rng.uniform(0.05, 0.5)), "warmup_batches": int(rng.integers(0, 12))}
    for bound in ("1", "8", "32"):
        steps = rng.choice(8, size=int(rng.integers(1, 5)), replace=False).tolist()
        config[bound] = {
            "candidate_steps": steps,
            "down_hysteresis": float(rng.uniform(-0.5, 0.2)),
            "up_hysteresis": float(rng.uniform(-0.2, 0.5)),
            "ceiling_coeff": float(rng.choice([0.0, 1.5])),
            "update_interval": int(rng.integers(1, 7)),
        }
    return config


def throughput_rule(costs: dict[Plan, float], correct: list[int], **options: Any) -> ThroughputRule:
    """A rule that decides every round, after 20 rounds of its longest plan with these correct drafts."""
    rule = ThroughputRule(tuple(costs), {4: costs}, update_interval=1, **options)
    for _ in range(20):
        rule.learn(made_up_round(max(costs), 4, correct))
    return rule


def test_the_throughput_rule_follows_its_score() -> None:
    plans = parse_plans("1,2,3")
    costs = dict(zip(plans, (1.0, 1.3, 2.0), strict=True))
    observation = Observer(plans).observe(4, 10.0)
    rule = throughput_rule(costs, [0, 1, 2, 3])
    assert rule.accept_lengths() == pytest.approx([1.0, 1.75, 2.25, 2.5])
    assert rule.choose(observation) == Plan(2)  # scores 1.75, 1.731, 1.25: not 10 % better than 2 steps
    eager = throughput_rule(costs, [0, 1, 2, 3], hysteresis=0)
    assert eager.choose(observation) == Plan(1)
    assert eager.accept_lengths() == pytest.approx([1.0, 1.75, 2.5, 3.25])  # P_2 and P_3 were forgotten
    assert ThroughputRule(plans, {4: costs}).accept_lengths() == [1.0]  # nothing is known


def test_the_throughput_rule_extrapolates_geometrically_and_never_learns_costs() -> None:
    plans = parse_plans("2,3")
    rule = ThroughputRule(plans, {1: {Plan(2): 1.0, Plan(3): 1.1}}, update_interval=1, hysteresis=0)
    for plan, seconds, count in ((Plan(2), 1.0, 20), (Plan(3), 50.0, 40)):
        for _ in range(count):
            rule.learn(made_up_round(plan, 4, [0, 1, 2, 2], seconds=seconds))
        if plan == Plan(2):
            assert rule.accept_lengths()[3] == pytest.approx(1.0 + 0.75 + 0.5 + 0.5 * 0.5 / 0.75)
    assert rule.choose(Observer(plans).observe(4, 10.0)) == Plan(2)  # by acceptance only


def test_the_threshold_stops_where_conditional_acceptance_falls_below_it() -> None:
    plans = parse_plans("0,1,2,3")
    rule = ThresholdStopping(plans, threshold=0.5)
    for _ in range(50):
        rule.learn(made_up_round(Plan(3), 10, [0, 0, 0, 1, 1, 1, 1, 1, 2, 3]))  # a = 0.7, 2/7, 1/2
    assert rule.choose(Observer(plans).observe(1, 10.0)) == Plan(1)
    for _ in range(400):
        rule.learn(made_up_round(Plan(1), 10, [1] * 9 + [0]))
    assert rule.choose(Observer(plans).observe(1, 10.0)) == Plan(3)  # old evidence about later positions has faded


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_no_constant_plan_is_as_fast_as_the_best_table(table: Table) -> None:
    script = Script(table, 600, seed=0)
    best = best_table(table.costs(), dict(zip(table.plans, script.tokens[0].tolist(), strict=True)))
    assert len({best.best(batch) for batch in script.loads}) > 1
    chosen = script.play(best)
    assert script.share(chosen) > 0.99  # below 1 because of the draft's catch-up
    foreseen = script.play(ClairvoyantLength(table.plans, table.costs(), lambda: script.foresee().tolist()))
    assert script.share(foreseen, lucky=True) > script.share(chosen, lucky=True)
    for plan in table.plans:  # test_goals.py compares the adaptive chooser with these
        constant = script.play(FixedPlan(plan))
        assert min(script.share(constant, script.batches == batch) for batch in script.loads) < 0.98


TREES, COSTS = (Plan(3, 2, 6),), {1: dict.fromkeys(CHAINS, 0.001)}


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: SGLangRule(TREES), "plans .* chain"),
        (lambda: SGLangRule(CHAINS, config={"1": {"candidate_steps": [2]}}), "candidate_steps"),
        (lambda: SGLangRule(CHAINS, config={"1": {"candidate_steps": [1], "alpha": 1}}), "'alpha'"),
        (lambda: SGLangRule(CHAINS, config={"ema_alpha": 0.2}), "at least one tier"),
        (lambda: SGLangRule(CHAINS, config={"1": {"candidate_steps": []}}), "candidate_steps"),
        (lambda: ThroughputRule(CHAINS, {1: {Plan(0): 1.0}}), "1/1/2 at 1"),
        (lambda: ThroughputRule(TREES, {}), "plans .* chain"),
        (lambda: ThroughputRule(CHAINS, COSTS, window=0), "window"),
        (lambda: ThresholdStopping(CHAINS, threshold=1.0), "threshold"),
        (lambda: ThresholdStopping(TREES), "plans .* chain"),
        (lambda: best_table(COSTS, {Plan(0): 1.0}), "none of 1/1/2, 3/1/4"),
        (lambda: best_table({}, {}), "a plan table"),
        (lambda: ClairvoyantLength(CHAINS, {}, lambda: [1]), "costs"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], PlanChooser], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()
