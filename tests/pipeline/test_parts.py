"""Results in parts: what is on the disk when, what a kill or a full disk leaves, and a table made piece by piece."""

from __future__ import annotations

import csv
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data.manifest import Entry
from pipeline.errors import DataError, UsageError
from pipeline.results import parts as module
from pipeline.results import predict as predicting
from pipeline.results.parts import BYTES, Parts, part_files
from pipeline.results.predict import predict
from pipeline.results.predictions import read_predictions

SCHEMA = pa.schema({"number": pa.int64(), "text": pa.string()})


def name(number):
    return number.to_bytes(BYTES, "little")  # zeros at its end


def receipts(numbers):
    return np.array([name(number) for number in numbers], f"S{BYTES}")


def fill(parts, numbers, seconds=0.0):
    for number in numbers:
        parts.add(name(number), {"number": number, "text": str(number)}, seconds)


def on_disk(folder):
    return sum(parquet.read_metadata(path).num_rows for path in part_files(folder))


class TestParts:
    def test_rows_are_found_and_taken_in_any_order(self, tmp_path):
        parts = Parts(tmp_path, SCHEMA)
        numbers = random.Random(0).sample(range(1000), 300)
        fill(parts, numbers)
        parts.flush()
        for kept in (parts, Parts(tmp_path, SCHEMA)):
            wanted = [*range(1000), numbers[7], numbers[7]]
            found = kept.find(receipts(wanted))
            assert [number in numbers for number in wanted] == (found >= 0).tolist()
            table = kept.take(found)
            assert table.schema.names == ["number", "text"]
            assert table["number"].to_pylist() == [number if number in numbers else None for number in wanted]

    def test_nothing_is_found_in_an_empty_folder(self, tmp_path):
        parts = Parts(tmp_path / "new", SCHEMA)
        found = parts.find(receipts([1, 2]))
        assert found.tolist() == [-1, -1]
        assert parts.take(found)["text"].to_pylist() == [None, None]

    def test_of_few_rows_each_is_on_the_disk_and_many_make_few_files(self, tmp_path):
        parts = Parts(tmp_path, SCHEMA, workers=100)
        for number in range(8):
            fill(parts, [number])
            assert on_disk(tmp_path) == number + 1
        done = 8
        for step in random.Random(0).choices(range(1, 300), k=20):
            fill(parts, range(done, done := done + step))
            assert done - on_disk(tmp_path) <= done // 8 + 1
        assert len(part_files(tmp_path)) < 80

    def test_what_took_long_does_not_wait(self, tmp_path):
        parts = Parts(tmp_path, SCHEMA, workers=2)
        fill(parts, range(100))
        parts.flush()
        fill(parts, range(100, 103), seconds=3.0)
        assert on_disk(tmp_path) == 100
        fill(parts, [103], seconds=3.0)
        assert on_disk(tmp_path) == 104

    def test_small_parts_are_joined(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_MANY", 5)
        parts = Parts(tmp_path, SCHEMA)
        fill(parts, range(40), seconds=9.0)
        assert len(part_files(tmp_path)) < 5
        for kept in (parts, Parts(tmp_path, SCHEMA)):
            assert kept.take(kept.find(receipts(range(40))))["number"].to_pylist() == list(range(40))

    def test_a_join_that_is_stopped_loses_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_MANY", 5)
        parts = Parts(tmp_path, SCHEMA)
        fill(parts, range(4), seconds=9.0)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fill(parts, [4], seconds=9.0)
        kept = Parts(tmp_path, SCHEMA)
        assert on_disk(tmp_path) == 10
        assert kept.take(kept.find(receipts(range(5))))["number"].to_pylist() == list(range(5))
        fill(kept, [5], seconds=9.0)
        assert kept.take(kept.find(receipts(range(6))))["number"].to_pylist() == list(range(6))

    def test_a_full_disk_leaves_what_was_written(self, tmp_path, monkeypatch):
        parts = Parts(tmp_path, SCHEMA)
        fill(parts, range(3))

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UsageError, match=r"part-000004\.parquet: cannot be written: No space left"):
                fill(parts, [3])
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-00000{i}.parquet" for i in (1, 2, 3)]
        parts.flush()  # when there is room again
        assert on_disk(tmp_path) == 4

    def test_damage_is_named_where_it_is_found_late(self, tmp_path):
        parts = Parts(tmp_path, SCHEMA)
        fill(parts, range(3))
        part_files(tmp_path)[0].write_bytes(b"")
        with pytest.raises(DataError, match=r"part-00000\d\.parquet: damaged .* remove it"):
            parts.take(parts.find(receipts(range(3))))

    @pytest.mark.parametrize("seed", range(3))
    def test_a_kill_leaves_whole_parts(self, tmp_path, seed):
        code = (
            "import sys; from pathlib import Path; sys.path.insert(0, '.');"
            "from tests.pipeline.test_parts import *;"
            "parts = Parts(Path(sys.argv[1]), SCHEMA); print('go', flush=True); fill(parts, range(10**6), 1.0)"
        )
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(random.Random(seed).uniform(0.05, 0.5))
            process.send_signal(signal.SIGKILL)
        parts = Parts(tmp_path, SCHEMA)
        count = on_disk(tmp_path)
        found = parts.find(receipts(range(count)))
        assert (found >= 0).sum() >= count - 300  # rows of parts that were being joined are there twice
        there = np.flatnonzero(found >= 0)
        assert there.tolist() == list(range(len(there)))
        assert parts.take(found[there])["number"].to_pylist() == there.tolist()


