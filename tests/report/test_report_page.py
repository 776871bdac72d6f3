"""The written page: offline, escaped, in keeping with the files, and alive in a real browser where there is one."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from report_run import evaluation_record, json_lines, sample

from taurl.report import write_report
from taurl.report.page import embed, flatten, format_number
from taurl.runtime.errors import InputError, RunError

MakeRun = Callable[..., Path]
ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">&amp;\u2028"


class Page(HTMLParser):
    """The tags of a page with their attributes, the scripts and styles apart, and the remaining text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.text += " "
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        self.inside = tag if tag in ("script", "style") else self.inside

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif self.inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    def data(self, identifier: str):
        return json.loads("".join(text for attributes, text in self.scripts if attributes.get("id") == identifier))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_page_tells_what_the_files_say(make_run: MakeRun):
    directory = make_run()
    (directory / "final").mkdir()
    path = write_report(directory)
    assert path == directory / "report.html"
    page = Page(path)
    text = squeezed(page.text)
    assert "smollm2-135m-instruct · reasoning-gym:chain_sum · cpu · Some CPU" in text
    assert "Finished at step 4 of 4" in text
    assert "Held-out: last_number 0.240 → 0.700 step 0 → step 4" in text
    assert "Reward 0.100 → 0.400 step 1 → step 4" in text
    assert "Wall time 2 min 4 s" in text
    assert "Peak memory 4.2 GB" in text
    assert "eval/reward 0.240 step 0 0.700 step 4 +0.460" in text
    assert "Row 4 prompt 4 Before before 4 reward 0 tokens 7 After after 4 reward 1.000 tokens 7" in text
    assert "nested.low 0.2 nested.names a, b" in text
    assert len(page.data("sample-data")) == 22
    assert len(page.data("chart-data")) == sum(attributes.get("class") == "plot" for _, attributes in page.tags)
    assert path.stat().st_size < 6e6


def test_nothing_is_loaded_from_anywhere(make_run: MakeRun):
    page = Page(write_report(make_run()))
    loading = {"src", "srcset", "href", "data", "action", "poster", "background", "style"}
    for tag, attributes in page.tags:
        for name in loading & attributes.keys():
            assert re.match(r"#|data:|background: var\(", attributes[name]), (tag, name, attributes[name])
    assert not re.search(r"url\(|@import|https?:", "".join(page.styles))
    executed = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert sum("plotly.js v" in text[:500] for text in executed) == 1
    assert not re.search(r"https?:|fetch|XMLHttpRequest|import\(", executed[-1])
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_everything_from_a_run_is_escaped(make_run: MakeRun):
    samples = [sample(step, "evaluation", 1, ATTACK) | {"prompt": ATTACK, "answer": ATTACK} for step in (0, 4)]
    samples[0]["rewards"] = {ATTACK: 1.0, "other": float("nan")}
    directory = make_run(
        samples_jsonl=json_lines(samples),
        config_yaml=json.dumps({"model": ATTACK, ATTACK: ATTACK}),
        environment_json=json.dumps({"taurl": ATTACK, ATTACK: [ATTACK]}),
        metrics_jsonl=json_lines([{"step": 1, ATTACK: 1.0, f"rewards/{ATTACK}/mean": 2.0, f"eval/{ATTACK}": 3.0}]),
    )
    (directory / "artifacts").mkdir()
    (directory / "artifacts" / "<script>.svg").write_text("<svg/>")
    page = Page(write_report(directory))
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 4  # charts, samples, plotly, the page's own
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(ATTACK) >= 8
    assert page.data("sample-data")[0]["completion"] == ATTACK
    assert page.data("sample-data")[0]["rewards"] == {ATTACK: 1.0, "other": None}


def test_lone_surrogates_do_not_stop_the_page(make_run: MakeRun):
    directory = make_run(samples_jsonl='{"step": 0, "kind": "evaluation", "row": 1, "completion": "\\ud800"}\n')
    assert write_report(directory).stat().st_size > 1e6


@pytest.mark.parametrize("name", ["config_yaml", "environment_json", "metrics_jsonl", "samples_jsonl"])
def test_missing_files_are_said_on_the_page(make_run: MakeRun, name: str):
    assert f"{name.replace('_', '.')} is missing" in Page(write_report(make_run(**{name: None}))).text


def test_a_run_that_has_only_begun(make_run: MakeRun):
    directory = make_run(metrics_jsonl='{"step": 0, "eval/reward": 0.24}\n{"step": 1, "rew', samples_jsonl="")
    page = Page(write_report(directory))
    text = squeezed(page.text)
    assert "Not finished: step 0 of 4 so far" in text
    assert "last line, 2, is cut" in text
    assert "Held-out 0.240 step 0 only, so far" in text
    assert [attributes["id"] for tag, attributes in page.tags if tag == "h2"] == [
        "before-after",
        "curves",
        "configuration",
        "environment",
    ]


def acting_run(make_run: MakeRun, evaluations: list[float]) -> Path:
    lines = [
        {"step": step, "rollout/ep_rew_mean": 10.0 * step, "time/fps": 5000.0}
        | {"eval/mean_reward": mean, "eval/std_reward": 0.5, "eval/reward_p50": mean}
        for step, mean in enumerate(evaluations, 1)
    ]
    config = "env: CartPole-v1\nsteps: 3\neval_episodes: 20\n"
    return make_run(metrics_jsonl=json_lines(lines), samples_jsonl=None, config_yaml=config)


