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
from chooser_scripts import CODER_NEXT, EMBEDDED, SHIFTS, TABLES, Script, Table

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.rules import ThresholdStopping, ThroughputRule
from specrl.agents.choosers.sglang_rule import DEFAULTS, SGLangRule
from specrl.agents.choosers.table import ClairvoyantLength, FixedPlan, best_table
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observer
from specrl.core.plan import Plan, parse_plans
from specrl.core.statistics import probability_of_improvement
from specrl.testing.agent import CHECKS, Make, made_up_round

CHAINS = parse_plans("0,1,3,5,7")


def costs(plans: tuple[Plan, ...], step: float = 0.2) -> dict[int, dict[Plan, float]]:
    return {batch: {plan: 1e-3 * (1.0 + step * plan.num_steps) for plan in plans} for batch in (1, 16)}


MAKERS: dict[str, Make] = {
    "sglang": SGLangRule,
    "throughput": lambda plans: ThroughputRule(plans, costs(plans)),
    "threshold": ThresholdStopping,
    "best-table": lambda plans: best_table(costs(plans), {plan: 1.0 + 0.5 * plan.num_steps for plan in plans}),
    "clairvoyant": lambda plans: ClairvoyantLength(plans, costs(plans), lambda: [0, 2, 3]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rules_conform(check: Callable[[Make], None], make: Make) -> None:
    check(make)


def rounds(chooser: PlanChooser, batch: int, correct: int, count: int) -> list[int]:
    """Steps chosen in `count` rounds of which every request has up to `correct` drafts right."""
    steps = []
    for _ in range(count):
        plan = chooser.choose(Observer(CHAINS).observe(batch, 100.0))
        chooser.learn(made_up_round(plan, batch, [min(correct, plan.num_steps)] * batch))
        steps.append(plan.num_steps)
    return steps


def test_sglangs_rule_on_a_trace_worked_by_hand() -> None:
    rule = SGLangRule(CHAINS)
    # Tier 1, 8: 3 steps, e = 2. Every draft stands: e = 3 - 0.8^n, after 15 rounds 2.965 > 2.5, so 5 steps.
    assert rounds(rule, 1, 9, 16) == [3] * 15 + [5]
    # One more round was taken at 5 steps: e = 0.8 * 2.965 + 1. After five: e = 5 - 0.8^5 * 2.035 = 4.333 <= 4.5: stays.
    # After ten: 4.782 > 4.5, so 7 steps.
    assert rounds(rule, 1, 9, 10) == [5] * 9 + [7]
    # Nothing stands any more. The first round at 7 gave e = 0.8 * 4.782 + 1.4 = 5.225, four of 0 bring 2.140: below 5 -
    # 0.75 = 4.25 and 3 - 0.75 = 2.25, above 1 - 0.75: down two candidates at once, to 3.
    assert rounds(rule, 1, 0, 5) == [7] * 4 + [3]
    # Tier 8 never saw a round: the middle of its candidates that holds the server's 3 steps.
    assert rounds(rule, 8, 0, 16) == [3] * 15 + [0]  # 2 * 0.8^15 = 0.07 <= 0.5 and <= 0.5: down to 0
    assert rounds(rule, 8, 0, 6) == [0] * 4 + [1, 1]  # probes after five rounds, the first of which was above
    assert rounds(rule, 64, 9, 30) == [0] * 30  # its only candidate


def test_an_untold_tier_probes_with_the_neutral_mean_and_the_ceiling_only_holds_down() -> None:
    rule = SGLangRule(CHAINS, config={"1": {"candidate_steps": [0, 3]}}, initial_steps=0)
    assert rounds(rule, 1, 2, 21) == [0] * 15 + [3] * 6  # probes with e = 2, and 2 > 0.5 stays
    held = SGLangRule(CHAINS, config={"1": {"candidate_steps": [1, 3, 5]}, "ceiling_coeff": 0.5}, initial_steps=5)
    assert rounds(held, 1, 5, 16) == [5] * 15 + [3]  # ceil(0.5 * 4.96) = 3


def test_graph_padding_moves_a_batch_to_the_tier_of_its_graph() -> None:
    config = {"1": {"candidate_steps": [5]}, "8": {"candidate_steps": [1]}}
    assert str(SGLangRule(CHAINS, config=config).best(6)) == "5/1/6"
    assert str(SGLangRule(CHAINS, config=config, graph_batch_sizes=(1, 2, 4, 8)).best(6)) == "1/1/2"


def original_source() -> Path | None:
    """SGLang's own file: of an installed sglang, or of an unpacked wheel in $SPECRL_SGLANG_SOURCE."""
    found = importlib.util.find_spec("sglang")
    roots = [os.environ.get("SPECRL_SGLANG_SOURCE"), *((found.submodule_search_locations or []) if found else [])]
    for root in filter(None, roots):
        for path in Path(root), Path(root) / "sglang":
            if (file := path / "srt/speculative/adaptive_spec_params.py").exists():
                return file
    return None


@pytest.mark.skipif(original_source() is None, reason="no sglang; unpack its wheel and name it in SPECRL_SGLANG_SOURCE")
def test_sglangs_rule_chooses_what_the_original_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs = {
        "sglang.srt.arg_groups.overrides": ("resolved_view", "resolving_view"),
        "sglang.srt.runtime_context": ("attn_dp_enabled_of",),
        "sglang.srt.speculative.spec_info": ("SpeculativeAlgorithm",),
        "sglang.srt.utils": ("log_info_on_rank0",),
    }
    for name in ("sglang", "sglang.srt", "sglang.srt.arg_groups", "sglang.srt.speculative", *needs):
        module = ModuleType(name)
        for attribute in needs.get(name, ()):
            setattr(module, attribute, lambda *args, **kwargs: None)
        monkeypatch.setitem(sys.modules, name, module)
    file = original_source()
    assert file is not None
    spec = importlib.util.spec_from_file_location("the_original", file)
    assert spec is not None and spec.loader is not None
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    merged = {bound: {**tier} for bound, tier in original.DEFAULT_ADAPTIVE_CONFIG.items()}
    assert {b: t["candidate_steps"] for b, t in merged.items()} == {
        b: t["candidate_steps"] for b, t in DEFAULTS.items()
    }
    rng, offered = np.random.default_rng(0), tuple(Plan(s) for s in range(8))
    for trial in range(40):
        config: dict[str, Any] | None = None if trial < 10 else _random_config(rng)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        initial, graphs = int(rng.integers(0, 8)), ([1, 2, 4, 8, 16, 32, 64] if trial % 2 else [])
        theirs = original.AdaptiveSpeculativeParams(initial, None if config is None else str(path))
        theirs.set_cuda_graph_bs(graphs or None)
        ours = SGLangRule(offered, config=config, initial_steps=initial, graph_batch_sizes=graphs)
        ease = 0.5
        for _ in range(400):
            batch = int(rng.choice([1, 3, 7, 8, 20, 33, 70, 100]))
            assert ours.best(batch).num_steps == theirs.get_steps_for_batch(batch)
            plan = ours.best(batch)
            ease = float(np.clip(ease + 0.1 * rng.standard_normal(), 0.0, 1.0))
            correct = rng.binomial(plan.num_steps, ease, size=batch)
            theirs.on_verify_complete(correct.tolist(), batch)
            ours.learn(made_up_round(plan, batch, correct.tolist()))


def _random_config(rng: np.random.Generator) -> dict[str, Any]:
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


def test_the_throughput_rule_is_its_score() -> None:
    plans = parse_plans("1,2,3")
    rule = ThroughputRule(plans, {4: dict(zip(plans, (1.0, 1.3, 2.0), strict=True))}, update_interval=1)
    assert rule.accept_lengths() == [1.0]  # nothing known: stays where it is
    for _ in range(20):
        rule.learn(made_up_round(Plan(3), 4, [0, 1, 2, 3]))
    assert rule.accept_lengths() == pytest.approx([1.0, 1.75, 2.25, 2.5])
    assert rule.choose(Observer(plans).observe(4, 10.0)) == Plan(2)  # 1.75, 1.731, 1.25: not 10 % better than 2 steps
    eager = ThroughputRule(plans, {4: dict(zip(plans, (1.0, 1.3, 2.0), strict=True))}, update_interval=1, hysteresis=0)
    for _ in range(20):
        eager.learn(made_up_round(Plan(3), 4, [0, 1, 2, 3]))
    assert eager.choose(Observer(plans).observe(4, 10.0)) == Plan(1)
    assert eager.accept_lengths() == pytest.approx([1.0, 1.75, 2.5, 3.25])  # P_2 was forgotten, P_1 stands for it


def test_the_throughput_rule_extrapolates_geometrically_and_never_learns_costs() -> None:
    plans = parse_plans("2,3")
    rule = ThroughputRule(plans, {1: {Plan(2): 1.0, Plan(3): 1.1}}, update_interval=1, hysteresis=0)
    for _ in range(20):
        rule.learn(made_up_round(Plan(2), 4, [0, 1, 2, 2], seconds=1.0))
    assert rule.accept_lengths()[3] == pytest.approx(1.0 + 0.75 + 0.5 + 0.5 * 0.5 / 0.75)
    for _ in range(40):
        rule.learn(made_up_round(Plan(3), 4, [0, 1, 2, 2], seconds=50.0))
    assert rule.choose(Observer(plans).observe(4, 10.0)) == Plan(2)  # by acceptance, 50 seconds or not


def test_the_threshold_stops_where_conditional_acceptance_falls_below_it() -> None:
    plans = parse_plans("0,1,2,3")
    rule = ThresholdStopping(plans, threshold=0.5)
    assert Plan(0) not in rule.plans  # the original always drafts
    for _ in range(50):
        rule.learn(made_up_round(Plan(3), 10, [0, 0, 0, 1, 1, 1, 1, 1, 2, 3]))  # a = 0.7, 2/7, 1/2
    assert rule.choose(Observer(plans).observe(1, 10.0)) == Plan(1)
    for _ in range(400):
        rule.learn(made_up_round(Plan(1), 10, [1] * 9 + [0]))
    assert rule.choose(Observer(plans).observe(1, 10.0)) == Plan(3)  # what was not reached lately gets another chance


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_best_table_is_the_bound_that_no_constant_plan_reaches(table: Table) -> None:
    script = Script(table, 600, seed=0)
    known = best_table(table.costs(), dict(zip(table.plans, script.tokens[0].tolist(), strict=True)))
    assert len({known.best(batch) for batch in script.loads}) > 1
    chosen = script.play(known)
    assert script.share(chosen) > 0.99  # what is missing is the draft's catch-up
    foreseen = script.play(ClairvoyantLength(table.plans, table.costs(), lambda: script.foresee().tolist()))
    assert script.share(foreseen, lucky=True) > script.share(chosen, lucky=True)
    for plan in table.plans:
        constant = script.play(FixedPlan(plan))
        assert min(script.share(constant, script.batches == batch) for batch in script.loads) < 0.98


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_ours_beats_sglangs_rule_from_a_cold_start(table: Table) -> None:
    ours, theirs, settled = [], [], []
    for seed in range(6):
        script = Script(table, 2400, seed=seed)
        chosen = script.play(AdaptiveChooser(table.plans, seed=seed))
        ours.append(script.share(chosen))
        theirs.append(script.share(script.play(SGLangRule(table.plans))))
        settled.append(script.share(chosen, script.visits() >= 300))
    assert np.mean(settled) >= 0.98
    assert probability_of_improvement(ours, theirs) >= 0.8  # six seeds; benchmarks/choosers.py has twenty


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)
def test_ours_follows_a_shift_and_beats_the_throughput_rule_with_stale_costs(shift: Any) -> None:
    for table in (CODER_NEXT, EMBEDDED):
        ours, theirs, late = [], [], []
        for seed in range(4):
            script = Script(table, 3000, seed=seed, shift=shift)
            after = np.arange(script.rounds) >= shift.at
            chosen = script.play(AdaptiveChooser(table.plans, seed=seed))
            ours.append(script.share(chosen, after))
            theirs.append(script.share(script.play(ThroughputRule(table.plans, table.costs())), after))
            late.append(script.share(chosen, np.arange(script.rounds) >= shift.at + 500))
        assert np.mean(late) >= 0.97 and np.mean(ours) > np.mean(theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGLangRule((Plan(3, 2, 6),)), "needs a chain.*3/2/6"),
        (lambda: SGLangRule(CHAINS, config={"1": {"candidate_steps": [2]}}), "candidate_steps must be plans"),
        (lambda: SGLangRule(CHAINS, config={"1": {"candidate_steps": [1], "alpha": 1}}), "but got 'alpha'"),
        (lambda: SGLangRule(CHAINS, config={"ema_alpha": 0.2}), "needs a tier"),
        (lambda: SGLangRule(CHAINS, config={"1": {"candidate_steps": []}}), "whole numbers from 0 on"),
        (lambda: ThroughputRule(CHAINS, {1: {Plan(0): 1.0}}), "none of 1/1/2 at 1"),
        (lambda: ThroughputRule((Plan(3, 2, 6),), {}), "needs a chain"),
        (lambda: ThroughputRule(CHAINS, costs(CHAINS), window=0), "at least 1"),
        (lambda: ThresholdStopping(CHAINS, threshold=1.0), r"in \(0, 1\), but got 1.0"),
        (lambda: ThresholdStopping((Plan(3, 2, 6),)), "needs a chain"),
        (lambda: best_table(costs(CHAINS), {Plan(0): 1.0}), "none of 1/1/2, 3/1/4"),
        (lambda: best_table({}, {}), "needs entries"),
        (lambda: ClairvoyantLength(CHAINS, {}, lambda: [1]), "needs chains and costs"),
    ],
)
def test_errors_say_rule_and_value_in_one_line(make: Callable[[], PlanChooser], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
