"""A study in Python: the same folders as the commands, and every object shows itself."""

from __future__ import annotations

import pandas as pd
import pytest

from pipeline.data.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.results.evaluate import evaluate
from pipeline.study import Cohort, Model


def test_a_cohort_is_a_manifest_a_frame_or_slides(pyramids):
    cohort = Cohort.open(pyramids)
    assert list(cohort) == read_manifest(pyramids)
    frame = pd.DataFrame([{"path": e.path, "label": e.label} for e in cohort])
    assert [e.label for e in Cohort.open(frame)] == [e.label for e in cohort]
    assert len(Cohort.open([cohort[0].path, cohort[1].path])) == 2
    assert repr(cohort) == "Cohort(14 slides of 14 cases: 7 bar, 7 box)"
    assert "<td>bar</td><td>5</td><td>2</td>" in cohort._repr_html_()


def test_a_split_is_drawn_by_label(pyramids):
    frame = pd.DataFrame([{"path": e.path, "label": e.label} for e in read_manifest(pyramids)])
    counts = Cohort.open(frame).split(test=2 / 7, seed=1).counts
    assert counts == {"bar": {"test": 2, "train": 5}, "box": {"test": 2, "train": 5}}


def test_a_run_of_the_command_is_predicted_with_and_shown(finished, pyramids, tmp_path):
    model, cohort = Model(finished), Cohort.open(pyramids)
    answers = model.predict(cohort, tmp_path / "test", split="test")
    assert [row["slide_id"] for row in answers.rows] == [e.slide_id for e in cohort if e.split == "test"]
    assert list(answers.frame()["prediction"]) == [row["prediction"] for row in answers.rows]
    figures = answers.evaluate()
    assert dict(figures) == evaluate(tmp_path / "test")
    assert repr(figures).startswith("slides             4\n")
    assert "ats of bar, box, 3 epochs" in repr(model)
    assert "4 slides, 0 failed" in repr(answers)
    for shown in (model, answers, figures):
        assert "<table>" in shown._repr_html_()
    for page, plot in ((model.plot(), "curve-accuracy-run"), (answers.plot(), "roc")):
        assert "srcdoc" in page._repr_html_()
        assert f'id="{plot}"' in page.save(tmp_path / "page.html").read_text()


def test_what_makes_no_sense_is_refused(finished, pyramids, tmp_path):
    with pytest.raises(UsageError, match="settings override a file"):
        Cohort.open(pyramids).fit(tmp_path / "run", {"seed": 1}, "train.epochs=1")
    with pytest.raises(UsageError, match="split val: no slide is in it"):
        Model(finished).predict(Cohort.open(pyramids), tmp_path / "out", split="val")
