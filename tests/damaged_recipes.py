"""Damaged recipes and overrides of many kinds, from a seed; see `damage`."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import Case

RECIPE = """\
name: damaged
seed: 3
run_dir: run
teacher:
  model: embedded:teacher
student:
  model: embedded:student
  adapter: {type: lora, r: 8}
prompts:
  source: problems.jsonl
  heldout_size: 2
  columns: {prompt: question, reference: answer}
generate:
  temperature: 0.7
  max_new_tokens: 64
curate:
  checks: [finish, math]
train:
  max_length: 512
  trainer_args:
    learning_rate: 1e-5
evaluate:
  models: [base, student]
"""
ROWS = "".join(f'{{"question": "What is {n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(12)).encode()
KEYS = (
    "teacher.model",
    "student.dtype",
    "prompts.heldout_size",
    "generate.top_p",
    "curate.prefer",
    "train.overlong",
    "evaluate.confidence",
)
SECTIONS = ("teacher", "student", "prompts", "generate", "curate", "train", "evaluate")
LINES = RECIPE.splitlines(keepends=True)

Maker = Callable[[random.Random], Case]
_MAKERS: dict[str, Maker] = {}


def recipe_cases(rng: random.Random, count: int) -> list[Case]:
    """So many cases, of every kind equally many but for one."""
    makers = list(_MAKERS.items())
    return [make(rng)._replace(kind=name) for name, make in (makers[number % len(makers)] for number in range(count))]


def kind(maker: Maker) -> Maker:
    """A maker of cases under its name."""
    _MAKERS[maker.__name__] = maker
    return maker


def of(text: str | bytes, *given: str, **about: Any) -> Case:
    """A case of a recipe's text and overrides."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return Case("", {"recipe.yaml": content, "problems.jsonl": ROWS}, ["check", "--quick", "recipe.yaml", *given], **about)


def at(path: str, prepare: Callable[[Path], object] = lambda folder: None, **about: Any) -> Case:
    """A case of a recipe's path."""
    return Case("", {"problems.jsonl": ROWS}, ["check", "--quick", path], prepare=prepare, **about)


def under(section: str, line: str, text: str = RECIPE) -> str:
    """The recipe with a line more in a section."""
    return text.replace(f"{section}:\n", f"{section}:\n  {line}\n", 1)


def line_of(section: str) -> str:
    """Where the first line in a section stands."""
    return f"recipe.yaml:{LINES.index(section + ':' + chr(10)) + 2}"


def misspelt(rng: random.Random, word: str) -> str:
    place = rng.randrange(1, len(word))
    return word[:place] + rng.choice(["", "x", word[place] * 2]) + word[place + 1 :] + "z"


def add(maker: Callable[..., Case], name: str, *arguments: Any) -> None:
    """A kind from a maker with arguments behind the random numbers."""
    _MAKERS[name] = lambda rng: maker(rng, *arguments)


# The text as a whole


@kind
def truncated(rng: random.Random) -> Case:
    return of(RECIPE[: rng.randrange(len(RECIPE))], valid=None)


@kind
def a_flipped_bit(rng: random.Random) -> Case:
    content = bytearray(RECIPE.encode())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return of(bytes(content), valid=None)


@kind
def a_sign_put_in(rng: random.Random) -> Case:
    place = rng.randrange(len(RECIPE))
    return of(RECIPE[:place] + rng.choice("{}[]:,#&*!|>'\"%@`-?\t\0\x1b\x85\u2028\ufeff~=<") + RECIPE[place:], valid=None)


@kind
def a_line_gone(rng: random.Random) -> Case:
    place = rng.randrange(len(LINES))
    return of("".join(LINES[:place] + LINES[place + 1 :]), valid=None)


@kind
def a_line_twice(rng: random.Random) -> Case:
    place = rng.randrange(len(LINES))
    return of("".join(LINES[: place + 1] + LINES[place:]), valid=None)


@kind
def two_lines_exchanged(rng: random.Random) -> Case:
    lines = list(LINES)
    first, second = rng.sample(range(len(lines)), 2)
    lines[first], lines[second] = lines[second], lines[first]
    return of("".join(lines), valid=None)


