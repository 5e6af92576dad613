"""Pyramids written to an object store that is slow, fails, forgets to answer, and is shared with others."""

import json
import pickle
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from itertools import count

import google_crc32c
import numpy as np
import pytest

from storage import ConversionError, CorruptImageError, Slide, StorageError, TransferError, convert, write_pyramid
from storage.conversion.object_target import ObjectPartial
from storage.conversion.receipts import Receipt
from storage.place import retry
from storage.place.remote_store import RemoteStore

from .s3 import ATTEMPTS, Fault

PLACES = [(0, y, x) for y in range(3) for x in range(2)] + [(1, y, 0) for y in range(2)]
BLANK = (0, 2, 1)
INDEX_BYTES = 20
FILES = {"zarr.json": b"{root}", "0/zarr.json": b"{0}", "1/zarr.json": b"{1}"}
JOB = {"source": "a"}
OTHER = {"source": "b"}


def shard(job, place):
    """Bytes that end like those of a shard: with something and its checksum."""
    data = np.random.default_rng([ord(job["source"]), *place]).bytes(100)
    return data + google_crc32c.value(data[-16:]).to_bytes(4, "little")


def make(partial, job, place):
    if place == BLANK:
        return Receipt(*place, 0, 0, 0)  # type: ignore[call-arg]
    data = shard(job, place)
    key = Receipt(*place, 1, 0, 0).key  # type: ignore[call-arg]
    tag = partial.output.put(key, [data[:7], data[7:]], if_absent=True)
    return Receipt(*place, len(data), zlib.crc32(data), google_crc32c.value(data[-20:-4]), tag)  # type: ignore[call-arg]


def drive(url, job=JOB, stop_after=None):
    """Write a pyramid of ``job`` as the converter does, and return how many shards an earlier run has spared it."""
    with ObjectPartial.open(url) as partial:
        receipts = partial.resume(job)
        done = {(r.level, r.y, r.x) for r in receipts}
        for number, place in enumerate(place for place in PLACES if place not in done):
            if number == stop_after:
                raise KeyboardInterrupt
            receipts.append(make(partial, job, place))
            partial.record(receipts[-1:])
        partial.verify(receipts, INDEX_BYTES)
        partial.commit(FILES, overwrite=False)
    return len(done)


def whole(job=JOB):
    """All objects of the finished pyramid."""
    return {Receipt(*p, 1, 0, 0).key: shard(job, p) for p in PLACES if p != BLANK} | FILES


def die(partial):
    """Stop as a killed process does: nothing is written any more, nothing let go of."""
    partial._lease.stop()


@pytest.fixture
def url(s3):
    return f"{s3.url}/folder/p.zarr"


@pytest.fixture
def objects(s3):
    """Objects at the place of the pyramid and beside it."""
    return lambda: s3.objects("folder/p.zarr"), lambda: s3.objects("folder/p.zarr.partial")


@pytest.fixture
def brief(monkeypatch):
    """A lease so brief that one can wait for its end, and that of the second which the store's clock may be off."""
    monkeypatch.setattr("storage.place.lease.LEASE_S", 0.5)


def drive_when_free(url, job=JOB):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(ConversionError):
            return drive(url, job)
        time.sleep(0.1)
    return drive(url, job)


def test_a_pyramid_is_whole_and_nothing_else_is_left(url, objects):
    target, state = objects
    assert drive(url) == 0
    assert target() == whole()
    assert state() == {}


def test_output_reads_back_what_it_wrote_also_when_pickled(s3, url):
    output = RemoteStore(url)
    tag = output.put("0/c/0/0/0", [b"ab", b"c"], if_absent=True)
    again = pickle.loads(pickle.dumps(output))
    assert again.get("0/c/0/0/0", 3) == b"abc"
    assert again.put("0/c/0/0/0", [b"abc"], if_absent=True) == tag  # a task that is run twice
    with pytest.raises(ConversionError, match=f"{url}/0/c/0/0/0: another conversion"):
        again.put("0/c/0/0/0", [b"abd"], if_absent=True)
    assert output.get("0/c/0/0/0", 3) == b"abc"


