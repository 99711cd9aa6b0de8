"""The rows that stages exchange, as Arrow schemas. `null` means unknown, never zero."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

Message = dict[str, str]
"""One turn of a conversation: `role` and `content`, and those of EXTRAS that it has."""

EXTRAS = ("tools", "tool_calls", "tool_call_id", "name")
"""What a turn may have besides, as text: the tools that the model may call (a JSON list, on the first turn alone), the calls of an
assistant (a JSON list of `{"type": "function", "function": {"name", "arguments": object}}`, some with an `id`), and of a tool's result
which call it answers, and which tool."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
"""Around the reasoning in every completion, whatever a family's template does with it."""

MESSAGES = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", *EXTRAS)]))

PROMPT = pa.schema(
    [
        ("prompt_id", pa.string()),  # stable hash of `messages`
        ("messages", MESSAGES),
        ("reference", pa.string()),  # the right answer, or null
        ("source", pa.string()),
        ("tags", pa.list_(pa.string())),
    ]
)

TRACE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("author", pa.string()),  # teacher, student or base
        ("messages", MESSAGES),
        ("reference", pa.string()),
        ("completion", pa.string()),  # as text, reasoning included, end of turn not
        ("prompt_ids", pa.list_(pa.int32())),  # in the author's vocabulary; null for brought traces, and where a server tells none
        ("completion_ids", pa.list_(pa.int32())),  # the same; end of turn included if it was written
        ("finish_reason", pa.string()),  # stop, length or error; null for brought traces
        ("seed", pa.uint64()),  # null for brought traces
    ]
)

# Whether the source of brought traces calls the answer right (null: not known); their table has it where traces.verdict names a column.
TOLD = pa.field("verdict", pa.bool_())

# A dropped row is a trace and the reason it went.
DROPPED_TRACE = TRACE.append(pa.field("reason", pa.string()))

# What else its author might have written, a row a trace in the order of the table `traces`; lists have an entry a token written.
ALTERNATIVES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("token_logprobs", pa.list_(pa.float32())),  # of the written token, in nats; null where the server told nothing of this trace
        ("logprobs", pa.list_(pa.list_(pa.float32()))),  # of the most probable ones
        ("token_ids", pa.list_(pa.list_(pa.int32()))),  # which these are, in the author's vocabulary; null where it was not told
        ("token_bytes", pa.list_(pa.list_(pa.binary()))),  # else what they write
        ("written_bytes", pa.list_(pa.binary())),  # what the written tokens write; null where it was not told
    ]
)

DROPPED_PROMPT = PROMPT.append(pa.field("reason", pa.string()))

# What a training prompt was too much like to stay one; both texts in normal form, without system prompt and template.
MATCH = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("reason", pa.string()),  # in_benchmark, near_heldout or near_duplicate
        ("kind", pa.string()),  # exact, similar, or as 13-gram
        ("set", pa.string()),  # the benchmark, heldout or train
        ("row", pa.int64()),  # of the other in its source, from 1
        ("text", pa.string()),
        ("other_text", pa.string()),
        ("shared", pa.string()),  # words in both; null where nothing was looked for but the whole
        ("similarity", pa.float64()),  # share of runs of five characters; null where it was not computed
    ]
)

# Further columns of the source for the checks to look at, as a JSON object; the tables of prompts have it where prompts.fields names some.
FIELDS = pa.field("fields", pa.string())

VERDICT = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("check", pa.string()),
        ("passed", pa.bool_()),  # null: could not be judged
        ("reason", pa.string()),
    ]
)

# What the student made of a trace that competed with others of its prompt, summed over its tokens; null where it would not train on it.
RANKS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("tokens", pa.int32()),  # in its own vocabulary, without the end of the turn
        ("rank", pa.float64()),  # of the written token among all, at most 100 each; rank / surprisal is the Rank-Surprisal Ratio
        ("surprisal", pa.float64()),  # nats
    ]
)

# Prompts of whose judged traces none passes, with the number of samples that were asked for.
UNSOLVED = pa.schema([("prompt_id", pa.string()), ("samples", pa.int32())])

ANSWER = pa.schema(
    [
        ("set", pa.string()),  # "heldout", or the name of a further held-out set, with which its prompts' ids begin
        ("tags", pa.list_(pa.string())),  # of the prompt
        ("model_role", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("correct", pa.bool_()),  # null: could not be judged
        ("reason", pa.string()),
        ("truncated", pa.bool_()),
        ("num_tokens", pa.int32()),  # of the completion, end of turn included
        ("final", pa.string()),  # what it puts forward, in a spelling that equal answers share; null for nothing
        ("in_form", pa.bool_()),  # whether that has the form which the checks expect; null where they expect none
    ]
)

SCORE = pa.schema(
    [
        ("set", pa.string()),
        ("tag", pa.string()),  # null for all prompts of the set
        ("model_role", pa.string()),  # or two, "student-base", for a difference; "gap" for the share of the teacher-base gap recovered
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),  # interval; null where none was computed
        ("high", pa.float64()),
        ("num_prompts", pa.int32()),
        ("samples_per_prompt", pa.int32()),
    ]
)

