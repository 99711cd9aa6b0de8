"""The report of a fabricated run: every section, hostile text, a run without evaluation, and a real browser if there is one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricated import CONTROLS, HOSTILE, change_manifest, make_run, recipe_for

from distill.errors import IntegrityError, MissingStageError, visible
from distill.recipe.reading import load_recipe
from distill.reporting.made import MadeStep, repeat_commands
from distill.reporting.pages import excerpt, fenced, markdown_text
from distill.reporting.summary import parameters_text
from distill.run.log import duration_text
from distill.run.manifest import check_files
from distill.stages import report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    make_run(folder)
    report.run(recipe_for(folder))
    return folder


class Page(HTMLParser):
    """What a browser makes of a page: its elements with attributes, its text, and the ids it defines."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data


def page_of(run_dir: Path) -> Page:
    return Page((run_dir / "report" / "report.html").read_text())


def test_summary_is_a_table_and_the_gap(run_dir: Path) -> None:
    lines = (run_dir / "report" / "summary.txt").read_text().splitlines()
    assert lines[-1] == "gap recovered: 0.71 [0.63, 0.79] (95 % interval, paired bootstrap over 300 prompts)"
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in ("base", "student", "teacher")}
    assert list(rows) == ["base", "student", "teacher"]
    assert re.search(r"71\.0 % +\[66\.0 %, 76\.0 %\] +120 +2\.0 % +1\.0 % +606\.05M$", rows["student"])
    assert len({len(row) for row in rows.values()}) == 1  # aligned to the right edge
    assert max(map(len, lines)) <= 100 and lines == [line.rstrip() for line in lines] and lines[0].strip()


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_every_section_has_its_numbers(run_dir: Path, name: str) -> None:
    text = page_of(run_dir).text if name.endswith("html") else (run_dir / "report" / name).read_text().replace("\\", "")
    for expected in (
        "small-run",
        "The student answers 71.0 % of 300 held-out prompts correctly; before training it was 25.0 %, and its teacher answers 90.0 %.",
        "It learned from 27 of 40 traces by Qwen/Qwen3-8B, in 160 optimizer steps. All stages together took 5 min 28 s.",
        "gap recovered: 0.71 [0.63, 0.79]",
        "math:wrong_answer",
        "too_long",
        "could not be judged",
        "dropped: finish:length",
        "Adding nothing to 3.",
        "It is boxed{3}." if name.endswith("md") else "It is \\boxed{3}.",
        "no answer: the trace ends" if name.endswith("html") else "none: the trace ends",
        "123,456",
        "cuda:0",
        "Qwen/Qwen3-8B at feedc0de1234, 8.19B parameters",
        "Qwen/Qwen3-0.6B at c1b2a3, 596.05M parameters",
        "Apache-2.0",
        "abababababababab",
        "git 0123456789ab",
        "torch 2.13.0, transformers 5.23.0",
        "distill run recipe.yaml",
        "samples_per_prompt: 1",
    ):
        assert expected in text, expected
    assert "None" not in re.sub(r"None asked for|None,", "", text)


