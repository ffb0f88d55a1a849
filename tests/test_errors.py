"""The sentences that a person reads when something is mistyped."""

import pytest

from effilib.errors import BadInput, NoEffect, NotApplicable, choose

PRESETS = ["smoke", "quick", "study", "full"]


def test_what_is_among_the_choices_comes_back():
    assert choose("preset", "quick", PRESETS) == "quick"
    assert choose("preset", "quick", iter(PRESETS)) == "quick"
    assert choose("preset", "quick", {"quick": 1}) == "quick"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("quikc", "unknown preset 'quikc': choose one of smoke, quick, study, full (did you mean 'quick'?)"),
        ("zzz", "unknown preset 'zzz': choose one of smoke, quick, study, full"),
        ("", "unknown preset '': choose one of smoke, quick, study, full"),
        (7, "unknown preset 7: choose one of smoke, quick, study, full"),
        (None, "unknown preset None: choose one of smoke, quick, study, full"),
    ],
)
def test_the_sentence_names_the_thing_the_choices_and_a_near_miss(value, sentence):
    with pytest.raises(BadInput) as error:
        choose("preset", value, PRESETS)
    assert str(error.value) == sentence


def test_of_many_choices_the_nearest_are_named_and_their_number():
    with pytest.raises(BadInput) as error:
        choose("layer", "layer-1x", [f"layer-{i}" for i in range(50)])
    sentence = str(error.value)
    assert "50 in all" in sentence
    assert len(sentence) < 200
    assert "layer-1" in sentence


def test_of_many_choices_the_first_are_named_if_none_is_near():
    with pytest.raises(BadInput, match=r"choose one of 100, 101, .*\(50 in all\)$"):
        choose("number", "zzz", range(100, 150))


def test_bad_input_is_a_value_error_and_no_effect_is_not():
    assert issubclass(BadInput, ValueError)
    assert not issubclass(NoEffect, ValueError)
    assert issubclass(NotApplicable, BadInput)
