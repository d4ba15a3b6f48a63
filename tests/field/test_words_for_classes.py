"""--classes: a word that is a class's name and another class's label is refused, with both readings said."""

import pytest

from maskalign.errors import UsageError
from maskalign.sampling.settings import parse_classes

TEXT_ORDER = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...: what data sets built earlier have
FROM_ONE = ["1", "2", "3"]


def test_names_that_are_their_labels_have_one_reading():
    names = [str(number) for number in range(12)]
    assert parse_classes("2,10", names) == [2, 10] and parse_classes("2-4", names) == [2, 3, 4]
    assert parse_classes("2 3", names) == [2, 3]


@pytest.mark.parametrize(
    "text, names, readings",
    [
        ("2", TEXT_ORDER, ["the name of label 4", "label 2 ('10')", "name:2 or label:2"]),
        ("2-2", TEXT_ORDER, ["the classes '2' to '2'", "label 2 ('10')", "label:2-2"]),
        ("0-5", TEXT_ORDER, ["the classes '0' to '5'", "the labels 0 ('0') to 5"]),
        ("1", FROM_ONE, ["the name of label 0", "label 1 ('2')"]),
        ("cat,2", ["cat", "2", "dog"], ["the name of label 1", "label 2 ('dog')"]),
        ("2-3", ["a", "2-3", "b", "c"], ["the name of label 1", "the labels 2 ('b') to 3"]),
        ("1, 2", ["1, 2", "1", "2"], ["the name of label 0", "the labels 1, 2"]),
        ("CAT", ["Cat", "cat"], ["several classes", "label:0 and label:1"]),
        ("crane", ["crane", "crane"], ["several classes", "label:0 and label:1"]),
    ],
)
def test_both_readings_are_said(text, names, readings):
    with pytest.raises(UsageError) as error:
        parse_classes(text, names)
    assert all(reading in str(error.value) for reading in readings), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, names, labels",
    [
        ("name:2", TEXT_ORDER, [4]), ("label:2", TEXT_ORDER, [2]), ("label:2-4,name:2", TEXT_ORDER, [2, 3, 4, 4]),
        ("0", TEXT_ORDER, [0]), ("3", FROM_ONE, [2]), ("cat", ["Cat", "cat"], [1]), ("Cat", ["Cat", "cat"], [0]),
        ("food, drink", ["Food, Drink", "cat"], [0]), ("name:Food, Drink", ["Food, Drink", "cat"], [0]),
        ("name:x", ["a", "name:x"], [1]), ("0-1", ["a", "b"], [0, 1]),
    ],
)  # fmt: skip
def test_what_has_one_reading(text, names, labels):
    assert parse_classes(text, names) == labels


@pytest.mark.parametrize(
    "text", ["label:12", "label:x", "name:13", "label:", "name:", "4", "0-3", "\u0663", "99999999999"]
)
def test_what_has_none(text):
    with pytest.raises(UsageError):
        parse_classes(text, FROM_ONE)
