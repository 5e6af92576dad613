"""Interrupted, repeated and competing conversions."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from storage import (
    ConversionError,
    ConvertOptions,
    CorruptImageError,
    MissingImageError,
    Slide,
    convert,
    write_pyramid,
)

from .conftest import contents


def interrupted(after, error):
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) > after + 1:  # the first says what was there before
            raise error

    return progress


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 7, 15, 23])
def test_rerun_after_an_interrupt_equals_a_clean_run(clean, tmp_path, small, after, workers):
    source, expected = clean
    with pytest.raises(KeyboardInterrupt):
        convert(
            source,
            tmp_path / "p.zarr",
            options=small,
            workers=workers,
            progress=interrupted(after, KeyboardInterrupt()),
        )
    assert not (tmp_path / "p.zarr").exists()
    report = convert(source, tmp_path / "p.zarr", options=small, workers=workers)
    assert report.shards_reused >= after + 1
    assert contents(tmp_path / "p.zarr") == expected
    assert not (tmp_path / "p.zarr.partial").exists()


def test_damaged_shards_of_an_earlier_run_are_not_trusted(clean, tmp_path, small):
    source, expected = clean
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "p.zarr", options=small, workers=1, progress=interrupted(10, KeyboardInterrupt()))
    partial = tmp_path / "p.zarr.partial"
    shards = [p for p in sorted(partial.rglob("*")) if p.is_file() and "/c/" in str(p)]
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    flipped = bytearray(shards[2].read_bytes())
    flipped[3] ^= 1
    shards[2].write_bytes(flipped)
    (shards[3].parent / "9.77.tmp").write_bytes(b"left over")
    with open(partial / "journal.jsonl", "ab") as journal:
        journal.write(b'{"level": 0, "y"')
    report = convert(source, tmp_path / "p.zarr", options=small)
    assert report.shards_reused == 11 - 3
    assert contents(tmp_path / "p.zarr") == expected


def test_another_source_or_other_options_start_anew(clean, tiff, tmp_path, small):
    source, _ = clean
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "p.zarr", options=small, workers=1, progress=interrupted(5, KeyboardInterrupt()))
    other = ConvertOptions(codec="zstd", chunk=16, shard=64, min_level_size=8)
    assert convert(source, tmp_path / "p.zarr", options=other).shards_reused == 0


def test_same_source_again_is_up_to_date(clean, tmp_path, small):
    source, _ = clean
    before = contents(tmp_path / "clean/p.zarr")
    report = convert(source, tmp_path / "clean/p.zarr", options=small)
    assert report.up_to_date
    assert report.mpp is None
    assert contents(tmp_path / "clean/p.zarr") == before


def test_other_contents_are_replaced_only_if_asked(clean, tmp_path, small, textured):
    source, _ = clean
    target = tmp_path / "clean/p.zarr"
    with pytest.raises(ConversionError, match="other options"):
        convert(source, target)
    with pytest.raises(ConversionError, match="another source"):
        write_pyramid(target, textured((1, 9, 9)))
    write_pyramid(target, textured((1, 9, 9)), overwrite=True)
    with Slide(target) as slide:
        assert slide.shape_yx == (9, 9)
    assert [p.name for p in target.parent.iterdir()] == ["p.zarr"]


def test_a_target_that_is_no_pyramid_is_not_touched(clean, tmp_path, small):
    source, _ = clean
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/keep.txt").write_text("x")
    with pytest.raises(ConversionError, match="not a sound pyramid"):
        convert(source, tmp_path / "notes", options=small)
    assert (tmp_path / "notes/keep.txt").read_text() == "x"


def test_a_damaged_target_can_be_replaced(clean, tmp_path, small):
    source, expected = clean
    convert(source, tmp_path / "p.zarr", options=small)
    (tmp_path / "p.zarr/zarr.json").write_bytes(b"{")
    with pytest.raises(ConversionError, match="not a sound pyramid"):
        convert(source, tmp_path / "p.zarr", options=small)
    convert(source, tmp_path / "p.zarr", options=small, overwrite=True)
    assert contents(tmp_path / "p.zarr") == expected


def test_a_second_converter_is_refused(clean, tmp_path, small):
    source, _ = clean
    refused = []

    def progress(done, total):
        if not refused:
            with pytest.raises(ConversionError, match="another conversion") as error:
                convert(source, tmp_path / "p.zarr", options=small)
            refused.append(error)

    convert(source, tmp_path / "p.zarr", options=small, workers=1, progress=progress)
    assert refused
    assert convert(source, tmp_path / "p.zarr", options=small).up_to_date


SLOWLY = """
import sys, time
from storage import ConvertOptions, convert
options = ConvertOptions(chunk=16, shard=64, min_level_size=8)
convert(*sys.argv[1:], options=options, workers=1, progress=lambda *_: time.sleep(0.01))
"""


def test_killed_and_run_again_equals_a_clean_run(clean, tmp_path, small):
    source, expected = clean
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, source, tmp_path / "p.zarr"])
    journal = tmp_path / "p.zarr.partial/journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 6):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    report = convert(source, tmp_path / "p.zarr", options=small)
    assert report.shards_reused >= 6
    assert contents(tmp_path / "p.zarr") == expected


def test_two_processes_make_one_pyramid(clean, tmp_path, small):
    source, expected = clean
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        results = [pool.apply_async(convert, (source, tmp_path / "p.zarr"), {"options": small}) for _ in range(2)]
        outcomes = []
        for result in results:
            try:
                outcomes.append(result.get(60).up_to_date)
            except ConversionError:
                outcomes.append("refused")
    assert outcomes.count(False) == 1
    assert contents(tmp_path / "p.zarr") == expected


def test_full_disk_is_a_conversion_error_and_resumable(clean, tmp_path, small, monkeypatch):
    source, expected = clean
    flush, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        flush(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConversionError, match="No space left"):
        convert(source, tmp_path / "p.zarr", options=small, workers=1)
    assert not (tmp_path / "p.zarr").exists()
    monkeypatch.undo()
    assert convert(source, tmp_path / "p.zarr", options=small).shards_reused > 0
    assert contents(tmp_path / "p.zarr") == expected


def test_unwritable_places_are_found_before_any_work(clean, tmp_path, small, monkeypatch):
    source, _ = clean
    monkeypatch.setattr("storage.conversion.converter.build", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(source, tmp_path / "file/p.zarr", options=small)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConversionError, match="Permission denied"):
        convert(source, tmp_path / "p.zarr", options=small)


def test_missing_source_leaves_no_trace(tmp_path):
    with pytest.raises(MissingImageError, match="does not exist"):
        convert(tmp_path / "no.tif", tmp_path / "p.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_cut_short_loses_its_last_shard_only(clean, tmp_path, small):
    source, expected = clean
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "p.zarr", options=small, progress=interrupted(9, KeyboardInterrupt()))
    journal = tmp_path / "p.zarr.partial/journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines)[:-5])
    assert convert(source, tmp_path / "p.zarr", options=small).shards_reused == len(lines) - 2
    assert contents(tmp_path / "p.zarr") == expected


@pytest.mark.parametrize("strips", [False, True])
def test_of_a_damaged_source_nothing_is_left(tmp_path, textured, strips):
    """It would not be better the next time; what is interrupted is kept instead."""
    settings = {"rowsperstrip": 80} if strips else {"tile": (32, 32)}
    pixels = textured((3, 200, 200)).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", compression="deflate", **settings)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        offset, count = tif.pages[0].dataoffsets[-1], tif.pages[0].databytecounts[-1]
    with open(tmp_path / "x.tif", "r+b") as file:
        file.seek(offset + count // 2)
        file.write(bytes(8))
    with pytest.raises(CorruptImageError, match=r"x\.tif: (tile|strip) .* does not decode as deflate; copy"):
        convert(tmp_path / "x.tif", tmp_path / "p.zarr", options=ConvertOptions(chunk=16, shard=64), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tif"]


def test_a_source_that_changes_meanwhile_is_noticed(clean, tmp_path, small):
    source, _ = clean
    calls = []

    def progress(done, total):
        if not calls:
            os.utime(source, ns=(1, 1))
        calls.append(done)

    with pytest.raises(ConversionError, match="changed while"):
        convert(source, tmp_path / "p.zarr", options=small, progress=progress)
    assert not (tmp_path / "p.zarr").exists()
    convert(source, tmp_path / "p.zarr", options=small)
    with Slide(tmp_path / "p.zarr") as slide, Slide(tmp_path / "clean/p.zarr") as other:
        assert (slide.read(0, (0, 0, 300, 200)) == other.read(0, (0, 0, 300, 200))).all()


def test_what_the_disk_did_not_keep_is_found_before_the_end(clean, tmp_path, small):
    source, _ = clean
    for spoil in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-30]), damage):

        def progress(done, total, spoil=spoil):
            if done == total:
                spoil(tmp_path / "p.zarr.partial/0/c/0/1/1")

        with pytest.raises(CorruptImageError, match="damaged after it was written"):
            convert(source, tmp_path / "p.zarr", options=small, progress=progress)
        assert not (tmp_path / "p.zarr").exists()


def damage(shard):
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)


def test_a_damaged_pyramid_is_not_up_to_date_and_is_made_again_if_asked(clean, tmp_path, small):
    source, expected = clean
    convert(source, tmp_path / "p.zarr", options=small)
    (tmp_path / "p.zarr/0/c/0/1/1").unlink()
    with pytest.raises(ConversionError, match="is damaged, 0/c/0/1/1; ask to overwrite"):
        convert(source, tmp_path / "p.zarr", options=small)
    assert not convert(source, tmp_path / "p.zarr", options=small, overwrite=True).up_to_date
    assert contents(tmp_path / "p.zarr") == expected


@pytest.mark.parametrize("place", ["p.zarr", "p.zarr.partial"])
def test_files_of_others_are_never_deleted(clean, tmp_path, small, place):
    source, _ = clean
    convert(source, tmp_path / "p.zarr", options=small)
    (tmp_path / place / "x").mkdir(parents=True)
    (tmp_path / place / "x/thesis.doc").write_text("mine")
    with pytest.raises(ConversionError, match=r"holds x/thesis\.doc"):
        convert(source, tmp_path / "p.zarr", options=small, overwrite=True)
    assert (tmp_path / place / "x/thesis.doc").read_text() == "mine"


def test_a_file_or_link_in_the_place_of_a_pyramid_stays(clean, tmp_path, small):
    source, _ = clean
    convert(source, tmp_path / "real.zarr", options=small)
    (tmp_path / "file.zarr").write_text("mine")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "real.zarr")
    for name in ("file.zarr", "link.zarr"):
        with pytest.raises(ConversionError, match="a file or a link"):
            convert(source, tmp_path / name, options=small, overwrite=True)
    assert (tmp_path / "file.zarr").read_text() == "mine"
    assert (tmp_path / "link.zarr").is_symlink()


def test_an_old_pyramid_comes_back_where_the_new_one_cannot_be_named(clean, tmp_path, small, monkeypatch):
    source, _ = clean
    write_pyramid(tmp_path / "p.zarr", np.ones((1, 9, 9), np.uint8), options=small)
    before, rename, calls = contents(tmp_path / "p.zarr"), os.rename, []

    def second_fails(*places):
        calls.append(places)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(*places)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ConversionError, match="writing failed"):
        convert(source, tmp_path / "p.zarr", options=small, overwrite=True)
    assert contents(tmp_path / "p.zarr") == before


def test_leftovers_of_a_kill_at_the_very_end_are_swept(clean, tmp_path, small):
    source, expected = clean
    convert(source, tmp_path / "p.zarr", options=small)
    (tmp_path / "p.zarr.replaced").mkdir()
    (tmp_path / "p.zarr.partial.lock").touch()
    assert convert(source, tmp_path / "p.zarr", options=small).up_to_date
    assert contents(tmp_path / "p.zarr") == expected
    assert sorted(path.name for path in tmp_path.glob("p.*")) == ["p.zarr"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("strips", [False, True])
def test_stopped_at_every_write_and_run_again_equals_a_clean_run(tmp_path, textured, strips, how):
    settings = {"rowsperstrip": 80, "compression": "zstd"} if strips else {"tile": (32, 32)}
    pixels = textured((3, 100, 80)).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="rgb", **settings)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "tests/storage/kill_loop.py", how, tmp_path / "image.tif", tmp_path / "work"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    stops, reused = map(int, done.stdout.split())
    assert stops > 60
    assert reused > stops // 2


def test_a_pyramid_that_may_not_be_read_is_not_called_damaged(clean, tmp_path, small, monkeypatch):
    source, _ = clean

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os.path, "getsize", refuse)
    with pytest.raises(ConversionError, match="0/c/0/0/0: cannot be read .Permission denied.; check its permissions"):
        convert(source, tmp_path / "clean/p.zarr", options=small)
