"""Several real processes train as one does: the same losses, norms and weights, whatever each process is for.

Exact runs have one forward call of each sample, on whichever rank it is, and the same bits in all layouts; only sums in
fp64 (losses, norms) have another order. The others have one forward call of each rank.

EMBERLINE_LONG=1 runs fifty steps of more than one layout and optimizer.

Weights of hyper-connections are compared less closely than others. While the streams are nearly alike, which a new
model's are, how they are mixed does not matter: some directions of these gradients are nothing but rounding, and both
optimizers bring what they get to one size.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from embertrain.optim import OptimConfig
from embertrain.parallel import ParallelConfig

from tests.trainer.ranks import CUTS, SAMPLES, TIMEOUT_S, Run, each, ranks, train

pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)
"""The first test also waits for all the runs that the others look at."""

STEPS = 5
LAYOUTS: dict[int, dict[str, ParallelConfig]] = {
    2: {
        "dp": ParallelConfig(dp=2),
        "fsdp": ParallelConfig(fsdp=2),
        "ep": ParallelConfig(ep=2),
    },
    4: {
        "fsdp and ep": ParallelConfig(fsdp=2, ep=2),
        "dp and fsdp": ParallelConfig(dp=2, fsdp=2, offload=True),
        "dp and ep": ParallelConfig(dp=2, ep=2),
    },
}
CASES = [(count, layout, "muon") for count, some in LAYOUTS.items() for layout in some]
CASES.append((4, "fsdp and ep", "adamw"))
CASES += [(count, layout, "exact") for count, some in LAYOUTS.items() for layout in some]
Runs = dict[tuple[int, str, str], list[Run]]

FIFTY = {
    "fsdp and ep": (4, LAYOUTS[4]["fsdp and ep"]),
    "fsdp": (2, LAYOUTS[2]["fsdp"]),
    "ep": (4, ParallelConfig(ep=4)),
}
long = pytest.mark.skipif(not os.environ.get("EMBERLINE_LONG"), reason="EMBERLINE_LONG=1 runs it")


def _arguments(parallel: ParallelConfig, kind: str) -> tuple[Any, ...]:
    """Of `train`: "muon" or "adamw"; "exact" is muon's."""
    if kind == "exact":
        return "micro", parallel, OptimConfig(kind="muon"), STEPS, 2e-3, SAMPLES
    return "micro", parallel, OptimConfig(kind=kind), STEPS  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of every layout and optimizer, what each rank has."""
    found: Runs = {}
    for count in LAYOUTS:
        cases = [case for case in CASES if case[0] == count]
        works = [(train, _arguments(LAYOUTS[count][layout], kind)) for _, layout, kind in cases]
        results = ranks(count, each, tmp_path_factory.mktemp("ranks"), works)
        found |= {case: [of_rank[i] for of_rank in results] for i, case in enumerate(cases)}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    """By optimizer: one process."""
    return {kind: train(*_arguments(ParallelConfig(), kind)) for kind in ("muon", "adamw", "exact")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_those_of_one_process(case: Any, runs: Runs, alone: dict[str, Run]) -> None:
    one, (run, *_) = alone[case[2]], runs[case]
    assert len(one.losses) == STEPS
    assert one.losses[-1] < one.losses[0] - 0.1
    assert run.losses == pytest.approx(one.losses, abs=1e-6)
    assert run.norms == pytest.approx(one.norms, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_those_of_one_process(case: Any, runs: Runs, alone: dict[str, Run]) -> None:
    one, (run, *_) = alone[case[2]], runs[case]
    assert one.weights.keys() == run.weights.keys()
    for name, weight in one.weights.items():
        if case[2] == "exact":
            assert run.weights[name].equal(weight), name
        tolerance = 5e-3 if "hc_" in name else 1e-5
        torch.testing.assert_close(run.weights[name], weight, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_have_the_same(case: Any, runs: Runs) -> None:
    first, *others = runs[case]
    for other in others:
        assert other.losses == first.losses
        assert other.norms == first.norms
        for name, weight in first.weights.items():
            assert weight.equal(other.weights[name]), name


def test_a_run_is_the_same_bit_for_bit_when_it_is_run_again(runs: Runs, tmp_path: Path) -> None:
    again = ranks(2, train, tmp_path, "micro", LAYOUTS[2]["ep"], OptimConfig(), STEPS)
    for first, second in zip(runs[2, "ep", "muon"], again, strict=True):
        assert second.losses == first.losses
        assert second.norms == first.norms
        assert all(second.weights[name].equal(weight) for name, weight in first.weights.items())


@pytest.mark.parametrize(
    "kind, layout",
    [
        pytest.param(kind, layout, marks=() if (kind, layout) == ("adamw", "fsdp and ep") else long)
        for kind in ("adamw", "muon")
        for layout in FIFTY
    ],
)
def test_fifty_steps_are_those_of_one_process(kind: Any, layout: str, tmp_path: Path) -> None:
    """Without exact sums one token goes elsewhere on the way, and losses differ by 4e-3 (AdamW, fsdp and ep)."""
    count, parallel = FIFTY[layout]
    rest = (OptimConfig(kind=kind), 50, 1e-3, SAMPLES)
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(ranks, 1, train, tmp_path / "alone", "micro", ParallelConfig(), *rest)
        shared = pool.submit(ranks, count, train, tmp_path / "shared", "micro", parallel, *rest)
        (one,), (run, *_) = alone.result(), shared.result()
    assert one.losses[-1] < one.losses[0] - 1
    assert run.losses == pytest.approx(one.losses, abs=1e-4)
    assert run.norms == pytest.approx(one.norms, rel=1e-4)


def test_the_samples_have_documents_without_an_entry() -> None:
    assert any(max(cut) < 128 for cut in CUTS) and any(max(cut) >= 128 for cut in CUTS)