@kind
def set_in_wrongly(rng: random.Random) -> Case:
    place = rng.randrange(1, len(LINES))
    return of("".join([*LINES[:place], " " * rng.randrange(1, 9) + LINES[place], *LINES[place + 1 :]]), valid=None)


@kind
def random_bytes(rng: random.Random) -> Case:
    return of(rng.randbytes(rng.randrange(1, 4000)), says=("recipe.yaml",))


for _name, _text in {
    "empty": b"",
    "a_comment_alone": b"# nothing\n",
    "a_list": b"- name: x\n",
    "a_word": b"hello\n",
    "two_documents": RECIPE.encode() + b"---\n" + RECIPE.encode(),
    "json_lines": b'{"a": 1}\n{"b": 2}\n',
    "utf16": RECIPE.encode("utf-16"),
    "latin1": RECIPE.replace("damaged", "dämäged").encode("latin-1"),
    "a_tab": RECIPE.replace("  model", "\tmodel", 1).encode(),
    "unclosed_bracket": RECIPE.replace("math]", "math").encode(),
    "unclosed_quote": RECIPE.replace("0.7", "'0.7").encode(),
}.items():
    add(lambda rng, text: of(text, says=("recipe.yaml",)), _name, _text)
for _name, _text in {
    "byte_order_mark": b"\xef\xbb\xbf" + RECIPE.encode(),
    "carriage_returns": RECIPE.replace("\n", "\r\n").encode(),
    "a_comment_more": RECIPE.encode() + b"# {[\n",
    "merged_mapping": RECIPE.replace("teacher:\n", "teacher: &t\n").replace("model: embedded:student", "<<: *t").encode(),
}.items():
    add(lambda rng, text: of(text, valid=True), _name, _text)


# What YAML can do


@kind
def deep_lists(rng: random.Random) -> Case:
    return of(under(rng.choice(SECTIONS), "x: " + "[" * 3000 + "]" * 3000), says=("recipe.yaml", "levels"))


@kind
def deep_mappings(rng: random.Random) -> Case:
    deep = "".join(" " * (level + 2) + "a:\n" for level in range(rng.randrange(600, 800)))
    return of(RECIPE + "x:\n" + deep, says=("recipe.yaml", "levels"))


@kind
def a_bomb_of_aliases(rng: random.Random) -> Case:
    lines = ["b0: &b0 [x, x, x, x, x, x, x, x, x]"] + [
        f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, rng.randrange(6, 12))
    ]
    return of(RECIPE + "\n".join(lines), says=("recipe.yaml",))


@kind
def an_alias_of_itself(rng: random.Random) -> Case:
    return of(under(rng.choice(SECTIONS), rng.choice(["x: &a [*a]", "x: &a {b: *a}"])), says=("recipe.yaml",))


for _name, _line in {
    "unknown_alias": "x: *nothing",
    "unknown_tag": "x: !thing 5",
    "a_tag_of_python": "x: !!python/object/apply:os.system [ls]",
    "binary": "x: !!binary aGVsbG8=",
    "a_set": "x: !!set {a, b}",
    "no_number": "batch_size: !!int abc",
    "no_float": "x: !!float abc",
    "no_bool": "x: !!bool perhaps",
    "a_list_as_key": "? [a, b]\n  : 5",
    "merged_word": "<<: word",
    "half_a_pair": 'x: "\\ud800"',
    "nul": 'x: "a\\0b"',
    "a_number_as_key": "5: x",
    "control_in_a_key": '"\\e]0;x\\a": 5',
    "bidi_in_a_key": '"a\\u202eb": 5',
}.items():
    add(lambda rng, line: of(under(rng.choice(SECTIONS), line), says=("recipe.yaml",)), _name, _line)


@kind
def a_date_for_a_number(rng: random.Random) -> Case:
    return of(RECIPE.replace("seed: 3", "seed: 2026-01-31"), says=("recipe.yaml:2", "seed"))


@kind
def a_date_that_is_none(rng: random.Random) -> Case:
    date = rng.choice(["2026-02-30", "2026-13-45", "9999-99-99", "2026-01-31 25:61:61"])
    return of(under("student", f"licence: {date}"), valid=True, gives=(("student.licence", date),))


