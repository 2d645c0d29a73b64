"""Several real processes train as one does: the same losses, norms and weights, whatever each process is for.

Weights of hyper-connections are compared less closely than others. While the streams are nearly alike, which a new
model's are, how they are mixed does not matter: some directions of these gradients are nothing but rounding, and both
optimizers bring what they get to one size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from embertrain.optim import OptimConfig
from embertrain.parallel import ParallelConfig

from tests.trainer.ranks import CUTS, Run, each, ranks, train

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
Runs = dict[tuple[int, str, str], list[Run]]


def _optim(kind: Any) -> OptimConfig:
    return OptimConfig(kind=kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of every layout and optimizer, what each rank has."""
    found: Runs = {}
    for count in LAYOUTS:
        cases = [case for case in CASES if case[0] == count]
        works = [(train, ("micro", LAYOUTS[count][layout], _optim(kind), STEPS)) for _, layout, kind in cases]
        results = ranks(count, each, tmp_path_factory.mktemp("ranks"), works)
        found |= {case: [of_rank[i] for of_rank in results] for i, case in enumerate(cases)}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    """By optimizer: one process."""
    return {kind: train("micro", ParallelConfig(), _optim(kind), STEPS) for kind in ("muon", "adamw")}


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


def test_the_samples_have_documents_without_an_entry() -> None:
    assert any(max(cut) < 128 for cut in CUTS) and any(max(cut) >= 128 for cut in CUTS)