def test_large_objects_are_one_put(s3, url):
    data = bytes(20 * 2**20)
    RemoteStore(url, 60.0, retry.WRITING).put("0/c/0/0/0", [data], if_absent=True)
    assert len(s3.puts()) == 1
    assert s3.objects("folder/p.zarr") == {"0/c/0/0/0": data}


@pytest.mark.parametrize("kind", ["500", "503", "close", "lost", "cut"])
def test_passing_faults_of_every_kind_are_absorbed(s3, url, objects, kind, monkeypatch):
    monkeypatch.setattr("storage.place.remote_store.CONCURRENCY", 1)  # so that no request has all the bad luck
    target, state = objects
    for method in ("PUT", "GET", "POST"):
        s3.proxy.faults += [Fault(kind, method, skip=skip) for skip in range(0, 90, 2)]
    drive(url)
    assert sum(fault.times == 0 for fault in s3.proxy.faults) >= 20  # every second request
    assert target() == whole()
    assert state() == {}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "partial/lock"),
        ("PUT", "partial/journal"),
        ("PUT", "p.zarr/0/c/0/1/0"),
        ("PUT", "p.zarr/zarr.json"),
        ("GET", "list-type"),
        ("GET", "p.zarr/0/c/0/1/0"),
        ("POST", "delete"),
    ],
)
def test_late_answers_are_absorbed(s3, url, objects, method, path):
    target, state = objects
    s3.fail("delay", method=method, path=path)
    drive(url)
    assert s3.proxy.faults[0].times == 0
    assert target() == whole()
    assert state() == {}


def test_a_store_that_stays_away_is_an_error_that_names_the_object(s3, url, objects):
    s3.fail("503", path="p.zarr/0/c/0/1/0", times=99)
    with pytest.raises(TransferError, match=f"{url}/0/c/0/1/0: the request failed .*503"):
        drive(url)
    assert "zarr.json" not in objects[0]()
    s3.heal()
    assert drive(url) == 2


def test_a_store_that_never_comes_back_in_this_run(s3, url, objects, brief):
    target, state = objects
    for number in (1, 4, 14):
        s3.fail("close", skip=number, times=float("inf"))
        with pytest.raises(StorageError):
            drive(url)
        s3.heal()
        assert "zarr.json" not in target()
        drive_when_free(url)
        assert target() == whole()
        assert state() == {}
        s3.clear()


@pytest.mark.parametrize("after", [0, 1, 5, len(PLACES) - 1])
def test_an_interrupted_run_is_gone_on_with_at_once(s3, url, objects, after):
    with pytest.raises(KeyboardInterrupt):
        drive(url, stop_after=after)
    s3.proxy.log.clear()
    assert drive(url) == after
    assert objects[0]() == whole()
    assert sum("/c/0/" in path for path in s3.puts()) <= len(PLACES) - after


def test_many_receipts_take_few_puts(s3, url, monkeypatch):
    monkeypatch.setattr("storage.conversion.partial.BATCH_S", 1e9)
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        for number in range(40):
            partial.record([Receipt(0, number, 0, 0, 0, 0)])
    with ObjectPartial.open(url) as partial:
        assert len(partial.resume(JOB)) == 40
        partial.discard()
    assert sum("journal" in path for path in s3.puts()) == 5  # begun, 16, 16, 8; one for the second run


def test_objects_that_changed_are_not_trusted(s3, url, objects):
    with pytest.raises(KeyboardInterrupt):
        drive(url, stop_after=6)
    keys = [Receipt(*place, 1, 0, 0).key for place in PLACES[:5]]
    s3.put(f"folder/p.zarr/{keys[0]}", bytes(104))
    s3.put(f"folder/p.zarr/{keys[1]}", shard(JOB, PLACES[1]) + b"x")
    s3.put("folder/p.zarr/0/c/0/2/1", b"where nothing is to be")
    s3.direct.delete(f"folder/p.zarr/{keys[2]}")
    assert drive(url) == 2
    assert objects[0]() == whole()


def test_another_job_starts_anew(s3, url, objects):
    target, state = objects
    with pytest.raises(KeyboardInterrupt):
        drive(url, OTHER, stop_after=5)
    assert drive(url) == 0
    assert target() == whole()
    assert state() == {}