@kind
def thousands_of_digits(rng: random.Random) -> Case:
    digits = rng.choice(["9" * 5000, "0x" + "f" * 5000, "1" * 30])
    return of(RECIPE.replace("seed: 3", f"seed: {digits}"), says=("recipe.yaml:2",))


@kind
def not_finite(rng: random.Random) -> Case:
    key = rng.choice(["curate|check_timeout_s", "evaluate|check_timeout_s", "generate|min_p", "train|kd"])
    section, name = key.split("|")
    value = rng.choice([".inf", ".nan", "-.inf", "1e999"])
    return of(under(section, f"{name}: {{weight: {value}}}" if name == "kd" else f"{name}: {value}"), says=("recipe.yaml",))


@kind
def a_long_value(rng: random.Random) -> Case:
    return of(under("curate", f"workers: {'x' * rng.choice([100_000, 2_000_000])}"), says=("recipe.yaml",))


@kind
def a_long_key(rng: random.Random) -> Case:
    return of(under(rng.choice(SECTIONS), f"? {'k' * 20_000}\n  : 5"), says=("recipe.yaml",))


@kind
def two_thousand_unknown_keys(rng: random.Random) -> Case:
    return of(RECIPE + "".join(f"unknown{n}: {n}\n" for n in range(2000)), says=("recipe.yaml", "more"))


@kind
def a_list_of_many(rng: random.Random) -> Case:
    return of(RECIPE.replace("[finish, math]", f"[{', '.join(['math'] * 12_000)}]"), says=("recipe.yaml",))


# Keys and values


@kind
def misspelt_key(rng: random.Random) -> Case:
    key = rng.choice(KEYS)
    section, name = key.split(".")
    wrong = misspelt(rng, name)
    return of(under(section, f"{wrong}: 1"), says=(line_of(section), f"{section}.{wrong}", "unknown key"))


@kind
def key_of_another_section(rng: random.Random) -> Case:
    section, name = rng.choice([("generate", "source"), ("train", "temperature"), ("curate", "max_length"), ("teacher", "adapter")])
    return of(under(section, f"{name}: 1"), says=(line_of(section), f"{section}.{name}", "unknown key", "Did you mean"))


@kind
def key_of_the_other_kind(rng: random.Random) -> Case:
    key, value = rng.choice([("score.target", "{kind: top_k, draws: 50}"), ("student.adapter", "{type: full, r: 8}")])
    return of(RECIPE, f"--{key}", value, says=("command line", key, "goes with"))


@kind
def unknown_section(rng: random.Random) -> Case:
    wrong = misspelt(rng, rng.choice(SECTIONS))
    return of(RECIPE + f"{wrong}: {{a: 1}}\n", says=(f"recipe.yaml:{len(LINES) + 1}", wrong))


@kind
def missing_key(rng: random.Random) -> Case:
    line, key = rng.choice(
        [("name: damaged\n", "name"), ("  model: embedded:student\n", "student.model"), ("  source: problems.jsonl\n", "source")]
    )
    return of(RECIPE.replace(line, ""), says=("recipe.yaml", key, "missing"))


@kind
def wrong_type(rng: random.Random) -> Case:
    old, new, key = rng.choice(
        [
            ("seed: 3", "seed: three", "seed"),
            ("seed: 3", "seed: 3.5", "seed"),
            ("seed: 3", "seed: true", "seed"),
            ("seed: 3", "seed: [3]", "seed"),
            ("seed: 3", "seed: null", "seed"),
            ("name: damaged", "name: {a: b}", "name"),
            ("r: 8", 'r: "8"', "student.adapter.r"),
            ("0.7", "hot", "generate.temperature"),
            ("[finish, math]", "math", "curate.checks"),
            ("max_length: 512", "max_length: {a: 1}", "train.max_length"),
            ("[base, student]", "{base: 1}", "evaluate.models"),
            ("source: problems.jsonl", "source: null", "prompts.source"),
        ]
    )
    return of(RECIPE.replace(old, new), says=("recipe.yaml:", key))


