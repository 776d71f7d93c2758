"""Search algorithms: which trial comes next, also after a restart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.sweeps import make_sweep, trial_record, write_results
from train.config.schema import Sweep
from train.sweep import search
from train.sweep.search_space import Axis
from train.sweep.trials import SweepDir, Trial


def test_grid_skips_finished_trials_and_retries_failed_ones(tmp_path: Path):
    folder = make_sweep(tmp_path, 4)
    write_results(folder.trials[0], 9, 0.5)
    write_results(folder.trials[1], 3, 0.5)
    write_results(folder.trials[2], 3, 0.5, "failed")
    algorithm = search.GridSearch(folder)
    assert [trial.number for trial in iter(algorithm.next_trial, None)] == [1, 2, 3]
    assert algorithm.expected == 4


def make_point(values: dict[str, Any]) -> list[dict[str, Any]]:
    number = values["n"]
    record = trial_record(number)
    del record["point"]
    return [record | {"label": f"n={number:.3f}", "key": repr(number), "values": values}]


def make_search(tmp_path: Path, axis: Axis, **settings: Any) -> tuple[SweepDir, Any]:
    """An empty sweep, and a function that creates its search algorithm, as every start of a launcher does."""
    folder = make_sweep(tmp_path, 0, axes=[vars(axis)], seed=0, epochs=9)
    return folder, partial(
        search.create_algorithm, folder, Sweep(**settings), make_point, f"sqlite:///{tmp_path / 'optuna.db'}"
    )


def accuracy_of(trial: Trial) -> float:
    return 1 - abs(trial.values["n"] - 0.7)


UNIT_RANGE = Axis("n", low=0.0, high=1.0)


def run_search(algorithm: search.SearchAlgorithm, turns: int = 1000) -> list[tuple[int, int]]:
    """Run trials one at a time, like a launcher; return (trial number, last epoch) of each."""
    done = []
    while len(done) < turns and (trial := algorithm.next_trial()):
        until = int(trial.overrides[0].partition("=")[2]) if trial.overrides else trial.total_epochs()
        write_results(trial, until, accuracy_of(trial))
        done.append((trial.number, until))
        algorithm.on_trial_end(trial)
    return done


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_search_resumes_where_it_stopped(kind: str, tmp_path: Path):
    folder, create = make_search(tmp_path, UNIT_RANGE, search=kind, trials=12)
    assert len(run_search(create(), turns=5)) == 5
    abandoned = create().next_trial()  # stored before its launcher dies
    assert abandoned is not None
    assert abandoned.number == 5
    assert [number for number, _ in run_search(create())] == [5, 6, 7, 8, 9, 10, 11]
    assert run_search(create()) == []
    assert len({trial.values["n"] for trial in folder.trials}) == 12

    import optuna

    study = optuna.load_study(study_name=folder.manifest["sweep_id"], storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 12
    assert study.best_value == max(map(accuracy_of, folder.trials))


def test_tpe_concentrates_on_good_regions(tmp_path: Path):
    folder, create = make_search(tmp_path, UNIT_RANGE, search="tpe", trials=30)
    run_search(create())
    late = [accuracy_of(trial) for trial in folder.trials[15:]]
    assert sum(late) / len(late) > 0.85  # at random: 0.71


def test_launcher_killed_before_storing_a_trial_leaves_no_gap_in_the_numbers(tmp_path: Path):
    folder, create = make_search(tmp_path, UNIT_RANGE, search="random", trials=3)
    first = create()
    first._study.ask({"n": search.to_distribution(UNIT_RANGE)})
    assert len(run_search(create())) == 3
    assert [trial.number for trial in folder.trials] == [0, 1, 2]


def test_search_ends_when_the_search_space_is_exhausted(tmp_path: Path, capsys: pytest.CaptureFixture):
    axis = Axis("n", values=(0.1, 0.2, 0.7), words=("0.1", "0.2", "0.7"))
    _, create = make_search(tmp_path, axis, search="random", trials=50)
    assert len(run_search(create())) == 3
    assert capsys.readouterr().out == "found only 3 distinct points instead of sweep.trials=50\n"


def test_failed_trial_has_no_value_in_optuna(tmp_path: Path):
    _, create = make_search(tmp_path, UNIT_RANGE, search="tpe", trials=4)
    algorithm = create()
    trial = algorithm.next_trial()
    write_results(trial, 2, 0.9, "failed")
    algorithm.on_trial_end(trial)
    run_search(algorithm)
    assert [recorded.state.name for recorded in algorithm._study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_asha_rungs():
    assert search.rungs(Sweep(), 27) == [1, 3, 9, 27]
    assert search.rungs(Sweep(), 20) == [1, 3, 9, 20]
    assert search.rungs(Sweep(first_epochs=2, reduction=2), 12) == [2, 4, 8, 12]
    assert search.rungs(Sweep(first_epochs=5), 3) == [3]


def test_asha_promotes_the_best_third(tmp_path: Path):
    folder, create = make_search(tmp_path, UNIT_RANGE, search="asha", trials=9)
    turns = run_search(create())
    reached = dict(turns)
    assert [number for number, epoch in turns if epoch == 1] == list(range(9))
    by_accuracy = sorted(folder.trials, key=accuracy_of, reverse=True)
    assert max(reached.values()) == 9  # only one trial is trained to the end, the best one
    assert [number for number, epoch in reached.items() if epoch == 9] == [by_accuracy[0].number]
    assert {number for number, epoch in reached.items() if epoch >= 3} >= {trial.number for trial in by_accuracy[:3]}
    for number in reached:  # no rung is skipped or repeated
        epochs = [epoch for other, epoch in turns if other == number]
        assert epochs == [1, 3, 9][: len(epochs)]
    abandoned = create().abandoned()
    assert sorted(trial.number for trial in abandoned) == sorted(
        number for number, epoch in reached.items() if epoch < 9
    )


def test_asha_makes_the_same_decisions_after_restarts(tmp_path: Path):
    _, create = make_search(tmp_path / "a", UNIT_RANGE, search="asha", trials=9)
    _, other = make_search(tmp_path / "b", UNIT_RANGE, search="asha", trials=9)
    whole = run_search(create())
    pieces = []
    while turns := run_search(other(), turns=2):
        pieces += turns
    assert pieces == whole


def test_asha_waits_for_all_trials_of_a_rung(tmp_path: Path):
    _, create = make_search(tmp_path, UNIT_RANGE, search="asha", trials=3)
    algorithm = create()
    first, second, third = (algorithm.next_trial() for _ in range(3))
    assert algorithm.next_trial() is None
    for trial in (first, second):
        write_results(trial, 1, accuracy_of(trial))
        algorithm.on_trial_end(trial)
        assert algorithm.next_trial() is None
    write_results(third, 1, accuracy_of(third))
    algorithm.on_trial_end(third)
    best = max((first, second, third), key=accuracy_of)
    following = algorithm.next_trial()
    assert (following.number, following.overrides) == (best.number, ("sweep.until=3",))


def test_asha_first_resumes_a_trial_stopped_between_rungs(tmp_path: Path):
    folder, create = make_search(tmp_path, UNIT_RANGE, search="asha", trials=9)
    run_search(create(), turns=4)
    trial = folder.trials[2]
    write_results(trial, 2, accuracy_of(trial))
    following = create().next_trial()
    assert (following.number, following.overrides) == (2, ("sweep.until=3",))