def test_a_pyramid_that_is_replaced_loses_its_root_first(s3, url, objects):
    target, state = objects
    drive(url, OTHER)
    s3.fail("500", method="POST", skip=1, times=ATTEMPTS)  # the second delete of the run
    with pytest.raises(TransferError):
        drive(url)
    s3.heal()
    assert target() == {key: data for key, data in whole(OTHER).items() if key != "zarr.json"}
    drive(url)
    assert target() == whole()
    assert state() == {}


@pytest.mark.parametrize(
    "others", [{"notes.txt": b"x"}, {"0/c/0/0/0": b"x"}, {"zarr.json": b"x", "a/zarr.json": b"x"}]
)
def test_what_no_converter_wrote_is_not_touched(s3, url, objects, others):
    target, _ = objects
    for key, data in others.items():
        s3.put(f"folder/p.zarr/{key}", data)
    with pytest.raises(ConversionError, match="belongs to no pyramid of ours"):
        drive(url)
    assert target() == others


def test_neighbours_are_not_touched(s3, url, objects):
    neighbours = {"p.zarr.txt": b"1", "p.zarr2/zarr.json": b"2", "p.zarr.partial/journal.txt": b"3"}
    for key, data in neighbours.items():
        s3.put(f"folder/{key}", data)
    drive(url)
    s3.clear("folder/p.zarr")
    assert s3.objects("folder") == neighbours


def test_a_second_converter_is_refused(url, objects):
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        with pytest.raises(
            ConversionError, match=r"is running \(process \d+ on .*\); if it was killed, run again in 6"
        ):
            drive(url, OTHER)
        partial.record([make(partial, JOB, PLACES[0])])
    assert drive(url) == 1
    assert objects[0]() == whole()


def test_of_many_at_once_one_gets_the_lock(s3, url, objects):
    barrier, outcomes = threading.Barrier(6), []

    def attempt():
        barrier.wait()
        try:
            with ObjectPartial.open(url) as partial:
                outcomes.append("won")
                barrier.wait()
                partial.discard()
        except ConversionError:
            outcomes.append("refused")
            barrier.wait()

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 5 + ["won"]
    assert objects[1]() == {}


def test_a_lock_is_kept_as_long_as_its_holder_lives(s3, url, objects, brief):
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        deadline = time.monotonic() + 2.5  # of the store's clock more than a step and a lease
        while time.monotonic() < deadline:
            with pytest.raises(ConversionError, match="is running"):
                drive(url)
        partial.record([make(partial, JOB, PLACES[0])])
    assert drive(url) == 1


def test_the_lock_of_a_dead_converter_is_taken_over(s3, url, objects, brief):
    target, state = objects
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        partial.record([make(partial, JOB, place) for place in PLACES[:4]])
        partial.flush()
        make(partial, JOB, PLACES[4])  # put, but not in the journal
        die(partial)
        assert drive_when_free(url) == 4
        assert target() == whole()
    assert target() == whole()
    assert state() == {}


@pytest.mark.parametrize("job", [JOB, OTHER])
def test_a_converter_that_slept_through_its_lease_does_no_harm(s3, url, objects, brief, job):
    target, state = objects
    with ObjectPartial.open(url) as sleeper:
        sleeper.resume(job)
        receipts = [make(sleeper, job, PLACES[0])]
        sleeper.record(receipts)
        die(sleeper)
        drive_when_free(url)
        with suppress(ConversionError):  # of the same job it finds its own bytes
            make(sleeper, job, PLACES[1])
        with pytest.raises(ConversionError, match="has taken over"):
            sleeper.record(receipts)
        with pytest.raises(ConversionError, match="has taken over"):
            sleeper.discard()
        with pytest.raises(ConversionError, match="has taken over"):
            sleeper.commit(FILES | {"0/zarr.json": whole()["0/zarr.json"]}, overwrite=True)
    assert target() == whole()
    assert state() == {}


