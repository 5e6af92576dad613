"""Questions have their labels, pieces are kept once, and a test reads what it looks at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

import retinopathy
import study


@pytest.mark.data
def test_photographs_are_asked_both_questions(data, tmp_path, monkeypatch, capsys):
    few = [each for each in study.idrid_grades(data) if each[0].split == "train"][::40]
    few += [each for each in study.idrid_grades(data) if each[0].split == "test"][::10]
    monkeypatch.setattr(study, "idrid_grades", lambda _: few)
    monkeypatch.setattr(retinopathy, "EPOCHS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # which the pieces change, and which is put back so
    labels = {
        q: {e.label for e in retinopathy.photographs(q, data, tmp_path / "idrid")} for q in retinopathy.QUESTIONS
    }
    assert labels["referable"] == {"no", "yes"}
    assert labels["grades"] <= set("01234")
    assert len(labels["grades"]) > 2
    whole = retinopathy.photographs("grades", data, tmp_path / "idrid")
    graded = [entry for entry in whole if entry.label != "1"]
    assert len(retinopathy.photographs("referable", data, tmp_path / "idrid")) == len(graded)

    results = tmp_path / "results.json"
    command = ["", "--data", str(data), "--work", str(tmp_path), "--results", str(results), "--encoders", "frozen"]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "ATS-5"])
    retinopathy.main()
    pieces = json.loads(results.read_text())
    assert [each["question"] for each in pieces] == list(retinopathy.QUESTIONS)
    for piece in pieces:
        assert [test["draws"] for test in piece["tests"]] == [4, 2, 1]
        shares = [test["pixels"] for test in piece["tests"]]
        assert 0.2 > shares[0] > shares[1] > shares[2] > 1 / 64
        assert {test["measure"] for test in piece["tests"]} == {retinopathy.MEASURES[piece["question"]]}
    said = capsys.readouterr().out
    assert "photographs to test on, quadratic_kappa" in said
    monkeypatch.setattr(retinopathy, "one_piece", None)  # nothing is done again
    retinopathy.main()
    assert json.loads(results.read_text()) == pieces