# What a teacher thinks of an answer of its own, at every token of it in the student's ids: the candidates of all tokens in one list.
THOUGHT = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("tokens", pa.int32()),  # null: the answer can't be put to both models
        ("ids", pa.list_(pa.int32())),  # -1 where a token has fewer candidates than others
        ("log_probs", pa.list_(pa.float32())),
        ("log_rest", pa.list_(pa.float32())),  # of all other tokens, an entry a token
        ("first_lost", pa.list_(pa.bool_())),  # whether the teacher's most probable token is none of the student's; null: of none
    ]
)

# What a model thinks of an answer of the teacher, summed over its tokens, and how alike its own is.
LIKENESS = pa.schema(
    [
        ("model_role", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("reason", pa.string()),  # why it was not read; null where it was
        ("num_bytes", pa.int32()),  # of the answer, as UTF-8
        ("num_tokens", pa.int32()),  # in the model's own vocabulary, end of turn included
        ("log_prob", pa.float64()),  # nats
        ("predicted", pa.int32()),  # tokens that are the model's most probable
        ("compared", pa.int32()),  # tokens where it is known what the teacher thinks, as are the next three
        ("kl_nats", pa.float64()),  # KL(teacher ‖ model); null of the teacher
        ("agreed", pa.int32()),  # tokens of which both hold the same most probable
        ("held", pa.float64()),  # of the teacher's probability, what lies on tokens compared one by one
        ("chrf", pa.float64()),  # of its own answer to the teacher's, 0 to 100
    ]
)

# How sure a model is of an answer of its own.
CERTAINTY = pa.schema(
    [
        ("model_role", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("num_tokens", pa.int32()),  # behind its reasoning, end of turn excluded
        ("log_prob", pa.float64()),  # of these, in nats; null where it was not read
    ]
)

# Whose answer to a prompt a judge prefers, of two; a row a pair.
PREFERENCE = pa.schema(
    [
        ("model_role", pa.string()),
        ("against", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("winner", pa.string()),  # one of the two, or tie; null: could not be judged
        ("reason", pa.string()),
    ]
)

# How often one model's answers are preferred to another's.
WINS = pa.schema(
    [
        ("model_role", pa.string()),
        ("against", pa.string()),
        ("value", pa.float64()),  # share of prompts won, a tie counted as half
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("num_prompts", pa.int32()),  # of which a pair could be judged
        ("tie_rate", pa.float64()),  # of the judged pairs
        ("unjudged_rate", pa.float64()),  # of all pairs
    ]
)


CONFUSION = pa.schema(
    [
        ("set", pa.string()),
        ("model_role", pa.string()),
        ("reference", pa.string()),  # the right label
        ("answer", pa.string()),  # the one that was answered; null: none, or several
        ("count", pa.int32()),
    ]
)

# A number of a public benchmark, of one model, or the student's difference from the base.
BENCHMARK = pa.schema(
    [
        ("model_role", pa.string()),  # base, student, teacher; or "student - base"
        ("asked", pa.string()),  # the recipe's name: of a group or tag there are rows of all tasks in it
        ("task", pa.string()),
        ("metric", pa.string()),
        ("filter", pa.string()),  # how the answer was taken out of what was written
        ("value", pa.float64()),
        ("stderr", pa.float64()),  # lm-eval's; null where it gives none
        ("low", pa.float64()),  # interval of a difference
        ("high", pa.float64()),
        ("interval_by", pa.string()),  # how that was found
        ("num_documents", pa.int64()),
        ("num_fewshot", pa.int32()),
        ("higher_is_better", pa.bool_()),
        ("task_version", pa.string()),
        ("scorer", pa.string()),
        ("scorer_version", pa.string()),
    ]
)


def prompt_id(messages: list[Message]) -> str:
    """Stable id of a prompt: the first 16 hex digits of the SHA-256 of its messages."""
    plain = [{"role": message["role"], "content": message["content"]} | extras_of(message) for message in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()[:16]


def extras_of(message: Mapping[str, str | None]) -> dict[str, str]:
    """What a turn has besides role and content; Arrow writes null for what it has not."""
    return {name: value for name in EXTRAS if (value := message.get(name)) is not None}


def spoken(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """A conversation as chat templates and servers take it: turns with their calls as objects, and the tools apart, or null."""
    turns: list[dict[str, Any]] = []
    tools: list[Any] | None = None
    for message in messages:
        turn: dict[str, Any] = {"role": message["role"], "content": message["content"]} | extras_of(message)
        if (listed := turn.pop("tools", None)) is not None:
            tools = json.loads(listed)
        if "tool_calls" in turn:
            turn["tool_calls"] = json.loads(turn["tool_calls"])
        turns.append(turn)
    return turns, tools


def trace_key(trace: dict[str, Any]) -> str:
    """Name of a trace in its run: whose answer to which prompt it is."""
    return f"{trace['prompt_id']}/{trace['sample_index']}"
