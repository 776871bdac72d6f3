"""What a run shows: lines where nobody looks, a live view in a terminal."""

import io
import time

import pytest
from rich.console import Console

from taurl.runtime.terminal import SAMPLE_CHARACTERS, SAMPLE_LINES, View, duration, excerpt, minutes, number

HEADLINE = {"reward": "reward", "length": "completions/mean_length"}


def plain(width=80):
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(width=90):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, record=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((None, "–"), (3, "3"), (123456, "123,456"), (0.12345, "0.123"), (1e-5, "1e-05"), (999.4, "999")),
        *((999.9, "1,000"), (-1234.5, "-1,234"), (float("nan"), "nan"), (float("inf"), "inf"), (0.0, "0"), (True, "1")),
    ],
)
def test_number(value, expected):
    assert number(value) == expected


def test_minutes():
    assert [minutes(seconds) for seconds in (0, 59.7, 119.6, 61, 3600)] == ["0:00", "1:00", "2:00", "1:01", "60:00"]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (724, "12 min 4 s"), (3600 * 3 + 1234, "3 h 20 min")]
)
def test_duration(seconds, expected):
    assert duration(seconds) == expected


def test_nothing_is_left_past_the_end():
    view = View(100, {}, plain())
    view.start(0)
    view.record({"step": 130})
    assert "step 130/100  left 0:00" in view.console.file.getvalue()


def test_one_line_a_step_with_the_time_left():
    console = plain()
    view = View(12, HEADLINE, console)
    view.start(0)
    view.record({"step": 0, "eval/rewards/last_number/mean": 0.25})
    view.started = time.monotonic() - 20  # two steps of ten seconds
    record = {"step": 2, "reward": 0.5, "completions/mean_length": 1234.0, "eval/rewards/last_number/mean": 0.375}
    view.record(record)
    view.stop()
    assert console.file.getvalue().splitlines() == [
        "step 0/12  eval/rewards/last_number/mean 0.25",
        "step 2/12  reward 0.5  length 1,234  eval/rewards/last_number/mean 0.375  left 1:40",
    ]


def test_the_time_left_after_a_resume_counts_this_part_only():
    console = plain()
    view = View(12, HEADLINE, console)
    view.start(10)
    view.started = time.monotonic() - 30
    view.record({"step": 11, "reward": None})
    assert console.file.getvalue() == "step 11/12  reward –  left 0:30\n"


def test_the_evaluation_before_the_first_step_is_no_step():
    console = plain()
    view = View(12, HEADLINE, console)
    view.start(0)
    view.started = time.monotonic() - 1000
    view.record({"step": 0})
    view.record({"step": 1})
    assert console.file.getvalue().splitlines()[1] == "step 1/12  left 0:00"


def test_a_long_silence_is_broken_by_what_goes_on(monkeypatch):
    monkeypatch.setattr("taurl.runtime.terminal.SILENCE_SECONDS", 0.1)
    console = plain()

    def lines():
        return console.file.getvalue().splitlines()

    def wait_for(count):
        deadline = time.monotonic() + 60
        while len(lines()) < count:
            assert time.monotonic() < deadline, lines()
            time.sleep(0.01)

    view = View(12, HEADLINE, console)
    view.start(1000)
    view.status("sampling [3] prompts")
    wait_for(1)
    time.sleep(0.5)  # what goes on is said once
    view.status("updating")
    wait_for(2)
    view.record({"step": 1001, "reward": 0.5})
    view.status("updating")
    wait_for(4)
    view.stop()
    view.status("nothing is shown of what comes after the end")
    time.sleep(0.3)
    assert [line.partition("  left")[0] for line in lines()] == [
        *("after step 1,000: sampling [3] prompts", "after step 1,000: updating"),
        *("step 1,001/12  reward 0.5", "after step 1,001: updating"),
    ]


def test_a_terminal_that_cannot_show_the_view_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = terminal()
    view = View(12, HEADLINE, console)
    view.start(0)
    view.record({"step": 1, "reward": 0.5})
    view.stop()
    assert console.export_text().startswith("step 1/12  reward 0.5")


def test_notes_stay_one_line():
    console = plain(width=40)
    View(12, HEADLINE, console).note("runs/demo/checkpoints/step-000020/state.pt: damaged [x]; " * 3)
    assert console.file.getvalue().count("\n") == 1


def test_the_terminal_shows_figures_activity_and_a_sample():
    console = terminal()
    view = View(12, HEADLINE, console)
    view.start(0)
    view.record({"step": 3, "reward": 0.625, "completions/mean_length": 87.5})
    view.record({"step": 4, "reward": 0.75})  # a figure that is not there keeps its last value
    view.status("sampling [3] prompts")
    view.sample("step 4, [reward] 1", "What is 2 + 2?\n→ [bold]four[/bold] [/nonsense] \x1b[2Jand [link=x]4")
    view.pin("SIGINT: finishing the step")
    view.live.refresh()
    view.stop()
    shown = console.export_text()
    for expected in (
        *("reward", "0.75", "length", "87.5", "4/12", "sampling [3] prompts", "SIGINT: finishing the step"),
        *("step 4, [reward] 1", "What is 2 + 2?", "→ [bold]four[/bold] [/nonsense]  [2Jand [link=x]4"),
    ):
        assert expected in shown, expected
    assert "\x1b[2J" not in shown


def test_after_the_first_signal_the_cursor_shows_for_the_second_ends_the_process_at_once():
    console = terminal()
    view = View(10, {}, console=console)
    view.start(0)
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert console.file.getvalue().rfind(hidden) > console.file.getvalue().rfind(shown)
    view.pin("SIGTERM: finishing the step")
    view.live.refresh()
    assert console.file.getvalue().rfind(shown) > console.file.getvalue().rfind(hidden)
    view.stop()


def test_a_sample_stays_long_enough_to_be_read(monkeypatch):
    view = View(12, HEADLINE, terminal())
    view.sample("first", "one")
    view.sample("second", "two")
    assert (view.sample_title, view.sample_shown) == ("first", "one")
    view.sample_time -= 60
    view.sample("third", "three")
    assert (view.sample_title, view.sample_shown) == ("third", "three")


def test_the_first_sample_is_shown_on_a_machine_that_has_just_booted(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    view = View(12, HEADLINE, terminal())
    view.sample("first", "one")
    assert view.sample_shown == "one"


def test_excerpt_shows_start_and_end():
    assert excerpt("  short\ntext \n") == "short\ntext"
    lines = excerpt("\n".join(f"line {index}" for index in range(100))).split("\n")
    assert len(lines) == SAMPLE_LINES + 1
    assert (lines[0], lines[-1]) == ("line 0", "line 99")
    long = excerpt("a" * 5000 + "z")
    assert len(long) <= SAMPLE_CHARACTERS + 3
    assert long[0] + long[-1] == "az"
    assert excerpt("é中\t😀\x07") == "é中 😀 "


def test_a_view_can_be_started_again():
    console = terminal()
    view = View(12, HEADLINE, console)
    for done in (0, 3):
        view.start(done)
        view.record({"step": done + 1, "reward": 0.5})
        view.stop()
    assert not view.live.is_started
