"""Targets of a trace to bytes and back: ids and counts exactly, probabilities to the nearest value of a fixed grid.

What makes it small: the log-probabilities of a position never rise, so the gaps between their codes are small numbers;
counts of draws sum to N, so the first is left out; tokens drawn equally often have no order of their own, so their ids
rise and only the steps are stored; and an id that comes back within the trace is written once. FORMAT.md has the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.targets.bits import BitReader, BitWriter, Integers, best_shift, rice_bits
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

FLOOR = -88.0
"""Finite log-probabilities below this many nats become it: exp(-88) is where float32 runs out of normal numbers."""
CANDIDATE_BITS, SINGLE_BITS = 11, 14
WEIGHT_STEP = 1 / 64
"""Distance of neighbouring importance weights, in nats: at most 0.8 % error."""

_POSITIONS = struct.Struct("<I")
_PREFIX = struct.Struct("<IIBB")  # entries of the dictionary, fewest candidates of a position, two widths

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Targets:
    """What the teacher thinks of a trace, or of consecutive positions of it.

    Axes: n positions, K the most candidates that one of them has. A position's candidates are its first ones, distinct,
    in order of falling `log_probs`. One without a candidate (for `chosen_token`: with -inf) has no target: the teacher reads
    other tokens there. Its `log_rest` is 0 where there is one, all mass being rest.
    """

    ids: NDArray[np.int32]
    """(n, K) token ids, padded with -1; (n, 0) for `chosen_token`, whose ids are the trace's own."""
    log_probs: Floats
    """(n, K) nats at temperature 1, padded with -inf. For `sampled` the logarithm of the weight, count / N (times p / q
    with a tempered proposal): exp of it is an unbiased estimate of p, and with a tempered proposal may exceed 1."""
    log_rest: Floats
    """(n,) logarithm of the mass of all other tokens. -inf for `sampled`, whose weights stand for the whole."""
    first_lost: Mask | None = None
    """(n,) whether the teacher's most probable token is none of the student's, so that the first candidate is a later one of the teacher's;
    null where none is. Training has no use for it: it is not stored with targets."""

    def __len__(self) -> int:
        return len(self.log_rest)

    def __getitem__(self, part: slice) -> Targets:
        """Some of the positions."""
        return Targets(
            self.ids[part], self.log_probs[part], self.log_rest[part], None if self.first_lost is None else self.first_lost[part]
        )


def concatenate(parts: Sequence[Targets]) -> Targets:
    """The positions of all parts, one after another, padded to the most candidates."""
    ids, log_probs = _stack([part.ids for part in parts], -1), _stack([part.log_probs for part in parts], -np.inf)
    return Targets(ids, log_probs, np.concatenate([part.log_rest for part in parts]))


def _stack(arrays: Sequence[NDArray[Any]], padding: float) -> NDArray[Any]:
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=padding) for array in arrays])


class Grid:
    """Falling values with their codes 0, 1, ... A value is stored as the nearest code; only -inf becomes -inf, the last one.

    Args:
        size: Number of finite values.
        value_of: Values of codes.
        code_of: Its inverse, on real numbers.
    """

    def __init__(self, size: int, value_of: Callable[[Doubles], Doubles], code_of: Callable[[Doubles], Doubles]) -> None:
        self.values: Floats = np.append(value_of(np.arange(size, dtype=np.float64)), -np.inf).astype(np.float32)
        self._code_of = code_of

    def codes(self, values: Floats) -> Integers:
        """Nearest codes; a finite value below the grid becomes its lowest.

        Raises:
            ValueError: a value lies above the grid, beyond rounding, or is NaN.
        """
        if not (values <= self.values[0] + 1e-3).all():
            raise ValueError(f"targets: a log-probability is above {self.values[0]:g} or NaN, the largest is {values.max()}")
        lowest = len(self.values) - 2
        real = self._code_of(np.minimum(values, self.values[0]).astype(np.float64))
        codes: Integers = np.rint(np.minimum(real, lowest)).astype(np.int64)
        codes[values == -np.inf] = lowest + 1
        return codes


def square_grid(bits: int) -> Grid:
    """Log-probabilities FLOOR (c/C)² for c = 0 to C = 2^bits - 2, and -inf: fine near 0, where probability is.

    `square_grid_error` bounds the error.
    """
    last = 2**bits - 2
    # Adding 0.0 turns -0.0 into 0.0.
    return Grid(last + 1, lambda codes: FLOOR * (codes / last) ** 2 + 0.0, lambda values: np.sqrt(values / FLOOR) * last)


def square_grid_error(nats: Doubles, bits: int) -> Doubles:
    """Largest rounding error of log-probabilities -nats, 0 <= nats <= 88: sqrt(88 x) / C + 22 / C², float32's own aside."""
    last = 2**bits - 2
    error: Doubles = np.sqrt(-FLOOR * nats) / last - FLOOR / (4 * last**2)
    return error


