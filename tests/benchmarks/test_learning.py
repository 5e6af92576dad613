"""The images of the benchmark of learning are right, and every arm of its task is a model that trains."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nested_ats import ArrayImage
from pipeline.sections import TrainConfig

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
    course = TrainConfig().model_dump(mode="json")
    older = {**course, "augment": {"flip": False}}  # from before the other changes could be chosen
    kept = {"course": older, "digits": "MNIST t10k", "mnist": 1, "signs": 1}
    new = {"course": course, "digits": "MNIST", "mnist": 2, "signs": 1}
    assert learning.differing(kept, new, ["signs"]) == []
    assert learning.differing(kept, new, ["mnist", "signs"]) == ["mnist", "digits"]
    assert learning.differing(kept, new | {"course": {**course, "clip": 2.0}}, ["signs"]) == ["course"]


def compared(folder, monkeypatch, *files):
    monkeypatch.setattr(sys, "argv", ["learning.py", "--compare"])
    for number, (settings, runs) in enumerate(files):
        path = folder / str(number)
        path.write_text(json.dumps({"settings": {"course": 0, "mnist": 0, "slides": 0} | settings, "runs": runs}))
        sys.argv.append(str(path))
    learning.main()


def runs_of(task, arm, *found):
    return [{"task": task, "arm": arm, "test_error_4": error, "epochs_to_90": epochs} for error, epochs in found]


def test_choices_of_all_tasks_are_in_one_table(tmp_path, monkeypatch, capsys):
    compared(
        tmp_path,
        monkeypatch,
        ({"slides": 1}, runs_of("mnist", "default", (0.04, 8), (0.05, 10), (0.045, 9))),
        (
            {"mnist": 1},  # of which it has no runs
            [
                *runs_of("slides", "default", (0.0, 3), (0.0, 3), (0.0, 3)),
                *runs_of("slides", "uniform", (0.5, None), (0.4, 7)),
            ],
        ),
    )
    errors, epochs = capsys.readouterr().out.strip().split("\n\n")
    assert errors.splitlines()[2:] == [
        "| default | 4.5 [4.0, 5.0] | 0.0 |",
        "| uniform |  | 45.0 [40.0, 50.0] (2 seeds) |",
    ]
    assert epochs.splitlines()[2:] == [
        "| default | 9 [8, 10] | 3 |",
        "| uniform |  | never [7, never] (2 seeds) |",
    ]


def test_runs_of_other_settings_do_not_stand_in_one_table(tmp_path, monkeypatch):
    runs = runs_of("mnist", "default", (0.04, 8))
    with pytest.raises(SystemExit, match="mnist: .* different settings"):
        compared(tmp_path, monkeypatch, ({}, runs), ({"mnist": 1}, runs))