@kind
def out_of_range(rng: random.Random) -> Case:
    old, new, key = rng.choice(
        [
            ("seed: 3", "seed: -1", "seed"),
            ("r: 8", "r: 0", "student.adapter.r"),
            ("0.7", "-0.1", "generate.temperature"),
            ("max_new_tokens: 64", "top_p: 1.5", "generate.top_p"),
            ("max_length: 512", "max_length: 0", "train.max_length"),
            ("heldout_size: 2", "heldout_size: -2", "prompts.heldout_size"),
            ("heldout_size: 2", "heldout_size: 100", "heldout_size"),
            ("[base, student]", "[base, base]", "evaluate.models"),
        ]
    )
    command = ["prompts", "recipe.yaml"] if "100" in new else ["check", "--quick", "recipe.yaml"]
    return of(RECIPE.replace(old, new), says=(key,))._replace(words=command)


@kind
def no_such_choice(rng: random.Random) -> Case:
    old, new = rng.choice([("type: lora", "type: lorra"), ("math]", "maths]"), ("student]", "pupil]"), ("max_length: 512", "method: rl")])
    return of(RECIPE.replace(old, new), says=("recipe.yaml:",))


@kind
def section_as_a_word(rng: random.Random) -> Case:
    section = rng.choice(SECTIONS)
    return of(RECIPE, f"--{section}", rng.choice(["fast", "5", "[1]", "true"]), says=("command line", section))


@kind
def wrong_trainer_args(rng: random.Random) -> Case:
    line, words = rng.choice(
        [
            ("learning_rat: 1e-5", "Did you mean learning_rate"),
            ("learning_rate: fast", "learning_rate must be"),
            ("max_length: 5", "set train.max_length"),
            ("packing: 1", "packing must be"),
            (f"learning_rate: {'x' * 5000}", "learning_rate must be"),
        ]
    )
    return of(RECIPE.replace("learning_rate: 1e-5", line), says=("recipe.yaml:21", words))


@kind
def a_secret(rng: random.Random) -> Case:
    name = rng.choice(["hub_token", "token", "api_key", "password", "client_secret"])
    place = rng.choice(["train.trainer_args", "student.chat_template_kwargs", "teacher", "rollouts.trainer_args"])
    return of(RECIPE, f"--{place}.{name}", "hf_abcdefgh", says=(name, "secret"), hides=("abcdefgh",))


@kind
def a_pattern_that_is_none(rng: random.Random) -> Case:
    pattern = rng.choice(["((", "a", "(a)(b)", "(" * 5000 + ")" * 5000, "(a{99999999999999})", "(?P<a>b)(?P<a>c)", "(\ud800)"])
    return of(RECIPE, "--prompts.answer_pattern", pattern, says=("command line", "prompts.answer_pattern"))


# The path of the recipe


def _socket(folder: Path) -> None:
    before = Path.cwd()
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("recipe.yaml")
    os.chdir(before)


for _name, _path, _make in [
    ("a_pipe", "recipe.yaml", lambda folder: os.mkfifo(folder / "recipe.yaml")),
    ("a_device", "/dev/zero", lambda folder: None),
    ("a_socket", "recipe.yaml", _socket),
    ("a_folder", "recipe.yaml", lambda folder: (folder / "recipe.yaml").mkdir()),
    ("not_there", "recipe.yaml", lambda folder: None),
    ("a_link_to_nothing", "recipe.yaml", lambda folder: (folder / "recipe.yaml").symlink_to("absent")),
    ("a_link_to_itself", "recipe.yaml", lambda folder: (folder / "recipe.yaml").symlink_to("recipe.yaml")),
    ("a_long_name", "x" * 300, lambda folder: None),
    ("below_a_file", "problems.jsonl/recipe.yaml", lambda folder: None),
    ("bytes_in_a_name", "a\udcff.yaml", lambda folder: None),
    ("controls_in_a_name", "a\x1b[2J.yaml", lambda folder: None),
    ("a_data_file", "problems.jsonl", lambda folder: (folder / "problems.jsonl").write_bytes(ROWS * 20_000)),
]:
    add(lambda rng, path, make: at(path, make, says=(path[:5] if path.isprintable() else "",)), f"recipe_is_{_name}", _path, _make)


# Overrides