def weight_grid(target: Sampled, vocab_size: int) -> Grid:
    """Log-weights of draws from a tempered proposal, `WEIGHT_STEP` apart, from the largest that can occur.

    With q = p^(1/τ) / Z a weight is at most p/q = p^(1-1/τ) Z. For τ > 1 that is at most Z <= V^(1-1/τ). For τ < 1 it has no
    bound, but a token so improbable that its weight exceeds e^88 is not drawn in the life of a user.
    """
    tau = target.proposal_temperature
    highest = np.log(vocab_size) * (1 - 1 / tau) if tau > 1 else -FLOOR
    highest = float(np.ceil(highest) + 1)
    size = int((highest - FLOOR) / WEIGHT_STEP) + 1
    return Grid(size, lambda codes: highest - WEIGHT_STEP * codes, lambda values: (highest - values) / WEIGHT_STEP)


class Codec:
    """Encodes and decodes the targets of one kind.

    Args:
        target: The kind and its settings.
        vocab_size: Number of token ids, without padding of the head.
    """

    def __init__(self, target: TargetSpec, vocab_size: int) -> None:
        self.target = target
        self.vocab_size = vocab_size
        self._single = square_grid(SINGLE_BITS)
        self._grid = weight_grid(target, vocab_size) if isinstance(target, Sampled) else square_grid(CANDIDATE_BITS)
        # N where weights are plain counts of draws, else 0.
        self._draws = target.draws if isinstance(target, Sampled) and not target.weighted else 0
        self._values = self._grid.values
        if self._draws:
            with np.errstate(divide="ignore"):
                self._values = np.log(np.arange(self._draws + 1) / self._draws).astype(np.float32)

    def encode(self, targets: Targets) -> bytes:
        """The bytes of a row.

        Raises:
            ValueError: the arrays break what `Targets` promises, or don't belong to this kind.
        """
        streams = BitWriter()
        if isinstance(self.target, ChosenToken):
            if targets.log_probs.shape != (len(targets), 1) or targets.ids.shape[1]:
                raise ValueError(f"targets: chosen_token has one log-probability a position and no ids, got {targets.log_probs.shape}")
            streams.rice(self._single.codes(targets.log_probs[:, 0]))
            return _POSITIONS.pack(len(targets)) + streams.to_bytes()
        filled = _check(targets, self.vocab_size)
        numbers_n = filled.sum(1)
        fewest = int(numbers_n.min(initial=filled.shape[1]))
        number_width = (int(numbers_n.max(initial=0)) - fewest).bit_length() if len(targets) else 0
        streams.fixed(numbers_n - fewest, number_width)
        if isinstance(self.target, TopK):
            streams.rice(self._single.codes(targets.log_rest))
        levels = self._levels(targets, filled)
        streams.rice(self._gaps(levels, filled))
        entries, places, place_width = _dictionary(targets.ids[filled].astype(np.int64), self.vocab_size)
        streams.rice(np.diff(entries, prepend=-1) - 1)
        tied = self._tied(levels, filled)
        steps = np.diff(places, prepend=0)[tied] - 1
        if (steps < 0).any():
            raise ValueError("targets: among tokens drawn equally often, ids must rise")
        streams.rice(steps)
        streams.fixed(places[~tied], place_width)
        return _POSITIONS.pack(len(targets)) + _PREFIX.pack(len(entries), fewest, number_width, place_width) + streams.to_bytes()

    def decode(self, payload: bytes) -> Targets:
        """The targets of bytes that `encode` made; that they are unaltered is the caller's concern."""
        (n,) = _POSITIONS.unpack_from(payload)
        if isinstance(self.target, ChosenToken):
            log_probs_n = self._single.values[BitReader(payload[_POSITIONS.size :]).rice(n)]
            return Targets(np.empty((n, 0), np.int32), log_probs_n[:, None], log_one_minus_exp(log_probs_n))
        num_entries, fewest, number_width, place_width = _PREFIX.unpack_from(payload, _POSITIONS.size)
        streams = BitReader(payload[_POSITIONS.size + _PREFIX.size :])
        numbers_n = streams.fixed(n, number_width) + fewest
        num_candidates = int(numbers_n.sum())
        filled = np.arange(int(numbers_n.max(initial=0))) < numbers_n[:, None]
        log_rest_n = np.full(n, -np.inf, np.float32)
        if isinstance(self.target, TopK):
            log_rest_n = self._single.values[streams.rice(n)]
        num_first = int((numbers_n > 0).sum()) if self._draws else 0  # follow from the sum of the counts
        levels = self._levels_of(streams.rice(num_candidates - num_first), filled)
        entries = np.cumsum(streams.rice(num_entries) + 1) - 1
        tied = self._tied(levels, filled)
        num_tied = int(tied.sum())
        places = np.empty(num_candidates, np.int64)
        places[tied] = streams.rice(num_tied) + 1
        places[~tied] = streams.fixed(num_candidates - num_tied, place_width)
        if num_tied:
            places = _sums_from(places, ~tied)
        ids = np.full(filled.shape, -1, np.int32)
        ids[filled] = entries[places] if num_entries else places
        log_probs = self._values[levels]
        log_probs[~filled] = -np.inf
        return Targets(ids, log_probs, log_rest_n)

    def _levels(self, targets: Targets, filled: Mask) -> Integers:
        """(n, K) what is stored for the log-probabilities: numbers of draws, or codes of the grid."""
        if not self._draws:
            return self._grid.codes(targets.log_probs)
        counts: Integers = np.rint(np.exp(targets.log_probs.astype(np.float64)) * self._draws).astype(np.int64)
        if (counts.sum(1) != self._draws * filled.any(1)).any() or (counts[filled] < 1).any():
            raise ValueError(f"targets: counts of a position must be at least 1 and sum to {self._draws} draws")
        return counts

    def _gaps(self, levels: Integers, filled: Mask) -> Integers:
        """Differences of neighbouring levels: codes rise from 0; counts fall to 1, and the first follows from their sum."""
        if not self._draws:
            gaps: Integers = np.diff(levels, axis=1, prepend=0)[filled]
        else:
            following = np.pad(levels[:, 1:], ((0, 0), (0, 1)))
            gaps = (levels - np.maximum(following, 1))[:, 1:][filled[:, 1:]]
        return gaps

    def _levels_of(self, gaps: Integers, filled: Mask) -> NDArray[np.int32]:
        """(n, K) levels from their `_gaps`."""
        levels = np.zeros(filled.shape, np.int32)
        if not self._draws:
            levels[filled] = gaps
            return levels.cumsum(1, dtype=np.int32)
        levels[:, 1:][filled[:, 1:]] = gaps
        levels = levels[:, ::-1].cumsum(1, dtype=np.int32)[:, ::-1] + filled
        levels[:, :1] = (self._draws - levels[:, 1:].sum(1, keepdims=True)) * filled[:, :1]
        return levels

    def _tied(self, levels: NDArray[Any], filled: Mask) -> Mask:
        """(candidates,) whether a token was drawn as often as the one before it, so that only the step in ids is stored."""
        tied = np.zeros(filled.shape, np.bool_)
        if self._draws:
            tied[:, 1:] = levels[:, 1:] == levels[:, :-1]
        return tied[filled]