def test_a_run_that_acts(make_run: MakeRun):
    directory = acting_run(make_run, [3.0, 8.0, 6.0])
    (directory / "artifacts").mkdir()
    (directory / "artifacts" / "trained-policy.gif").write_bytes(b"GIF89a")
    page = Page(write_report(directory))
    text = squeezed(page.text)
    assert "Return, evaluated 6.000 ± 0.500 20 episodes, step 3" in text
    assert "Best evaluation 8.000 step 2" in text
    assert "While training 10 → 30" in text
    assert "Steps per second 5,000" in text
    assert "mean return 3.000 step 1 6.000 step 3 +3.000" in text
    assert "missing" not in text
    order = ["before-after", "pictures", "curves", "configuration", "environment"]
    assert [attributes["id"] for tag, attributes in page.tags if tag == "h2"] == order
    assert ("trained policy", "data:image/gif;base64,R0lGODlh") in [
        (attributes["alt"], attributes["src"]) for tag, attributes in page.tags if tag == "img"
    ]


def test_one_evaluation_is_compared_with_nothing(make_run: MakeRun):
    text = squeezed(Page(write_report(acting_run(make_run, [3.0]))).text)
    assert "Evaluation Held-out metrics Metric Value mean return 3.000 step 1 standard deviation" in text
    assert "Best evaluation" not in text


def test_what_scoring_took_is_no_result(make_run: MakeRun):
    lines = [evaluation_record(step, 0.24) | {"eval/rewards/last_number/seconds": 0.02} for step in (0, 4)]
    text = squeezed(Page(write_report(make_run(metrics_jsonl=json_lines(lines)))).text)
    compared = text[text.index("Before and after") : text.index("Curves", text.index("Held-out answers"))]
    assert "eval/rewards/last_number/mean 0.240" in compared
    assert "eval/rewards/last_number/seconds" not in compared


def test_a_second_report_replaces_the_first_and_leaves_nothing_beside(make_run: MakeRun):
    directory = make_run()
    before = set(directory.iterdir())
    write_report(directory)
    write_report(directory)
    assert set(directory.iterdir()) - before == {directory / "report.html"}


def test_a_page_that_cannot_be_written_is_one_clear_line(make_run: MakeRun):
    directory = make_run()
    (directory / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html could not be written") as caught:
        write_report(directory)
    assert "\n" not in str(caught.value)
    assert not list(directory.glob("*.part"))


def test_no_run_directory_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"config\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_headings_descend_and_fields_have_labels(make_run: MakeRun):
    page = Page(write_report(make_run()))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(attributes.get("aria-label") for _, attributes in page.tags if attributes.get("role") == "img")
    references = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert set(references) <= set(identifiers)


def test_embedded_json_is_json_and_cannot_end_its_element():
    value = {"a": [ATTACK, float("nan"), float("inf"), None, 1]}
    text = embed(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": [ATTACK, None, None, None, 1]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.24, "0.240"),
        (0, "0"),
        (1.5e-5, "1.5e−05"),
        (-15.0, "−15"),
        (12345.6, "12,346"),
        (123.4, "123.4"),
        (0.99999, "1.000"),
        (None, "–"),
        (float("nan"), "–"),
        (True, "–"),
        ("x", "–"),
    ],
)
def test_numbers_are_short(value: object, text: str):
    assert format_number(value) == text


def test_nested_settings_have_dotted_names():
    assert flatten({"a": {"b": {"c": None}, "d": {}}, "e": [1, 2]}) == [
        ("a.b.c", "null"),
        ("a.d", "{}"),
        ("e", "[1, 2]"),
    ]


def test_no_torch_and_no_wing_is_imported(make_run: MakeRun):
    code = (
        "import sys; from pathlib import Path; from taurl.report import write_report\n"
        "assert 'plotly' not in sys.modules and 'jinja2' not in sys.modules\n"
        f"write_report(Path({str(make_run())!r}))\n"
        "print([name for name in sys.modules if name in ('torch', 'transformers', 'taurl.llm', 'taurl.control')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser")
def test_a_browser_draws_the_curves_and_runs_no_script_of_a_completion(make_run: MakeRun, tmp_path: Path):
    samples = [sample(step, "evaluation", 1, ATTACK) for step in (0, 4)] + [sample(2, "train", 1, "plain words", 0.5)]
    path = write_report(make_run(samples_jsonl=json_lines(samples)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    options += ["--window-size=1280,6000", "--virtual-time-budget=8000", "--dump-dom"]
    result = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "CONSOLE" not in result.stderr, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert "<title>demo – taurl report</title>" in result.stdout
    plots = len(Page(path).data("chart-data"))
    assert plots > 10
    assert result.stdout.count('class="plot js-plotly-plot"') == plots
    assert len(re.findall(r'<svg class="main-svg"[^>]*style="[^"]*background', result.stdout)) == plots
    assert "3 of 3 samples" in result.stdout
    cards = re.findall(r'<article class="sample">.*?</article>', result.stdout, re.DOTALL)
    assert [re.findall(r"<h3[^>]*>(.*?)</h3>", card)[0] for card in cards] == [
        "Step 4, evaluation, row 1",
        "Step 2, train, row 1",
        "Step 0, evaluation, row 1",
    ]
    assert "&lt;/script&gt;&lt;script&gt;" in cards[0]
