"""The words of the progress line; the tests have their own clock."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pipeline import progress as module
from pipeline.live import live_view, per_time
from pipeline.progress import SlideProgress, progress, progress_line


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    monotonic = __call__


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 4, 100, "convert: 0% a"),
        (1, 4, 4, "convert: 25% a"),  # too early to say
        (1, 4, 10, "convert: 25% a, 30 s left"),
        (1, 4, 60, "convert: 25% a, 3 min left"),
        (0.5, 4, 3600, "convert: 12% a, 7.0 h left"),
        (4, 4, 3600, "convert: 100% a"),
    ],
)
def test_line(done, total, seconds, text):
    assert progress_line("convert", done, total, "a", seconds) == text


def test_line_without_words():
    assert progress_line("train", 1, 2, "", 10) == "train: 50%, 10 s left"


def test_time_left_does_not_count_what_an_earlier_run_has_done():
    assert progress_line("train", 75, 100, "", 10, before=50) == "train: 75%, 10 s left"


@pytest.mark.parametrize(
    ("number", "text"), [(12.34, "12.3 slides/s"), (0.05, "3 slides/min"), (0.001, "3.6 slides/h"), (0, "0 slides/h")]
)
def test_per_time(number, text):
    assert per_time(number, "slides") == text


class TestSlideProgress:
    @pytest.fixture
    def shown(self):
        return []

    @pytest.fixture
    def slides(self, clock, shown):
        return SlideProgress(lambda *values: shown.append(values), 2, clock)

    def test_counts_slides_and_their_parts(self, slides, shown):
        slides.begin("a")
        slides.on_bytes(0, 100)
        slides.on_bytes(25, 100)
        slides.end()
        slides.begin("b")
        slides.on_bytes(0, 100)
        slides.end()
        assert [done for done, _, _ in shown] == [0, 0.25, 1, 1, 2]
        assert {total for _, total, _ in shown} == {2}
        assert [words for _, _, words in shown[1:4]] == ["a (1/2)", "a (1/2)", "b (2/2)"]

    def test_what_was_there_before_is_no_work(self, clock, slides, shown):
        """Slide a was up to date, three quarters of b were there: a quarter of a slide is left."""
        clock.now = 1
        slides.begin("a")
        slides.end()
        slides.begin("b")
        slides.on_bytes(300_000_000, 400_000_000)
        clock.now = 10
        slides.on_bytes(350_000_000, 400_000_000)
        assert shown == [(0, 1, "a (1/2)"), (0, 0.25, "b (2/2)"), (0.125, 0.25, "b (2/2), 5 MB/s")]
        assert progress_line("convert", *shown[-1], clock.now) == "convert: 50% b (2/2), 5 MB/s, 10 s left"  # type: ignore[call-arg]
        slides.on_bytes(400_000_000, 400_000_000)
        slides.end()
        assert shown[-1][:2] == (0.25, 0.25)

    def test_nothing_to_do(self, slides, shown):
        for name in "ab":
            slides.begin(name)
            slides.end()
        assert [values[:2] for values in shown] == [(0, 1), (2, 2)]

    def test_throughput_goes_over_slides(self, clock, slides, shown):
        slides.begin("a")
        slides.on_bytes(0, 100_000_000)
        clock.now = 2
        slides.on_bytes(100_000_000, 100_000_000)
        slides.end()
        slides.begin("b")
        slides.on_bytes(0, 40_000_000)
        clock.now = 4
        slides.on_bytes(20_000_000, 40_000_000)
        assert [words for _, _, words in shown] == [
            *("a (1/2)", "a (1/2), 50 MB/s", "a (1/2), 50 MB/s"),
            *("b (2/2), 50 MB/s", "b (2/2), 30 MB/s"),
        ]

    def test_throughput_is_that_of_late(self, clock, slides, shown):
        slides.begin("a")
        for second in range(1, 200):
            clock.now = second
            slides.on_bytes(min(second, 100) * 10_000_000 + max(second - 100, 0) * 1_000_000, 10**10)
        assert "10 MB/s" in shown[50][2]
        assert "1 MB/s" in shown[-1][2]

    def test_an_empty_image_divides_by_nothing(self, slides, shown):
        slides.begin("a")
        slides.on_bytes(0, 0)
        assert shown == [(0, 2, "a (1/2)")]


class TestLines:
    """This is the case where standard error is no terminal."""

    def test_one_at_intervals_and_one_at_the_end(self, clock, monkeypatch, capsys):
        monkeypatch.setattr(module, "time", clock)
        with progress("convert") as update:
            for second in range(41):
                clock.now = float(second)
                update(second, 40, f"slide-{second}")
            update(40, 40, "slide-40")
        assert capsys.readouterr().err.splitlines() == [
            "convert: 25% slide-10, 30 s left",
            "convert: 50% slide-20, 20 s left",
            "convert: 75% slide-30, 10 s left",
            "convert: 100% slide-40",
        ]

    def test_a_run_that_goes_on_counts_from_where_it_began(self, clock, monkeypatch, capsys):
        monkeypatch.setattr(module, "time", clock)
        with progress("train") as update:
            update(50, 100, "")
            clock.now = 10.0
            update(60, 100, "")
        assert capsys.readouterr().err == "train: 60%, 40 s left\n"


def test_live_view_tells_stage_counts_throughput_time_and_memory():
    screen = io.StringIO()
    with live_view("train", "steps", Console(file=screen, force_terminal=True, width=120)) as update:
        for step in range(1, 4):
            update(step, 4, f"epoch 1 [loss] {step}")  # brackets are no markup
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    *_, bar, words = text.strip().splitlines()
    assert re.match(r"train .* 75% 3/4 steps, \S+ steps/(s|min) \S+ \d+\.\d GB", bar)
    assert words.strip() == "epoch 1 [loss] 3"