def test_the_recipe_in_the_report_can_be_run_again(run_dir: Path, tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)\n```", (run_dir / "report" / "report.md").read_text(), re.DOTALL)
    assert block
    (tmp_path / "recipe.yaml").write_text(block.group(1))
    assert load_recipe(tmp_path / "recipe.yaml", []) == recipe_for(Path(run_dir.name))
    assert str(run_dir) not in "".join(path.read_text() for path in (run_dir / "report").glob("report.*"))


def test_commands_that_repeat_a_run_are_read_as_they_were_made(tmp_path: Path) -> None:
    whole = load_recipe("quickstart")
    changes = {"seed": 7, "prompts.answer_pattern": "#### '(.+)'", "prompts.system_prompt": "null?", "curate.checks": ["finish"]}
    made = load_recipe("quickstart", changes)
    steps = [MadeStep(stage, 0, recipe.model_dump(mode="json")) for stage, recipe in (("prompts", made), ("curate", whole))]
    command, _ = repeat_commands(whole, steps)
    assert load_recipe("quickstart", shlex.split(command)[3:]).prompts == made.prompts


def test_the_funnel_counts_down_to_what_is_kept(run_dir: Path) -> None:
    text = (run_dir / "report" / "report.md").read_text()
    steps = re.findall(r"^\| (prompts|traces|pass \w+|kept) \| (\d+) \|$", text, re.MULTILINE)
    assert steps == [("prompts", "40"), ("traces", "40"), ("pass finish", "39"), ("pass think", "39"), ("pass math", "30"), ("kept", "30")]


@pytest.mark.parametrize(
    ("asked", "kept", "dropped", "shown"),
    [(12, 30, 10, (8, 4)), (12, 4, 10, (4, 8)), (12, 30, 0, (12, 0)), (12, 3, 2, (3, 2)), (0, 5, 2, (0, 0))],
)
def test_examples_are_of_both_kinds(tmp_path: Path, asked: int, kept: int, dropped: int, shown: tuple[int, int]) -> None:
    make_run(tmp_path, kept=kept, dropped=dropped)
    report.run(recipe_for(tmp_path, report={"examples": asked}))
    tags = [attributes.get("class") for tag, attributes in page_of(tmp_path).elements if tag == "span"]
    assert (tags.count("kept"), tags.count("dropped")) == shown


def test_hostile_text_stays_text(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert page.text.count(visible(HOSTILE)) >= 3  # question, reasoning and answer
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.elements}
    markdown = (run_dir / "report" / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<script", "") and "49" not in re.findall(r"Hostile.*", markdown)[0]


def test_no_control_character_is_in_what_is_shown(tmp_path: Path) -> None:
    """A terminal, an editor and a browser obey them, wherever they come from."""
    make_run(tmp_path)
    for stage in ("traces", "curated", "student", "eval"):
        change_manifest(tmp_path / stage, lambda manifest: manifest["drops"].update({f"reason {CONTROLS} | <b>": 1}))
    change_manifest(tmp_path / "traces", lambda manifest: manifest["facts"]["author"].update({"model": f"author {CONTROLS}"}))
    change_manifest(
        tmp_path / "student", lambda manifest: manifest["facts"].update({"precision": CONTROLS, "packages": {CONTROLS: CONTROLS}})
    )
    change_manifest(tmp_path / "eval", lambda manifest: manifest["facts"].update({"device": f"{CONTROLS}|"}))
    prompts = {"source": f"problems {CONTROLS}.jsonl", "system_prompt": f"Think. {CONTROLS}"}
    report.run(recipe_for(tmp_path, prompts=prompts))
    for name in ("report.html", "report.md", "summary.txt"):
        text = (tmp_path / "report" / name).read_text()
        assert text == visible(text), name
        if name.startswith("report"):
            assert text.replace("\\\\", "\\").count("\\x1b") >= 10, name
    markdown = (tmp_path / "report" / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):  # a bar inside would make another column
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_the_page_loads_nothing(run_dir: Path) -> None:
    html = (run_dir / "report" / "report.html").read_text()
    for tag, attributes in Page(html).elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    css = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert css and "@import" not in css.group(1) and not re.search(r"url\(", css.group(1))


def test_ids_are_distinct_and_every_reference_has_its_target(run_dir: Path) -> None:
    html = (run_dir / "report" / "report.html").read_text()
    ids = [attributes["id"] for _, attributes in Page(html).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {*re.findall(r"url\(#([^)]+)\)", html), *re.findall(r'href="#([^"]+)"', html)} <= set(ids)


def test_pictures_say_what_they_are_and_take_the_ink_of_the_page(run_dir: Path) -> None:
    page = page_of(run_dir)
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 3
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert [tag for tag, _ in page.elements].count("figcaption") == 3
    html = (run_dir / "report" / "report.html").read_text()
    assert "fill: currentColor" in html and "#000000" not in html


def test_without_evaluation_it_says_not_measured(tmp_path: Path) -> None:
    make_run(tmp_path, evaluated=False)
    report.run(recipe_for(tmp_path, evaluate=None))
    assert (tmp_path / "report" / "summary.txt").read_text().startswith("not measured")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "Not measured" in text and "has not been measured" in text and "gap recovered" not in text
        assert "Adding nothing to" in text  # the rest is there


def test_an_undefined_gap_and_one_within_the_noise_are_said(tmp_path: Path) -> None:
    for name, gap, words in [
        ("undefined", (None, None, None), "gap recovered: not defined, the teacher is no better than the base"),
        ("wide", (0.4, None, None), "gap recovered: not told, the lead of the teacher over the base is within the noise"),
        ("absent", None, "gap recovered: not measured (needs base, student and teacher)"),
    ]:
        make_run(tmp_path / name, gap=gap)
        report.run(recipe_for(tmp_path / name))
        for file in ("summary.txt", "report.html"):
            assert words in (tmp_path / name / "report" / file).read_text()


def test_unjudged_answers_that_could_change_an_order_are_said(tmp_path: Path) -> None:
    make_run(tmp_path, unjudged=0.2)
    report.run(recipe_for(tmp_path))
    words = "could change the order of student (91.0 % at most) and teacher"
    for file in ("summary.txt", "report.html", "report.md"):
        text = (tmp_path / "report" / file).read_text()
        assert words in text and "71.0 to 91.0 %" in text


def test_a_second_report_does_nothing_and_a_missing_stage_is_named(run_dir: Path, tmp_path: Path) -> None:
    before = (run_dir / "report" / "report.html").stat().st_mtime_ns
    assert report.run(recipe_for(run_dir)) == check_files(run_dir / "report")
    assert (run_dir / "report" / "report.html").stat().st_mtime_ns == before
    make_run(tmp_path, evaluated=False)
    with pytest.raises(MissingStageError, match="eval: this stage is not there"):
        report.run(recipe_for(tmp_path))


def test_the_same_run_gives_the_same_page(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "report")
    report.run(recipe_for(tmp_path / "run"))
    pages = [(folder / "report" / "report.html").read_text().replace(str(folder), "") for folder in (run_dir, tmp_path / "run")]
    assert pages[0] == pages[1]


def test_long_reasoning_is_whole_in_html_and_its_beginning_in_markdown(run_dir: Path) -> None:
    whole = "on and on " * 399
    assert whole in (run_dir / "report" / "report.html").read_text()
    markdown = (run_dir / "report" / "report.md").read_text()
    assert whole not in markdown and re.search(r"\.\.\. \(2,\d{3} more characters\)", markdown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.99, "1 min 00 s"), (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_durations_as_people_write_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "unknown"), (12, "12"), (330_000, "330k"), (851_968, "851.97k"), (7_600_000_000, "7.6B")]
)
def test_parameters_as_people_write_them(count: int | None, text: str) -> None:
    assert parameters_text(count) == text


def test_markdown_of_foreign_text() -> None:
    assert markdown_text("a | b\n# *c*") == "a \\| b \\# \\*c\\*"
    assert fenced("a ``` b\n", "yaml") == "````yaml\na ``` b\n````"
    assert excerpt("abc", 3) == "abc" and excerpt("abcd", 3) == "abc ... (1 more characters)"


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_scrolling_sideways(run_dir: Path, tmp_path: Path, width: int) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium")
    # Windows can't be as narrow as a telephone, frames can.
    (tmp_path / "frame.html").write_text(
        f'<iframe id="frame" width="{width}" height="900" src="file://{run_dir}/report/report.html"></iframe><pre id="found"></pre><script>'
        "onload = () => { const page = document.getElementById('frame').contentDocument, body = page.documentElement;"
        "document.getElementById('found').textContent = JSON.stringify({inner: body.clientWidth, needed: body.scrollWidth,"
        "scripts: page.scripts.length,"
        "controls: /[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u202a-\\u202e\\u2066-\\u2069]/.test(page.body.innerText),"
        "pictures: [...page.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width),"
        "text: Math.min(...[...page.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))}) }</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"]
    result = subprocess.run([browser, *flags, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', result.stdout)
    assert found, result.stderr[-2000:]
    sizes = json.loads(found.group(1))
    assert sizes["needed"] <= sizes["inner"] <= width
    assert sizes["scripts"] == 0 and sizes["controls"] is False  # of prompts and traces, see `HOSTILE`
    assert len(sizes["pictures"]) == 3 and min(sizes["pictures"]) > 0.8 * min(width, 600)
    assert sizes["text"] >= 9  # CSS pixels: legible
    assert "CONSOLE" not in result.stderr


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["delete", "empty", "cut", "flip"])
def test_a_damaged_input_is_one_error_that_names_it(tmp_path: Path, name: str, damage: str) -> None:
    make_run(tmp_path)
    path = tmp_path / "student" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "delete":
        place = len(content) // 2
        path.write_bytes({"empty": b"", "cut": content[:place], "flip": content[:place] + b"\xff" + content[place + 1 :]}[damage])
    with pytest.raises((IntegrityError, MissingStageError), match="student"):
        report.run(recipe_for(tmp_path))
