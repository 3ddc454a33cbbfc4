"""What temperature, top_p and template change in the offline teacher's answers, against its own documentation."""

import math

import pytest

from synth import prompts
from synth.offline.sampling import FAVOURITES, sampling_of
from synth.offline.server import OfflineTeacher
from synth.prompts import TEMPLATES, NewSample, with_template
from synth.task import SHIPPED, load_task
from synth.teacher.structured import read_json_answer
from tests.test_offline_teacher import body, truth

SUMS = load_task(SHIPPED / "arithmetic.yaml")


def samples(count, template="plain", stage=None, **parameters):
    """What a teacher of error rate 0.2 gives for samples 1 to `count`."""
    teacher, found = OfflineTeacher(error_rate=0.2), []
    for number in range(count):
        messages = stage() if stage else prompts.new_sample(SUMS, None, None, number)
        request = body(with_template(messages, TEMPLATES[template]), NewSample, **parameters)
        content = teacher.complete(request, str(number))["choices"][0]["message"]["content"]
        found.append(read_json_answer(content, NewSample)[0])
    return found


def wrong(found):
    return sum(one.output != truth(one.input) for one in found)


def test_at_a_spread_of_one_nothing_is_changed():
    for request in ({}, {"temperature": 1, "top_p": 1.0}, {"temperature": 2.0, "top_p": 0.5}, {"temperature": "hot"}):
        assert sampling_of(request, "a prompt", 0.2) == (pytest.approx(0.2), 0.0)
    assert sampling_of({"temperature": 0}, "", 0.0).error_rate == 0 and sampling_of({}, "", 1.0).error_rate == 1


def test_errors_and_repeats_by_hand():
    # spread 0.5 · 0.8 = 0.4; odds 0.25 · e^(−1.8)
    odds = 0.25 * math.exp(-1.8)
    found = sampling_of({"temperature": 0.5, "top_p": 0.8}, "a prompt", 0.2)
    assert found == pytest.approx((odds / (1 + odds), 0.6))
    varied = sampling_of({"temperature": 0.4}, "a prompt" + TEMPLATES["varied"].removeprefix("{request}"), 0.2)
    assert varied == pytest.approx((2 * odds / (1 + 2 * odds), 0.3))
    careful = sampling_of({"temperature": 0.4}, "a prompt" + TEMPLATES["careful"].removeprefix("{request}"), 0.2)
    assert careful == pytest.approx((odds / 3 / (1 + odds / 3), 0.6))
    assert sampling_of({"temperature": 2.0}, "", 0.2).error_rate == pytest.approx(0.8340, abs=1e-4)


def test_the_teacher_errs_and_repeats_itself_accordingly():
    cool, usual, hot = (samples(300, temperature=temperature) for temperature in (0.2, 1.0, 1.6))
    assert wrong(cool) < 20 < 40 < wrong(usual) < 85 < 150 < wrong(hot)
    distinct = [len({one.input for one in found}) for found in (cool, usual, hot)]
    assert distinct[0] < FAVOURITES + 90 and min(distinct[1:]) > 260
    assert samples(40) == usual[:40]  # what is not said counts as 1
    assert wrong(samples(300, "careful", temperature=1.0)) < 40


def test_top_p_does_what_temperature_does():
    assert samples(60, temperature=1.0, top_p=0.4) == samples(60, temperature=0.4, top_p=1.0)
    assert samples(60, temperature=1.0, top_p=0.4) != samples(60, temperature=1.0)


def test_harder_samples_repeat_themselves_too():
    found = samples(100, stage=lambda: prompts.harder(SUMS, "812 + 779 =", "1591", None), temperature=0.05)
    assert len({one.input for one in found}) <= FAVOURITES + 15