def test_a_converter_that_slept_alone_goes_on(url, objects, brief):
    with ObjectPartial.open(url) as partial:
        receipts = partial.resume(JOB)
        die(partial)
        time.sleep(0.6)  # longer than its lease
        receipts = [make(partial, JOB, place) for place in PLACES]
        partial.record(receipts)
        partial.verify(receipts, INDEX_BYTES)
        partial.commit(FILES, overwrite=False)
    assert objects[0]() == whole()
    assert objects[1]() == {}


def test_a_converter_stops_when_its_lock_was_taken(s3, url, objects, monkeypatch):
    monkeypatch.setattr("storage.place.lease.RENEWALS", 600)
    thief = json.dumps({"holder": "thief", "token": "t"}).encode()
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        s3.put("folder/p.zarr.partial/lock", thief)
        partial._lease._thread.join(10)  # it has ended, as it has found out
        with pytest.raises(ConversionError, match="thief has taken over"):
            partial.record([])
        with pytest.raises(ConversionError, match="thief has taken over"):
            partial.commit(FILES, overwrite=True)
    assert "zarr.json" not in objects[0]()
    assert objects[1]()["lock"] == thief


def test_a_renewal_whose_answer_is_lost_does_not_lose_the_lock(s3, url, monkeypatch):
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        for times in (1, ATTEMPTS):
            s3.fail("lost", path="lock", times=times)
            with suppress(TransferError):
                partial._lease.renew()
            s3.heal()
            partial._lease.renew()
        partial._lease.check()


def test_a_renewal_that_meets_another_put_in_flight_is_made_again(s3, url):
    with ObjectPartial.open(url) as partial:
        s3.fail("409", path="lock", times=2)
        partial._lease.renew()
        assert s3.proxy.faults[0].times == 0
        partial._lease.check()


def test_leftovers_of_a_kill_after_the_root_was_written(s3, url, objects, brief):
    target, state = objects
    s3.fail("500", method="POST", times=99)  # deletes
    drive(url)
    assert target() == whole()
    assert state()
    s3.heal()
    deadline = time.monotonic() + 20
    while state() and time.monotonic() < deadline:
        ObjectPartial.sweep(url)
        time.sleep(0.1)
    assert state() == {}
    assert target() == whole()


def test_discard_leaves_nothing_but_what_is_whole(s3, url, objects):
    target, state = objects
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        partial.record([make(partial, JOB, PLACES[0])])
        partial.discard()
    assert target() == state() == {}
    drive(url)
    with ObjectPartial.open(url) as partial:
        partial.discard()
    assert target() == whole()
    assert state() == {}


@pytest.mark.parametrize("damage", ["missing", "other", "extra", "index"])
def test_verification_finds(s3, url, objects, damage):
    with ObjectPartial.open(url) as partial:
        partial.resume(JOB)
        receipts = [make(partial, JOB, place) for place in PLACES]
        partial.verify(receipts, INDEX_BYTES)
        key = f"folder/p.zarr/{receipts[1].key}"
        if damage == "missing":
            s3.direct.delete(key)
        elif damage == "other":
            s3.put(key, bytes(104))
        elif damage == "extra":
            s3.put("folder/p.zarr/0/c/0/2/1", b"x")
        else:
            receipts[1] = Receipt(**{f: getattr(receipts[1], f) for f in Receipt.__slots__} | {"index_crc32c": 1})
        with pytest.raises(CorruptImageError, match=f"{url}/0/c/0/{'2/1' if damage == 'extra' else '0/1'}: "):
            partial.verify(receipts, INDEX_BYTES)


@pytest.mark.parametrize("skip", [1, 2])
def test_a_store_that_ignores_conditions_is_refused(s3, url, objects, skip):
    s3.fail("unconditional", skip=skip, times=99)  # If-None-Match is tried second, If-Match third
    with pytest.raises(ConversionError, match="ignores conditions"):
        drive(url)
    assert objects[0]() == {}


