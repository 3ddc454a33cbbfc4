"""JSON as language models write it: what is read out of it, and in how much time."""


import pytest

from synth.prompts import NewSample
from synth.teacher.lenient_json import DEEPEST, objects_in
from synth.teacher.structured import read_json_answer
from tests.timing import takes_under

READ = {
    "trailing comma, other quotes, bare words": ("{'question': 'a', answer: 2,}", {"question": "a", "answer": 2}),
    "typographic quotes": ("{“a”: “b”}", {"a": "b"}),
    "prose around": ('Sure: {"a": 1}. Enjoy!', {"a": 1}),
    "Python's words": ("{'a': True, 'b': None, 'c': false}", {"a": True, "b": None, "c": False}),
    "numbers": ('{"a": -1.5e3, "b": 0, "c": 007, "d": 1.}', {"a": -1500.0, "b": 0, "c": "007", "d": "1."}),
    "bare value": ('{"a": two words, "b": 1}', {"a": "two words", "b": 1}),
    "raw line end": ('{"a": "x\ny"}', {"a": "x\ny"}),
    "quote inside": ('{"a": "say "hi" now", "b": "it\'s"}', {"a": 'say "hi" now', "b": "it's"}),
    "backslash of LaTeX": (r'{"a": "\( \sqrt{2} \)"}', {"a": r"\( \sqrt{2} \)"}),
    "escapes": (r'{"a": "\"\\\/\n\u00e4\ud83d\ude00"}', {"a": '"\\/\nä😀'}),
    "no end": ('{"a": {"b": ["c", "d', {"a": {"b": ["c", "d"]}}),
    "list without its end": ('{"a": [1, 2}', {"a": [1, 2]}),
    "object without its end": ('{"a": [{"b": 1], "c": 2}', {"a": [{"b": 1}], "c": 2}),
    "no value": ('{"a":, "b": 1}', {"a": None, "b": 1}),
    "no colon": ('{a, "b": 1}', {"b": 1}),
    "empty": ("{}", {}),
}


@pytest.mark.parametrize("case", READ)
def test_is_read(case):
    text, expected = READ[case]
    assert next(objects_in(text)) == expected


def test_objects_come_one_after_the_other_and_only_a_few():
    assert list(objects_in('{"a": 1} and {"b": 2} {')) == [{"a": 1}, {"b": 2}, {}]
    assert len(list(objects_in("{}" * 100))) == 4
    assert list(objects_in('["no object", 1]')) == []
    given = 'The form is {"input": ...}. Here: {"input": "1 + 1", output: 2}'
    assert read_json_answer(given, NewSample)[0] == NewSample(input="1 + 1", output="2")


def test_depth_has_an_end():
    assert next(objects_in('{"a":' * DEEPEST)) != {}
    for opening in ('{"a":', '{"a":[', '{"a": [[{"b":'):
        with pytest.raises(ValueError, match="nested more than 32 levels deep"):
            list(objects_in(opening * (DEEPEST + 1)))


PIECES = ['["', "[", "{", '"', "'", '",', '{"', '[{"', "{a:", ":", "(", '{"a":[', '{"x":"[', '"a",']


@pytest.mark.parametrize("before", ["", '{"input": "', '{"input": ['])
def test_100_kb_of_anything_take_no_time(before):
    """Each alone is answered at once, well or not: repairs that look ahead at every bracket took over a minute."""
    for piece in PIECES:
        text = before + piece * (100_000 // len(piece))
        assert takes_under(0.5, read_json_answer, text, NewSample), piece
        parsed, reason = read_json_answer(text, NewSample)
        assert (parsed is None) == bool(reason) and "\n" not in reason and len(reason) < 300