for _name, _given, _says in [
    ("no_value", ["--seed"], "--seed has no value"),
    ("no_dashes", ["seed", "3"], "'seed' is not expected"),
    ("no_key", ["--=5"], "command line"),
    ("dots_alone", ["--...", "5"], "command line"),
    ("into_a_word", ["--name.first", "x"], "name is a plain value"),
    ("into_a_list", ["--curate.checks.first", "math"], "curate.checks"),
    ("deep_override", ["--student.chat_template_kwargs", "[" * 3000], "levels"),
    ("deep_key", ["--student.chat_template_kwargs" + ".a" * 3000, "5"], "command line"),
    ("word_for_a_number", ["--seed", "5 # five"], "seed"),
    ("bytes_in_an_override", ["--student.revision", "a\udcff"], "command line: student.revision"),
    ("controls_in_an_override", ["--seed", "\x1b]0;x\x07"], "command line: seed"),
    ("long_override", ["--seed", "9" * 100_000], "command line: seed"),
    ("misspelt_override", ["--generate.temprature", "1"], "Did you mean generate.temperature"),
]:
    add(lambda rng, given, says: of(RECIPE, *given, says=(says,)), _name, _given, _says)

TEXTS = [
    "####\\s*(.+)",
    "runs/exp #3",
    "Q: {prompt}",
    "1234567",
    "2026-01-31",
    "runs/s*",
    "exp[1]",
    "exp:1",
    "0x10",
    "1e5",
    "yes",
    "'a'",
    "[a",
    "{b",
]


@kind
def text_as_it_stands(rng: random.Random) -> Case:
    key, value = (
        rng.choice(["run_dir", "student.revision", "prompts.system_prompt", "teacher.licence", "train.trainer_args.run_name"]),
        rng.choice(TEXTS),
    )
    return of(RECIPE, f"--{key}", value, valid=True, gives=((key, value),))


@kind
def values_as_yaml(rng: random.Random) -> Case:
    key, word, value = rng.choice(
        [
            ("seed", "5", 5),
            ("generate.temperature", "1e-1", 0.1),
            ("student.adapter.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
            ("student.chat_template_kwargs", "{thinking: true}", {"thinking": True}),
            ("evaluate", "null", None),
            ("run_dir", "null", None),
        ]
    )
    return of(RECIPE, f"--{key}={word}", valid=True, gives=((key, value),))


# Where the run and its data are


for _name, _path, _make in [
    ("a_file", "taken", lambda folder: (folder / "taken").touch()),
    ("below_a_file", "taken/run", lambda folder: (folder / "taken").touch()),
    ("a_link_to_itself", "loop/run", lambda folder: (folder / "loop").symlink_to("loop")),
    ("too_long", "x" * 300, lambda folder: None),
    ("in_proc", "/proc/absent/run", lambda folder: None),
    ("empty", "", lambda folder: None),
]:
    add(
        lambda rng, path, make: of(RECIPE, "--run_dir", path, prepare=make)._replace(
            words=["prompts", "recipe.yaml", "--run_dir", path], valid=None if not path else False
        ),
        f"run_dir_{_name}",
        _path,
        _make,
    )
for _name, _given, _says in [
    ("absent_source", ["--prompts.source", "absent.jsonl"], "there is no such file"),
    ("glob_of_nothing", ["--prompts.source", "absent/*.jsonl"], "absent"),
    ("no_glob", ["--prompts.source", "**a/*.jsonl"], "**a"),
    ("subset_of_a_file", ["--prompts.subset", "main"], "prompts.subset"),
    ("split_of_a_file", ["--prompts.split", "test"], "prompts.split"),
    ("split_of_no_heldout", ["--prompts.heldout_split", "validation"], "prompts.heldout_split"),
    ("long_source", ["--prompts.source", "x" * 300 + ".jsonl"], "too long"),
    ("controls_in_a_source", ["--prompts.source", "./a\x1b[2J"], "no data"),
    ("folder_as_source", ["--prompts.source", "."], "no data"),
]:
    add(lambda rng, given, says: of(RECIPE, *given, says=(says,))._replace(words=["prompts", "recipe.yaml", *given]), _name, _given, _says)