class Instant:
    """Classifies a slide by its name."""

    def __init__(self, settings):
        self.done = []

    def __call__(self, entry):
        number = int(entry.slide_id)
        self.done.append(number)
        if number % 10 == 7:
            return {"status": "failed", "error": f"{number} is odd"}
        answers = {"prob_bar": number / 1e4, "prob_box": 1 - number / 1e4}
        return {"prediction": "box", **answers, "draws": 1, "seconds": 0.0, "status": "ok", "error": "", "pixels": []}


def test_a_large_table_is_made_in_pieces(finished, tmp_path, monkeypatch):
    """In the order of the manifest, whatever the order in which slides were done, failed ones among them."""
    monkeypatch.setattr(predicting, "Classifier", Instant)
    monkeypatch.setattr(predicting, "_PIECE", 64)
    numbers = random.Random(1).sample(range(1000), 1000)
    entries = [Entry(slide_id=str(n), path=f"s3://b/{n}", label="bar", extra={"site": f"s{n % 3}"}) for n in numbers]
    predict(entries[::3], finished, tmp_path)
    rows = predict(entries, finished, tmp_path)
    assert rows == read_predictions(tmp_path)
    assert rows.column("slide_id") == [str(number) for number in numbers]
    assert rows.column("site") == [f"s{number % 3}" for number in numbers]
    for number, row in zip(numbers, rows, strict=True):
        odd = number % 10 == 7
        assert (row["status"], row["error"]) == (("failed", f"{number} is odd") if odd else ("ok", ""))
        assert row["prob_bar"] == (None if odd else number / 1e4)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [line["slide_id"] for line in csv.DictReader(file)] == [str(number) for number in numbers]
    assert parquet.read_metadata(tmp_path / "predictions.parquet").num_row_groups == 16


def test_further_columns_may_come_late(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "Classifier", Instant)
    monkeypatch.setattr(predicting, "_PIECE", 2)
    sites = [{}, {}, {}, {"site": "a"}]
    entries = [Entry(slide_id=str(i), path=f"s3://b/{i}", extra=site) for i, site in enumerate(sites)]
    assert predict(entries, finished, tmp_path).column("site") == [None, None, None, "a"]


def test_rows_are_those_of_the_file_that_was_opened(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "Classifier", Instant)
    entries = [Entry(slide_id=str(number), path=f"s3://b/{number}") for number in range(5)]
    rows = predict(entries, finished, tmp_path)
    predict(entries[1:2], finished, tmp_path)
    assert rows.column("slide_id") == ["0", "1", "2", "3", "4"]
    with pytest.raises(KeyError, match="colour"):
        rows[0]["colour"]
    assert rows[-1]["slide_id"] == "4"
    assert [row["slide_id"] for row in rows[1:3]] == ["1", "2"]
    assert "slide_id" in repr(rows)
    assert repr(rows[0]) == repr(dict(rows[0]))
