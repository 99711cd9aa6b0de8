"""Intervals against the bootstrap's own definition: all resamples written out, where there are few enough."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from distill.measure.intervals import RESAMPLES, gap_recovered, mean_interval, resampled_means, sign_flip_p


def every_resample(values: np.ndarray) -> np.ndarray:
    """Means of all P**P ways to draw P prompts with replacement: the distribution that resampling approaches."""
    prompts = range(len(values))
    return np.array([values[list(drawn)].mean() for drawn in itertools.product(prompts, repeat=len(values))])


def test_resampled_means_have_the_exact_distribution() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.5, 0.0])
    exact = every_resample(values)
    [draws] = resampled_means(values[None], seed=0)
    assert len(draws) == RESAMPLES
    for mean in np.unique(exact):
        share = np.mean(np.isclose(exact, mean))
        assert np.mean(np.isclose(draws, mean)) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / RESAMPLES) + 1e-9)


def test_models_are_paired() -> None:
    """Two models that differ by a constant on every prompt differ by it in every resample."""
    values = np.random.default_rng(0).random(40)
    draws_RB = resampled_means(np.stack([values, values + 0.25]), seed=1)
    np.testing.assert_allclose(draws_RB[1] - draws_RB[0], 0.25, atol=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """120 experiments of 100 prompts at a known accuracy: 95 % intervals hold it in about 95 % of them."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(120):
        values = (rng.random(100) < 0.6).astype(float)
        estimate = mean_interval(values, resampled_means(values[None], seed)[0], 0.95)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.89 <= covered / 120 <= 0.99


def gap(base: np.ndarray, student: np.ndarray, teacher: np.ndarray) -> tuple[float | None, float | None, float | None]:
    values = np.stack([base, student, teacher])
    means = values.mean(axis=1)
    return gap_recovered((means[0], means[1], means[2]), resampled_means(values, 0), 0.95)


def test_the_gap_is_the_share_between_base_and_teacher() -> None:
    base, teacher = np.zeros(100), np.ones(100)
    student = np.array([1.0] * 70 + [0.0] * 30)
    value, low, high = gap(base, student, teacher)
    assert value == pytest.approx(0.7)
    assert low is not None and high is not None and 0.59 < low < 0.63 and 0.77 < high < 0.81  # +- 1.96 * sqrt(.7 * .3 / 100)


def test_a_student_that_answers_as_its_teacher_has_recovered_all_of_it() -> None:
    rng = np.random.default_rng(0)
    base, teacher = (rng.random(200) < 0.3).astype(float), (rng.random(200) < 0.9).astype(float)
    assert gap(base, teacher, teacher) == pytest.approx((1.0, 1.0, 1.0))
    assert gap(base, base, teacher) == pytest.approx((0.0, 0.0, 0.0))


def test_no_gap_no_share() -> None:
    ones = np.ones(50)
    assert gap(ones, ones, ones) == (None, None, None)
    # A teacher barely better than the base: the interval of its lead holds zero, and a share of that says nothing.
    base = np.array([0.0, 1.0] * 25)
    teacher = base.copy()
    teacher[0] = 1.0
    assert gap(base, base, teacher) == (None, None, None)


def test_a_difference_that_signs_alone_may_give_has_a_large_p_value() -> None:
    """Against the definition: all ways in which the signs could have fallen."""
    assert sign_flip_p(np.ones(3), 0) == 2 / 2**3
    assert sign_flip_p(np.array([1, 1, 1, 1, 1, 1, 0, 0.0]), 0) == 2 / 2**6
    assert sign_flip_p(np.zeros(5), 0) == 1.0 and sign_flip_p(np.empty(0), 0) == 1.0
    moved = np.array([0.5, -0.25, 0.75, 0.25, 1.0])
    sums = [abs(float(np.dot(signs, np.abs(moved)))) for signs in itertools.product((1, -1), repeat=5)]
    assert sign_flip_p(moved, 0) == pytest.approx(np.mean([each >= abs(moved.sum()) - 1e-9 for each in sums]))
    many = np.random.default_rng(0).normal(0.3, 1.0, 400)
    assert sign_flip_p(many, 1) < 0.001 < 0.2 < sign_flip_p(many - many.mean() + 0.01, 1)


def test_the_p_value_of_drawn_signs_is_that_of_all() -> None:
    drawn = sign_flip_p(np.array([1.0] * 12 + [-1.0] * 4), 0)  # of 16, of which 12 or more fall one way
    exact = 2 * sum(math.comb(16, count) for count in range(12, 17)) / 2**16
    assert drawn == pytest.approx(exact, abs=0.01)