def _dictionary(ids: Integers, vocab_size: int) -> tuple[Integers, Integers, int]:
    """The distinct ids where it pays to store them once, what then stands for each id, and its width in bits."""
    present = np.zeros(vocab_size, np.bool_)
    present[ids] = True
    entries = np.flatnonzero(present)
    gaps = np.diff(entries, prepend=-1) - 1
    plain_width, width = (vocab_size - 1).bit_length(), max(len(entries) - 1, 0).bit_length()
    if len(ids) * width + rice_bits(gaps, best_shift(gaps)) < len(ids) * plain_width:
        return entries, (np.cumsum(present) - 1)[ids], width
    return entries[:0], ids, plain_width


def _sums_from(values: Integers, is_start: Mask) -> Integers:
    """Running sums that begin anew at every start."""
    sums = np.cumsum(values)
    starts = np.flatnonzero(is_start)
    before = sums[starts] - values[starts]
    summed: Integers = sums - before[np.cumsum(is_start) - 1]
    return summed


def log_one_minus_exp(log_probs: Floats) -> Floats:
    """log(1 - exp(x)) for x <= 0, without cancellation near 0."""
    with np.errstate(divide="ignore"):
        return np.log(-np.expm1(log_probs.astype(np.float64))).astype(np.float32)


def _check(targets: Targets, vocab_size: int) -> Mask:
    """Where candidates stand, after the promises of `Targets` were checked."""
    ids, log_probs = targets.ids, targets.log_probs
    if ids.shape != log_probs.shape or ids.ndim != 2 or targets.log_rest.shape != (len(ids),):
        raise ValueError(f"targets: shapes don't fit: ids {ids.shape}, log_probs {log_probs.shape}, log_rest {targets.log_rest.shape}")
    filled: Mask = ids >= 0
    if ids.max(initial=-1) >= vocab_size or (filled[:, 1:] > filled[:, :-1]).any():
        raise ValueError(f"targets: ids must lie below the vocabulary's {vocab_size}, padded with -1 at the end")
    if (log_probs[:, 1:] > log_probs[:, :-1]).any() or (log_probs[~filled] > -np.inf).any():
        raise ValueError("targets: log_probs of a position must not rise, and be padded with -inf")
    return filled