def test_places_that_cannot_be_written(s3):
    with pytest.raises(ConversionError, match="is a bucket"):
        drive(s3.url + "/")
    with pytest.raises(ConversionError, match=r"nobucket.*the store refuses.*bucket does not exist|404"):
        drive("s3://nobucket/p.zarr")
    with pytest.raises(ConversionError, match="the store refuses"):
        drive(f"http://127.0.0.1:{s3.proxy.server_address[1]}/p.zarr")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def local(tiff, tmp_path, small):
    """A TIFF, and the files of its local pyramid of the same name."""
    source, pixels = tiff(100, 90)
    (tmp_path / "clean").mkdir()
    target = tmp_path / "clean/p.zarr"
    convert(source, target, options=small)
    return source, pixels, files(target)


def test_convert_writes_to_a_store_what_it_writes_to_a_folder(s3, url, objects, local, small):
    source, pixels, expected = local
    report = convert(source, url, options=small)
    assert report.target == url
    assert report.shards_reused == 0
    assert objects[0]() == expected
    assert objects[1]() == {}
    with Slide(url) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, *slide.shape_yx)), pixels)
    s3.proxy.log.clear()
    assert convert(source, url, options=small).up_to_date
    assert s3.puts() == []


def test_processes_write_to_a_store(url, objects, tiff, tmp_path, small):
    source, _ = tiff(200, 150)
    convert(source, tmp_path / "p.zarr", options=small)
    convert(source, url, options=small, executor="processes", workers=2)
    assert objects[0]() == files(tmp_path / "p.zarr")
    assert objects[1]() == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["503", "lost"])
def test_convert_where_one_put_fails_for_good(s3, url, objects, local, small, kind):
    source, _, expected = local
    for number in count():
        s3.fail(kind, skip=number, times=ATTEMPTS)
        with suppress(StorageError):
            convert(source, url, options=small, workers=1)
        missed = s3.proxy.faults[0].times == ATTEMPTS
        s3.heal()
        target = objects[0]()
        assert "zarr.json" not in target or target == expected
        convert(source, url, options=small, workers=1)
        assert objects[0]() == expected
        assert objects[1]() == {}
        s3.clear()
        if missed:
            break
    assert number > len(expected)


KILLED = """
import os, signal, sys
import storage.place.lease, storage.conversion.object_target
from storage import ConvertOptions, convert
storage.place.lease.LEASE_S, storage.conversion.object_target.ObjectPartial.batch = 0.5, 1
options = ConvertOptions(chunk=16, shard=64, min_level_size=8)
calls = []
def progress(*_):
    calls.append(_)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
convert(*sys.argv[1:], options=options, workers=1, progress=progress)
"""


def test_a_killed_conversion_is_taken_over(url, objects, local, small):
    source, _, expected = local
    assert subprocess.run([sys.executable, "-c", KILLED, source, url], check=False, timeout=60).returncode == -9
    assert "zarr.json" not in objects[0]()
    deadline = time.monotonic() + 20
    while True:
        try:
            report = convert(source, url, options=small)
            break
        except ConversionError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert report.shards_reused > 0
    assert objects[0]() == expected
    assert objects[1]() == {}


def test_other_pyramids_are_replaced_only_if_asked(url, objects, local, small, textured):
    source, _, expected = local
    write_pyramid(url, textured((1, 99, 9)), options=small)
    before = objects[0]()
    with pytest.raises(ConversionError, match="another source or other options"):
        convert(source, url, options=small)
    assert objects[0]() == before
    convert(source, url, options=small, overwrite=True)
    assert objects[0]() == expected
    assert objects[1]() == {}


FOREIGN = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'


@pytest.mark.parametrize("root", [b"{", FOREIGN])
def test_the_root_of_something_else_is_replaced_only_if_asked(s3, url, objects, local, small, root):
    source, _, expected = local
    s3.put("folder/p.zarr/zarr.json", root)
    s3.put("folder/p.zarr/0/zarr.json", b"{}")
    with pytest.raises(ConversionError):
        convert(source, url, options=small)
    assert objects[0]() == {"zarr.json": root, "0/zarr.json": b"{}"}
    convert(source, url, options=small, overwrite=True)
    assert objects[0]() == expected


def test_a_web_server_is_no_target(tiff, small):
    path, _ = tiff(40, 50)
    with pytest.raises(ConversionError, match="http and https can only be read; write to a folder, s3://"):
        convert(path, "http://127.0.0.1:1/p.ome.zarr", options=small)
