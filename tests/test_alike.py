"""Prompts that are like others: near-duplicates and questions of benchmarks, against their definitions and through the command line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from test_prompts import made, recipe, rows, texts, write

from distill.data.kept import TURN, Texts, around, own_text
from distill.data.near import Near
from distill.data.ngrams import Search
from distill.data.normal import normal_form
from distill.errors import DataError, StageConflictError
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.stages.prompts import run, survey

LATIN = [f"word{letter}{number}" for letter in "abcde" for number in range(30)]
HAN = [chr(0x4E00 + number) for number in range(300)]
THAI = ["".join(chr(0x0E01 + (number * 7 + place) % 46) for place in range(3)) for number in range(90)]


def shingles(text: str) -> set[str]:
    """As the documentation says it."""
    return {text[at : at + 5] for at in range(len(text) - 4)} or {text}


def jaccard(one: str, other: str) -> float:
    first, second = shingles(normal_form(one)), shingles(normal_form(other))
    return len(first & second) / len(first | second)


def edited(words: list[str], pool: list[str], draw: random.Random) -> list[str]:
    """The words with some of them others."""
    return [draw.choice(pool) if draw.random() < 0.06 else word for word in words]


def families(count: int, draw: random.Random) -> list[str]:
    """Texts in three scripts, of which each has some that were made from it, and some very short ones."""
    found = []
    for _ in range(count):
        pool, sep = draw.choice([(LATIN, " "), (HAN, ""), (THAI, "")])
        words = [draw.choice(pool) for _ in range(draw.randint(1, 30))]
        found += [sep.join(words)] + [sep.join(edited(words, pool, draw)) for _ in range(draw.randint(0, 4))]
    draw.shuffle(found)
    return list(dict.fromkeys(found))


def question(text: str) -> dict[str, Any]:
    return {"question": text, "answer": 1}


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95])
def test_near_duplicates_are_those_of_the_definition(similarity: float, tmp_path: Path) -> None:
    """The first stays; a prompt is compared with those that stay. What is missed by chance, one pair in a thousand, is not in these."""
    source = families(60, random.Random(5))
    stay: list[str] = []
    lost = []
    for text in source:
        (lost if any(jaccard(text, other) >= similarity for other in stay) else stay).append(text)
    manifest, tables = made(tmp_path, list(map(question, source)), heldout_size=0, near_duplicates={"similarity": similarity})
    assert texts(tables["train"]) == stay and texts(tables["dropped"]) == lost and len(lost) > 2
    assert manifest.drops == {"near_duplicate": len(lost)} and manifest.facts["alike"] == {"near_duplicate": {"similar": len(lost)}}
    matches = read_rows(tmp_path / "run" / "prompts", "matches")
    assert [row["prompt_id"] for row in matches] == [row["prompt_id"] for row in tables["dropped"]]
    for match in matches:
        other = source[match["row"] - 1]
        assert other in stay and match["other_text"] == normal_form(other) and match["set"] == "train" and match["kind"] == "similar"
        assert match["similarity"] == pytest.approx(jaccard(match["text"], other)) and match["similarity"] >= similarity


def test_what_is_near_a_heldout_prompt_is_not_trained_on(tmp_path: Path) -> None:
    source = families(80, random.Random(6))
    section = {"heldout_size": 15, "near_duplicates": {"similarity": 0.8}}
    manifest, tables = made(tmp_path, list(map(question, source)), **section)
    _, plain = made(tmp_path, list(map(question, source)), "plain", heldout_size=15)
    heldout = texts(tables["heldout"])
    assert heldout == texts(plain["heldout"])
    near = {text for text in texts(plain["train"]) if any(jaccard(text, other) >= 0.8 for other in heldout)}
    near_heldout = {text for text, row in zip(texts(tables["dropped"]), tables["dropped"], strict=True) if row["reason"] == "near_heldout"}
    assert near_heldout == near and near and manifest.drops["near_duplicate"] > 0
    found = survey(recipe(tmp_path / "run", tmp_path / "run.jsonl", **section).prompts, 0, 3)
    assert (found.train, found.heldout, found.drops) == (len(tables["train"]), 15, manifest.drops)


def test_what_the_recipe_puts_around_prompts_makes_none_of_them_alike(tmp_path: Path) -> None:
    long = " ".join(LATIN[:80])
    source = [question(f"What is {number * 37} and {number}?") for number in range(40)]
    around = {"template": f"{long}\n{{prompt}}\n{long}", "system_prompt": long}
    asked = {"near_duplicates": {"similarity": 0.8}, "decontaminate": {"ngrams": [8], "similarity": 0.8}, "heldout_size": 10}
    assert made(tmp_path, source, **asked, **around)[0].drops == made(tmp_path, source, "bare", **asked)[0].drops == {}


def test_what_stands_between_columns_makes_none_alike_and_a_question_is_found_beside_a_passage(tmp_path: Path) -> None:
    """Questions of a benchmark stand alone, those of a template with a passage do not."""
    draw, between = random.Random(12), " ".join(LATIN[:80])
    source = [question(f"Who is {word}?") | {"passage": " ".join(draw.choices(LATIN, k=20))} for word in LATIN[100:]]
    section = {"template": f"{{passage}}\n{between}\n{{prompt}}", "near_duplicates": {}, "heldout_size": 0}
    assert made(tmp_path, source, "between", **section)[0].drops == {}
    file = write(tmp_path / "questions.jsonl", [question(row["question"].upper()) for row in source[:40]])
    section = {"template": section["template"], "heldout_size": 0, "decontaminate": {"benchmarks": [str(file)], "ngrams": []}}
    manifest, tables = made(tmp_path, source, "bench", **section)
    assert manifest.drops == {"in_benchmark": 40} and len(tables["train"]) == len(source) - 40
    found = survey(recipe(tmp_path / "bench", tmp_path / "bench.jsonl", **section).prompts, 0, 3)
    assert (found.train, found.drops) == (len(tables["train"]), manifest.drops)


def test_a_conversation_that_goes_on_is_no_near_duplicate() -> None:
    long = " ".join(LATIN[:60])
    one = [{"role": "user", "content": f"<< {long} >>"}]
    more = [{"role": "system", "content": "s"}, {"role": "user", "content": long}, {"role": "assistant", "content": "Yes."}]
    assert own_text(one, around("<< {prompt} >>")) == normal_form(long)
    longer = [*more, {"role": "user", "content": "<< So? >>"}]
    assert own_text(longer, around("<< {prompt} >>")) == f"{normal_form(long)}{TURN}yes.{TURN}so?"
    with Texts() as kept:
        near = Near(0.8, 0, kept)
        for text in (own_text(one, around("<< {prompt} >>")), own_text(longer, around("<< {prompt} >>")), normal_form(long + " so")):
            kept.add([text])
            near.add([text])
        assert [found[:2] for found in near.among(np.arange(3), 0, 0.8)] == [(2, 0)]


def test_what_is_around_is_told_from_what_a_row_fills_in() -> None:
    assert around("Read.\n{context}\nIn \\boxed{answer}: {prompt}\nEnd {{x1}}.") == ("Read.\n", "\nEnd {x1}.")
    calls = [{"role": "user", "content": "A <b>"}, {"role": "assistant", "content": "", "tool_calls": '[{"f": 1}]'}]
    assert own_text(calls, ("", " <b>")) == f'a{TURN}[{{"f":1}}]'


def test_a_conversation_of_many_turns_is_no_boilerplate(tmp_path: Path) -> None:
    asked = " ".join(LATIN[:9])
    file = write(tmp_path / "bench.jsonl", [{"question": asked}])
    turns = [{"role": role, "content": f"{asked if not n else 'on'} {n}"} for n in range(30) for role in ("user", "assistant")]
    other = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    source = write(tmp_path / "p.jsonl", [{"messages": turns}, {"messages": other}])
    section = {"columns": {"messages": "messages"}, "turns": "all", "heldout_size": 0}
    section["decontaminate"] = {"benchmarks": [{"source": str(file), "column": "question"}]}
    found = survey(recipe(tmp_path, source, **section).prompts, 0, 3)
    assert (found.train, found.drops) == (1, {"in_benchmark": 30})


def grams(text: str, count: int) -> set[tuple[str, ...]]:
    """As the documentation says it, for texts that are all of one kind."""
    text = normal_form(text)
    units = list(text) if any("\u0e00" <= one <= "\u9fff" for one in text) else text.split()
    size = 2 * count if units == list(text) else count
    return {tuple(units[at : at + size]) for at in range(len(units) - size + 1)}


def holding(benchmark: list[str], draw: random.Random) -> list[str]:
    """Prompts of which some have a part of a question inside."""
    found = []
    for text in benchmark * 2:
        words, sep = (text.split(), " ") if " " in text else (list(text), "")
        begin = draw.randrange(max(len(words) - 4, 1))
        part = words[begin : begin + draw.randint(3, 40)]
        pool = HAN if not sep else LATIN
        found.append(sep.join([*draw.choices(pool, k=draw.randint(0, 9)), *part, *draw.choices(pool, k=draw.randint(0, 9))]))
    return list(dict.fromkeys(found))


def test_shared_runs_of_words_are_those_of_the_definition(tmp_path: Path) -> None:
    draw = random.Random(7)
    benchmark = [" ".join(draw.choices(LATIN, k=draw.randint(2, 30))) for _ in range(40)]
    benchmark += ["".join(draw.choices(HAN, k=draw.randint(4, 60))) for _ in range(40)]
    prompts = holding(benchmark, draw)
    file = write(tmp_path / "bench.jsonl", [{"text": text.upper()} for text in benchmark])
    expected = {}
    for prompt in prompts:
        hits = [n for n in (13, 8) if any(grams(prompt, n) & grams(question, n) for question in benchmark)]
        if any(normal_form(prompt) == normal_form(question) for question in benchmark):
            expected[prompt] = "exact"
        elif hits:
            expected[prompt] = f"{hits[0]}-gram"
    section = {"heldout_size": 0, "decontaminate": {"benchmarks": [{"source": str(file), "column": "text"}], "heldout": False}}
    manifest, tables = made(tmp_path, list(map(question, prompts)), **section)
    matches = read_rows(tmp_path / "run" / "prompts", "matches")
    assert dict(zip(texts(tables["dropped"]), [row["kind"] for row in matches], strict=True)) == expected
    kinds = list(expected.values())
    assert manifest.facts["alike"] == {"in_benchmark": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}
    assert {"13-gram", "8-gram"} <= set(kinds) and len(expected) < len(prompts) and manifest.drops == {"in_benchmark": len(expected)}
    for match in matches:
        assert match["set"] == str(file) and match["other_text"] == normal_form(benchmark[match["row"] - 1])
        if match["kind"] != "exact":
            inside = match["shared"] if " " in match["text"] else match["shared"].replace(" ", "")
            assert inside in match["text"] and inside in match["other_text"]
    found = survey(recipe(tmp_path / "run", tmp_path / "run.jsonl", **section).prompts, 0, 3)
    assert (found.train, found.drops) == (len(tables["train"]), manifest.drops)


def test_short_questions_match_nothing_but_themselves_and_boilerplate_nothing_at_all(tmp_path: Path) -> None:
    boiler = "please reason step by step and put your final answer in a box"
    benchmark = [{"q": "Why?"}, {"q": "What is 7+1?"}, {"q": f"An odd question about pens. {boiler}"}]
    file = write(tmp_path / "bench.jsonl", benchmark)
    asked = [{"question": f"{row['question']} Why? {boiler}", "answer": 1} for row in rows(50)]
    leaked = [question("what is  7 + 1 ?"), question("WHY ?"), question("Here: an odd question about pens please reason step, or not.")]
    section = {"benchmarks": [{"source": str(file), "column": "q"}], "heldout": False, "ngrams": [8]}
    manifest, tables = made(tmp_path, [*asked, *leaked], heldout_size=0, decontaminate=section)
    assert len(tables["train"]) == 50 and texts(tables["dropped"]) == [row["question"] for row in leaked]
    assert manifest.facts["alike"] == {"in_benchmark": {"exact": 2, "8-gram": 1}} and manifest.facts["boilerplate_runs"] == 6
    everything, _ = made(tmp_path, [*asked, *leaked, question("new")], "all", heldout_size=0, decontaminate=section | {"boilerplate": 1.0})
    assert everything.drops == {"in_benchmark": 53}


def test_fuzzy_questions_are_found_at_the_similarity_that_is_asked_for(tmp_path: Path) -> None:
    draw = random.Random(8)
    source = families(70, draw)
    benchmark, prompts = source[::3], [text for place, text in enumerate(source) if place % 3]
    file = write(tmp_path / "bench.jsonl", list(map(question, benchmark)))
    asked = {"benchmarks": [str(file)], "exact": False, "ngrams": [], "heldout": False, "similarity": 0.6}
    _, tables = made(tmp_path, list(map(question, prompts)), heldout_size=0, decontaminate=asked)
    near = [text for text in prompts if any(jaccard(text, other) >= 0.6 for other in benchmark)]
    assert texts(tables["dropped"]) == near and near
    for match, text in zip(read_rows(tmp_path / "run" / "prompts", "matches"), near, strict=True):
        assert match["similarity"] == pytest.approx(max(jaccard(text, other) for other in benchmark)) and match["kind"] == "similar"


def test_a_run_that_grows_keeps_what_it_trains_on_and_compares_the_rest(tmp_path: Path) -> None:
    draw = random.Random(9)
    base = [" ".join(draw.choices(LATIN, k=20)) for _ in range(40)]
    bench = write(tmp_path / "bench.jsonl", [question(" ".join(draw.choices(LATIN, k=20)))])
    leak = json.loads(bench.read_text())["question"]
    section = {"near_duplicates": {}, "decontaminate": {"benchmarks": [str(bench)]}, "heldout_size": 5}
    _, before = made(tmp_path, list(map(question, base)), **section)
    held, trained = texts(before["heldout"])[0], texts(before["train"])[0]
    new = [f"{trained}s", f"{held}s", f"so {leak}", " ".join(draw.choices(LATIN, k=20))]
    grown, after = made(tmp_path, list(map(question, [*new, *base])), **section)  # in front: they come later all the same
    assert texts(after["heldout"]) == texts(before["heldout"]) and texts(after["train"]) == [new[3], *texts(before["train"])]
    assert grown.grew_from and grown.drops == {"near_duplicate": 1, "near_heldout": 1, "in_benchmark": 1}
    write(bench, [question("another")])
    with pytest.raises(StageConflictError, match=r"benchmarks_sha256.*bench\.jsonl: its content has changed"):
        made(tmp_path, list(map(question, base)), **section)
    with pytest.raises(StageConflictError, match="near_duplicates"):
        made(tmp_path, list(map(question, base)), heldout_size=5)


def test_a_recipe_that_asks_for_nothing_is_the_run_that_it_was(tmp_path: Path) -> None:
    manifest, _ = made(tmp_path, rows())
    assert not {"near_duplicates", "decontaminate"} & manifest.settings["prompts"].keys() and "benchmarks_sha256" not in manifest.settings
    assert "matches" not in manifest.tables


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"benchmarks": ["nowhere.jsonl"]}, "there is no such file"),
        ({"benchmarks": [{"source": "embedded:arithmetic", "column": "text"}]}, r"prompts\.decontaminate: .*there is no column 'text'"),
        (
            {"benchmarks": [{"source": "embedded:arithmetic", "subset": "main"}]},
            r"decontaminate\.benchmarks\.subset: is for data",
        ),
        ({"heldout": False}, "there is nothing to compare with"),
        ({"exact": False, "ngrams": []}, "nothing is looked for"),
        ({"ngrams": [8, 13]}, "the largest first"),
        ({"ngrams": [], "boilerplate": 0.5}, "boilerplate is for ngrams"),
    ],
)
def test_what_can_not_be_compared_is_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, ValueError), match=message):
        survey(recipe(tmp_path / "run", write(tmp_path / "p.jsonl", rows()), decontaminate=section).prompts, 0, 3)


def test_the_same_is_found_whatever_the_hash_seed_and_the_command_says_it(tmp_path: Path) -> None:
    texts_of = families(40, random.Random(10))
    source, bench = (
        write(tmp_path / "p.jsonl", list(map(question, texts_of))),
        write(tmp_path / "b.jsonl", list(map(question, texts_of[::5]))),
    )
    section = {"heldout_size": 10, "near_duplicates": {}, "decontaminate": {"benchmarks": [str(bench)], "similarity": 0.7}}
    tables = []
    for seed in ("1", "2"):
        asked = recipe(tmp_path / seed, source, **section)
        (tmp_path / "r.yaml").write_text(asked.model_dump_json(exclude_defaults=True))
        words = [sys.executable, "-m", "distill", "prompts", str(tmp_path / "r.yaml")]
        done = subprocess.run(words, env={"PYTHONHASHSEED": seed, "PATH": ""}, cwd=commands.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        drops = read_manifest(tmp_path / seed / "prompts").drops
        assert all(f"{count} {reason}" in done.stdout for reason, count in drops.items())
        assert {"in_benchmark", "near_heldout", "near_duplicate"} <= drops.keys()
        tables.append([read_rows(tmp_path / seed / "prompts", table) for table in ("train", "heldout", "dropped", "matches")])
    assert tables[0] == tables[1] and not run(asked).grew_from


@pytest.mark.slow
def test_memory_holds_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak over 2,400 prompts of 800 characters, half of them near-duplicates, against that over 1,200: 450 bytes a prompt more at most."""
    monkeypatch.setattr("distill.data.near._KNOWN", 10_000)
    draw = random.Random(11)

    def peak(count: int) -> int:
        long = [" ".join(f"{draw.getrandbits(28):x}" for _ in range(100)) for _ in range(count // 2)]
        source = write(tmp_path / f"{count}.jsonl", [question(text + end) for text in long for end in ("", " end")])
        tracemalloc.start()
        assert run(recipe(tmp_path / str(count), source, near_duplicates={})).drops["near_duplicate"] >= 0.4 * count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports and the like
    few, many = peak(1200), peak(2400)
    assert many - few < 1200 * 450, (many - few) / 1200


def test_runs_of_words_know_no_process(tmp_path: Path) -> None:
    """Places are those of the first other text that has the run."""
    with Texts(tmp_path) as kept:
        kept.add(["a b c d e f", "x a b c d", "zero a b c d y", "c d e f g"])
        search = Search(kept, [0, 1], [4, 3])
        found = list(search.find(np.array([2, 3]), 0.01))
    assert [tuple(each) for each in found] == [(2, 0, 4, "a b c d"), (3, 0, 4, "c d e f")] and search.num_common == 0
