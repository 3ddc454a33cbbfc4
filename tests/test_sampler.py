"""The sampler: what can be set, what is refused, and how settings become numbers."""

import pytest

from common.errors import UserError
from synth.sampler import METHODS, Sampler, Settings, Space, in_turn

WIDE = Space((0.0, 2.0), (0.1, 1.0), ("plain", "varied", "careful"), METHODS)


def test_each_setting_is_got_and_set_alone_and_all_together():
    sampler = Sampler(WIDE)
    assert sampler.get() == Settings(1.0, 1.0, "plain", "generate_from_seed")
    sampler.temperature, sampler.top_p = 0.3, 0.5
    sampler.template, sampler.method = "careful", "evolve_instructions"
    assert sampler.get() == Settings(0.3, 0.5, "careful", "evolve_instructions")
    assert (sampler.temperature, sampler.top_p, sampler.template, sampler.method) == (
        0.3, 0.5, "careful", "evolve_instructions",
    )  # fmt: skip
    assert sampler.template_text.startswith("{request}") and "twice" in sampler.template_text
    sampler.set(Settings())
    assert sampler.get() == Settings()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 2.1}, "temperature is 2.1; it must lie within 0 to 2"),
        ({"top_p": 0.05}, "top_p is 0.05; it must lie within 0.1 to 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"template": "long"}, "template is 'long'; use one of plain, varied, careful"),
        ({"method": "other"}, "method is 'other'; use one of generate_from_seed, evolve_instructions"),
    ],
)
def test_settings_outside_the_space_are_refused_and_change_nothing(changed, message):
    sampler = Sampler(WIDE)
    for name, value in changed.items():
        with pytest.raises(UserError, match=message):
            setattr(sampler, name, value)
    assert sampler.get() == Settings()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": (1.0, 0.5)},
        {"temperature": (-0.1, 1.0)},
        {"top_p": (0.5, 1.1)},
        {"top_p": (0.0, 1.0)},
        {"templates": ()},
        {"methods": ("guess",)},
    ],
)
def test_impossible_spaces_are_refused(wrong):
    with pytest.raises(UserError):
        Space(**wrong)


def test_a_template_needs_a_place_for_the_request():
    with pytest.raises(UserError, match=r"'mine' has no text with \{request\}"):
        Sampler(Space(templates=("mine",)), Settings(template="mine"), {"mine": "Be brief."})


def test_settings_are_held_within_the_space_and_rounded():
    assert WIDE.within(Settings(2.4, -1.0)) == Settings(2.0, 0.1)
    assert WIDE.within(Settings(0.1 + 0.2, 0.7 + 0.1)) == Settings(0.3, 0.8)


def test_settings_as_a_vector_by_hand():
    settings = Settings(0.5, 0.55, "varied", "evolve_instructions")
    assert WIDE.as_vector(settings) == pytest.approx([0.25, 0.5, 0, 1, 0, 0, 1])
    assert Space((1.0, 1.0), (0.5, 1.0)).as_vector(Settings()) == [0.0, 1.0, 1.0, 1.0]


def test_seed_rows_are_taken_in_turn_from_the_first():
    rows = [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [in_turn(rows, number)["n"] for number in range(1, 6)] == [0, 1, 2, 0, 1]
