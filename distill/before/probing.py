"""The claims about one server that is there: what it has, what it reads, what comes back, how fast, and what the whole run will take."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING

from distill import embedded
from distill.before.asking import Asking, prompt_logprobs, read_tokens, reasoning_field, written_tokens
from distill.before.expected import Job, Lengths, expected, lengths
from distill.before.findings import Findings
from distill.errors import ServerError
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec
from distill.run.schema import THINK_CLOSE, THINK_OPEN, Message
from distill.servers import Answer, Call
from distill.targets.spec import TargetSpec

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat
    from distill.servers.client import Client
    from distill.servers.protocols import Protocol

_SHORT, _FAST, _LONGEST = 16, 64, 2048  # tokens of an answer that is compared, timed, measured
_AT_ONCE, _MEASURED = 16, 4  # requests that are timed together; answers whose length is measured
_MEASURED_S = 60.0  # that these may take
_PATIENCE_S, _RETRIES = 180.0, 1


class Probed:
    """A server that is asked.

    Args:
        role: Whose model it holds.
        spec: The model, with `server`.
        chat: Its tokenizer and template, if they are here.
        prompts: Some that a run would send.
        jobs: What stages will ask; the first says how tokens are drawn.
        logprobs: Alternatives that are asked for beside each written token.
        target: What is to be scored there, if anything.
        found: Where claims are said.
    """

    def __init__(
        self,
        role: str,
        spec: ModelSpec,
        chat: ChatFormat | None,
        prompts: list[list[Message]],
        jobs: list[Job],
        logprobs: int | None,
        target: TargetSpec | None,
        found: Findings,
    ) -> None:
        assert spec.server is not None
        self.role, self.spec, self.server, self.chat = role, spec, spec.server, chat
        self.prompts, self.jobs, self.logprobs, self.target, self.found = prompts, jobs, logprobs, target, found
        self.sampling = jobs[0].sampling if jobs else Sampling(temperature=1.0, top_p=1.0)
        self._turns = cycle(prompts)

    def check(self) -> None:
        """All of them.

        Raises:
            ServerError: it can't be reached, or refuses.
        """
        from distill.servers.client import Client
        from distill.servers.protocols import protocol_of

        patience = {"max_retries": _RETRIES, "timeout_s": min(self.server.timeout_s, _PATIENCE_S), "concurrency": _AT_ONCE}
        patient = self.server.model_copy(update=patience)
        with Client(patient, self.server.urls) as client:
            name = self._model(client, protocol_of(self.server, self.server.model or self.spec.model))
            if name is None:
                return
            protocol = protocol_of(self.server, name)
            self._context(client, protocol)
            if protocol.facts.takes_ids and self.chat is None:
                self._say_unknown("answers", "its prompts are sent as tokens, and the model's tokenizer is not here")
                return
            asking = Asking(self.spec, client, protocol, self.chat, self.sampling)
            self._answer(asking)
            self._repeats(asking)
            self._log_probabilities(asking)
            if not self.server.batch:
                self._speed(asking)

    def _model(self, client: Client, protocol: Protocol) -> str | None:
        """The name that it knows the model by, if it has it."""
        wanted = self.server.model or self.spec.model
        if not protocol.facts.lists_models:
            self._say_unknown("models", "it does not tell which it serves")
            return self.server.model or embedded.resolve(self.spec.model)
        try:
            names = protocol.model_names(client.ask(protocol.models()))
        except ServerError as error:
            if not self.server.is_hosted or "401" in str(error) or "402" in str(error):
                raise
            self._say_unknown("models", "it does not list them")
            return wanted
        if wanted not in names and self.server.model is None and len(names) == 1:
            wanted = names[0]
        if wanted in names:
            self._say("models", f"{wanted}" + (f", one of {len(names):,}" if len(names) > 1 else ""))
            return wanted
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:3]
        has = f"it has {', '.join(close)}{' and others' if len(names) > len(close) else ''}" if names else "it has none"
        self.found.bad(self._claim("models"), f"{wanted} is not among them: {has}. Set {self.role}.server.model.")
        return None

    def _context(self, client: Client, protocol: Protocol) -> None:
        """Whether prompts of the sample leave room for an answer."""
        try:
            context = protocol.context_of(client.ask(protocol.context()), protocol.model)
        except ServerError:  # a host that lists nothing
            context = None
        longest = max((job.sampling.max_new_tokens for job in self.jobs), default=0)
        if context is None or self.chat is None:
            self._say_unknown("context", "it does not tell" if context is None else "the tokenizer is not here")
            return
        over = sum(len(self.chat.prompt_ids(prompt)) + longest > context for prompt in self.prompts)
        detail = f"{context:,} tokens, answers up to {longest:,}"
        if over == len(self.prompts):
            self.found.bad(self._claim("context"), f"{detail}: no prompt has room. Lower max_new_tokens, or start it with more context.")
        elif over:
            self.found.warn(
                self._claim("context"), f"{detail}: {over:,} of {len(self.prompts):,} prompts have no room, and would be dropped"
            )
        else:
            self._say("context", detail)

    def _answer(self, asking: Asking) -> None:
        """What one answer shows: tokens of its prompt, ids, where its reasoning is, what is otherwise than asked."""
        seen = asking.answers([asking.call(self.prompts[0], _FAST)])[0]
        answer = seen.answer
        for name, what in answer.notes.items():
            self.found.warn(self._claim(name), str(what))
        self._compare_tokens(answer, asking.protocol.facts.takes_ids)
        self._say("ids of an answer", "come" if answer.completion_ids is not None else "do not come; its text is tokenised here")
        field = reasoning_field(seen.raw)
        inside = "between think tags in the text" if THINK_OPEN in answer.text or THINK_CLOSE in answer.text else "none seen"
        self._say("reasoning", f"in the field {field}" if field else inside)
        if written_tokens(answer) > 2 * _FAST:
            self.found.warn(self._claim("max_new_tokens"), f"{_FAST} tokens were allowed, {written_tokens(answer):,} came")

    def _compare_tokens(self, answer: Answer, sent_ids: bool) -> None:
        """Tokens of a prompt there and here: wrong templates and tokenizers are the commonest fault that nobody sees."""
        claim, read = self._claim("tokens of a prompt"), read_tokens(answer)
        ours = None if self.chat is None else self.chat.prompt_ids(self.prompts[0])
        if read is None or ours is None:
            self.found.unknown(claim, "it does not tell" if read is None else "the tokenizer is not here")
        elif (answer.prompt_ids is not None and answer.prompt_ids != ours) or (sent_ids and read != len(ours)):
            self.found.bad(
                claim, f"{len(ours):,} were sent, and {read:,} that are not these were read. It holds another model or tokenizer."
            )
        elif read != len(ours):
            self.found.warn(
                claim,
                f"{read:,} there, {len(ours):,} here: its template or tokenizer is not that of {self.spec.model}. See the first traces.",
            )
        else:
            self._say("tokens of a prompt", f"{read:,} there and here{', the same' if answer.prompt_ids is not None else ''}")

    def _repeats(self, asking: Asking) -> None:
        """Whether a seed repeats, and several samples come at once."""
        prompt, facts = self.prompts[0], asking.protocol.facts
        if not facts.has_seeds:
            self._say("seed", "none is taken: no answer can be repeated")
        elif self.sampling.temperature == 0:
            self._say("seed", "not needed at temperature 0")
        else:
            calls = [asking.call(prompt, _SHORT, seed=seed) for seed in (11, 11, 12)]
            # One at a time: some kinds keep a seed apart from others only so.
            first, again, other = (asking.answers([call])[0].answer.text for call in calls)
            if first != again:
                self.found.warn(self._claim("seed"), "it does not repeat an answer: traces can't be made again")
            else:
                self._say("seed", "repeats an answer" + (", and another gives the same" if other == first else ""))
        if facts.many:
            number = asking.samples(asking.call(prompt, _SHORT))
            self._say("samples of a request", f"{number} of 2 asked for" if number else "one: n is refused")

    def _log_probabilities(self, asking: Asking) -> None:
        facts, prompt = asking.protocol.facts, self.prompts[0]
        number = self.logprobs or min(facts.logprobs, 20)
        if number:
            try:
                came = asking.answers([asking.call(prompt, _SHORT, logprobs=number)])[0].answer.alternatives
            except ServerError as error:
                came, refused = None, f", {error}"
            else:
                refused = ""
            most = max((len(row) for row in came.logprobs), default=0) if came is not None else 0
            detail = f"{most} of {number} asked for" + (refused if not most else "")
            if self.logprobs and most < number:
                self.found.bad(self._claim("log-probabilities"), f"{detail}. Lower generate.logprobs, or take another server.")
            else:
                self._say("log-probabilities", detail if most else f"none{refused}")
        else:
            self._say("log-probabilities", "none")
        if self.target is not None:
            self.found.prove(self._claim("log-probabilities of a prompt"), lambda: self._reading(asking))

    def _reading(self, asking: Asking) -> str:
        if self.chat is None or not asking.protocol.facts.prompt_logprobs:
            raise ServerError("it can't be asked for them, and score needs them. Use score.source: process, or another server.")
        assert self.target is not None
        k = self.target.k if self.target.kind == "top_k" else 1
        came = prompt_logprobs(asking.raw(asking.protocol.reading(self.chat.prompt_ids(self.prompts[0]), k, 1)))
        if came is None:
            raise ServerError("none came, and score needs them. Use score.source: process, or another server.")
        if came < k:
            raise ServerError(f"{came} of {k} came a token. Start it with --max-logprobs {k}, or lower score.target.k.")
        return f"{k} a token"

    def _speed(self, asking: Asking) -> None:
        """Tokens a second, and from the lengths of a few answers the hours and the money of the stages."""
        if not self.jobs:
            return
        many = min(_AT_ONCE, asking.protocol.facts.at_once or _AT_ONCE)
        alone, _ = asking.timed([asking.call(next(self._turns), _FAST)])
        together = alone
        if many > 1:
            together, _ = asking.timed(list(self._calls(asking, many, _FAST)))
        at_once = f", {together:,.0f} at {many} requests at once" if many > 1 else ""
        self._say("tokens a second", f"{alone:,.0f}{at_once} (answers of at most {_FAST} tokens)")
        longest = self.jobs[0].sampling.max_new_tokens
        cap = min(longest, _LONGEST, max(_FAST, int(together / min(many, _MEASURED) * _MEASURED_S)))
        seen = asking.answers(list(self._calls(asking, _MEASURED, cap)))
        told = [(written_tokens(one.answer), one.answer.finish_reason == "length") for one in seen]
        prompt = sum(read_tokens(one.answer) or 0 for one in seen) / len(seen)
        self._expect(prompt, lengths(told, longest), together, sum(cut for _, cut in told), cap)

    def _calls(self, asking: Asking, number: int, longest: int) -> Iterator[Call]:
        return (asking.call(prompt, longest, seed=seed) for seed, prompt in enumerate(islice(self._turns, number)))

    def _expect(self, prompt: float, answer: Lengths, rate: float, cut: int, cap: int) -> None:
        said, least = [], 0.0
        for job in self.jobs:
            text, cost = expected(job, prompt, answer, rate, self.server.price)
            said.append(text)
            least = max(least, cost)
        detail = f"{'; '.join(said)} (from {_MEASURED} answers, {cut} of them cut at {cap:,} tokens; at this speed)"
        if self.server.max_cost is not None and least > self.server.max_cost:
            self.found.warn(
                self._claim("hours and money"), f"{detail}. server.max_cost (${self.server.max_cost:,.2f}) ends a stage before."
            )
        else:
            self._say("hours and money" if self.server.price else "hours", detail)

    def _claim(self, what: str) -> str:
        return f"{self.role}'s server: {what}"

    def _say(self, what: str, detail: str) -> None:
        self.found.good(self._claim(what), detail)

    def _say_unknown(self, what: str, reason: str) -> None:
        self.found.unknown(self._claim(what), reason)
