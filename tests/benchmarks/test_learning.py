"""The images of the benchmark of learning are right, and every arm of its task is a model that trains."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nested_ats import ArrayImage

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

import learning
from learning_arms import ARMS, TASKS
from learning_data import Data, Places, make_data
from learning_run import Place, run


@pytest.fixture(scope="module")
def needles() -> Data:
    return make_data("needles", replace(TASKS["needles"], train=4, test=2), Places(), jobs=2)


def test_processes_fill_one_memory_with_true_pyramids(needles):
    assert [fold.tolist() for fold in needles.folds[0]] == [[0, 1, 2, 3], [4, 5]]
    assert len({image.identity for image in needles.images}) == 6
    for image in needles.images:
        exact = ArrayImage(torch.from_numpy(image.finest), levels=len(image.shapes))
        for level, (height, width) in enumerate(image.shapes):
            box = torch.tensor([[0, 0, height, width]])
            torch.testing.assert_close(
                image.read(level, box)[0] / 255, exact.read(level, box)[0], atol=0.51 / 255, rtol=0
            )
        assert int(image.finest.max()) > 200


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "needles" in ARMS[arm].tasks])
def test_every_arm_is_trained_and_tested(needles, tmp_path, arm):
    task = replace(TASKS["needles"], train=4, test=2, batch=2, epochs=1)
    place = Place(Places(), None, "cpu", tmp_path)
    found = run(arm, task, needles, 0, place, arm)
    assert found["test_error_1"] in (0.0, 0.5, 1.0)
    assert found["curve"]["cross_entropy"][0] > 0


def test_a_result_file_takes_runs_of_tasks_whose_settings_are_the_same():
    kept = {"course": 1, "digits": "MNIST t10k", "mnist": 1, "signs": 1}
    new = {"course": 1, "digits": "MNIST", "mnist": 2, "signs": 1}
    assert learning.differing(kept, new, ["signs"]) == []
    assert learning.differing(kept, new, ["mnist", "signs"]) == ["mnist", "digits"]
    assert learning.differing(kept, new | {"course": 2}, ["signs"]) == ["course"]


def test_choices_of_all_tasks_are_in_one_table(tmp_path, monkeypatch, capsys):
    def made(task, arm, *errors):
        return [{"task": task, "arm": arm, "test_error_4": error} for error in errors]

    files = {
        "a": made("mnist", "default", 0.04, 0.05, 0.045),
        "b": [*made("slides", "default", 0.0, 0.0, 0.0), *made("slides", "uniform", 0.5, 0.4)],
    }
    for name, runs in files.items():
        (tmp_path / name).write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(sys, "argv", ["learning.py", "--compare", *(str(tmp_path / name) for name in files)])
    learning.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| default | 4.5 [4.0, 5.0] | 0.0 |",
        "| uniform |  | 45.0 [40.0, 50.0] (2 seeds) |",
    ]
