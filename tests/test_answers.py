"""Reading answers: golden cases per type, known faults of other readers, and bounds on malicious input."""

import random
from fractions import Fraction

import pytest

from common.errors import UserError
from rewards.answers import answer_type
from rewards.expressions import canonical, rational, value
from tests.timing import takes_under

CHOICE = answer_type("choice")
LABEL = answer_type("label", labels=["entailment", "neutral", "contradiction"])
NUMBER = answer_type("number")
MATH = answer_type("math")
EXACT = answer_type("exact")
SIMPLE_TYPES = (CHOICE, LABEL, NUMBER, MATH, EXACT)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("####72", "72"), ("#### 72", "72"), ("####\n72", "72"), ("so 12 * 6 = 72\n#### 72 apples", "72"),
        ("#### Step 1\nfirst 3\n#### Step 2\nthen 4, so 7.", "7"), ("#### 2. Add up\nso 9", "9"),
        ("$72", "72"), ("It costs $72.", "72"), ("-$5", "-5"), ("$-5", "-5"), ("€1,234.50", "1234.5"),
        ("1,234", "1234"), ("1,234,567.", "1234567"), ("\\boxed{1{,}234}", "1234"), ("12345", "12345"),
        ("3/4", "0.75"), ("1/3", "1/3"), ("2/6", "1/3"), ("-1/3", "-1/3"), ("1 1/2", "1.5"), ("\\frac{1}{3}", "1/3"),
        ("0", "0"), ("<answer>0</answer>", "0"), ("-0", "0"), ("0.0", "0"), ("0.250", "0.25"), (".5", "0.5"),
        ("-7", "-7"), ("−7", "-7"), ("3-5", "5"), ("x = -3", "-3"), ("72.", "72"), ("007", "7"),
        ("25%", "25"), ("<answer>25 %</answer>", "25"), ("<answer>25\\%</answer>", "25"), ("5 km", "5"), ("5km", "5"),
        ("<answer>72 cm^2</answer>", "72"), ("<answer>\n72\n</answer>", "72"), ("<ANSWER> 72 </Answer>", "72"),
        ("<answer>5</answer> no: <answer>6</answer>", "6"), ("I use <answer> tags: <answer>6</answer>", "6"),
        ("<answer>\\boxed{6}</answer>", "6"), ("<answer>The answer is 6.</answer>", "6"),
        ("<answer>Paul has 72 apples</answer>", "72"), ("\\boxed{3} and 4", "3"), ("\\boxed{3}, \\boxed{4}", "4"),
        ("\\boxed{\\text{72}}", "72"), ("\\boxed 7", "7"), ("<answer>5</answer> \\boxed{6} #### 7 and 8", "5"),
        ("The answer is 72. I checked it in 3 ways.", "72"), ("The answer is: $72$.", "72"), ("Answer: 5\nmore 6", "5"),
        ("**Answer:** 5 of 6", "5"), ("**Final answer**: **5** (of 6)", "5"), ("Answer:\n72", "72"),
        ("the answer is 48 + 24 = 72 apples for 3", "72"), ("The answer is x = 5, as 6", "5"), ("answer = 5", "5"),
        ("The answer is not 5, it is 6", "6"), ("The answer follows: 3 + 4 = 7", "7"),
        ("The answer is 5. No, the answer is 6. ", "6"), ("Final Answer: The final answer is $8$. I hope so.", "8"),
        ("3 \\times 10^8", "300000000"), ("<answer>3 × 10^{-2}</answer>", "0.03"), ("1e3", "1000"),
        ("2024-05-17", "17"), ("x2 and H2O", None), ("١٢", None), ("the 5th", "5"), ("v1.5", None),
        ("<answer>3 or 4</answer>", None), ("<answer>3, 4</answer>", None), ("<answer>3 4</answer>", None),
        ("<answer>3:30</answer>", None),
        ("<answer>12 + 7</answer>", None), ("<answer>144/12</answer>", None), ("<answer>12*12</answer>", None),
        ("\\boxed{1/0}", None), ("<answer>none</answer>", None), ("no idea", None), ("", None), ("   ", None),
    ],
)  # fmt: skip
def test_numbers(completion, answer):
    assert NUMBER.extract(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("C", "C"), ("c", "C"), ("c.", "C"), ("(c)", "C"), ("C. foo", "C"), ("C) foo", "C"), ("C: foo", "C"),
        ("(C) foo", "C"), ("C. Because A is wrong", "C"), ("<answer>C. foo</answer>", "C"), ("**C**", "C"),
        ("<answer>\n(c)\n</answer>", "C"), ("<answer>c) foo</answer>", "C"), ("<answer>Option C</answer>", "C"),
        ("\\boxed{C}", "C"), ("\\boxed{\\text{(C)}}", "C"), ("\\boxed{\\textbf{C}}", "C"), ("#### c", "C"),
        ("The answer is C.", "C"), ("The correct answer is (c).", "C"), ("Answer: C because A is wrong", "C"),
        ("answer is **C**", "C"), ("The answer is option C, not A.", "C"), ("The answer is A because", "A"),
        ("A is wrong. B is wrong.\nSo it is C", "C"), ("First\n(b) fits", "B"), ("It must be B\n", "B"),
        ("the answer is a matter of taste, so B", "B"), ("It is B.\nA dog barks", "B"), ("It is B.\nA's rule", "B"),
        ("<answer>A</answer> <answer>B</answer>", "B"), ("#### A closer look at B\nThe answer is D", "D"),
        ("<answer>A or B</answer>", None), ("<answer>A, B</answer>", None), ("<answer>A B</answer>", None),
        ("<answer>(a)/(b)</answer>", None), ("<answer>E</answer>", None), ("<answer>Cat</answer>", None),
        ("<answer>a dog</answer>", None), ("nothing fits", None), ("Cabbage", None), ("", None),
        # As a small chat model replies to LogiQA, whose options begin with their letter: "C. C.Pascal changed it".
        ("C.C.Pascal changed it", "C"), ("B. C.Pascal changed it", None), ("C. C.", "C"), ("c. C", "C"),
        ("A. D. H. Lawrence", "A"), ("B. C. elegans is a worm", "B"), ("A. B is wrong", "A"),
        ("C. D.\n\nThe correct answer is D. Both", "D"), ("A. Either A or B. The answer is A. The", "A"),
        ("B.C.D.", None), ("C. B.", None), ("A.C.C.C.C", None), ("The answer is A. B", None),
        ("A. One.\nB. Two.\nC", None), ("A. One.\nB", None), ("(A) One\n(B) Two\n(C) Three\n(D) Four", None),
        ("A. One.\nB. Two.\n\nSo it is B", "B"), ("Let us see:\nA) One\nB) Two\nI take (a)", "A"),
        ("C. Three.\nD. Four.", "D"),
    ],
)  # fmt: skip
def test_choices(completion, answer):
    assert CHOICE.extract(completion) == answer


def test_choices_are_those_of_the_task():
    assert answer_type("choice", choices=["A", "B"]).extract("A, not C") == "A"
    assert answer_type("choice", choices=["0", "1"]).extract("<answer>0</answer>") == "0"
    assert answer_type("choice", choices=list("ABCDE")).extract("So (e).") == "E"
    assert CHOICE.score("(c)", "C") == CHOICE.score("C. foo", "c") == 1.0
    assert CHOICE.score("(c)", "B") == CHOICE.score("none", "C") == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("neutral", "neutral"), ("Neutral.", "neutral"), ("<answer>\nNEUTRAL\n</answer>", "neutral"),
        ("\\boxed{\\text{Neutral}}", "neutral"), ("The answer is **neutral**, not entailment.", "neutral"),
        ("Label: entailment? No. It is a contradiction", "contradiction"), ("#### Neutral", "neutral"),
        ("<answer>The relation is entailment.</answer>", "entailment"), ("It is not neutral", None),
        ("entailment it is, not neutral", "entailment"), ("<answer>neutral, neutral</answer>", "neutral"),
        ("<answer>entailment or neutral</answer>", None), ("<answer>entailment, neutral</answer>", None),
        ("<answer>unclear</answer>", None), ("neutrality", None), ("", None),
    ],
)  # fmt: skip
def test_labels(completion, answer):
    assert LABEL.extract(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("-1", "-1"), ("Answer: 1", "1"), ("So the answer is -1.", "-1"), ("It is 1", "1"), ("- 0", "0")],
)
def test_a_hyphen_before_a_label_s_number_is_its_sign(completion, answer):
    assert answer_type("label", labels=["-1", "0", "1"]).extract(completion) == answer


def test_labels_within_labels_and_with_spaces():
    kind = answer_type("label", labels=["entailment", "not entailment", "Very good"])
    assert kind.extract("it is not_entailment") == "not entailment"
    assert kind.extract("<answer>not  entailment</answer>") == "not entailment"
    assert kind.extract("So entailment.") == "entailment"
    assert kind.extract("VERY-GOOD") == "Very good"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("0.25", r"\frac{1}{4}"), (r"\frac14", "1/4"), (r"\dfrac{2}{8}", ".25"), (r"-\frac{1}{2}", "-0.5"),
        ("0", "0.0"),
        ("-\\frac12", r"\frac{-1}{2}"), (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"), (r"\sqrt2", "2^{1/2}"),
        (r"\frac{1}{1+\sqrt{2}}", r"\sqrt{2}-1"), (r"\sqrt{-4}", "2i"), (r"\sqrt[3]{27}", "3"), ("2^{10}", "1024"),
        ("(x+1)^2", "x^2 + 2x + 1"), ("2xy", "y*2*x"), (r"3\pi/2", r"\frac{3\pi}{2}"), (r"1\frac{1}{2}", "3/2"),
        ("1,234", "1234"), ("1{,}234", "1234"), (r"1\,234", "1234"), ("$72", "72"), (r"\$72", "72"), ("25\\%", "25"),
        (r"5\text{ cm}", "5"), ("10 square feet", "10"), (r"90^\circ", "90"), ("90°", "90"), ("x = 5", "5"),
        (r"x \in [0, 1)", "[0,1)"),
        ("f(x) = 2x", "2x"), (r"\left(1, \frac{1}{2}\right)", "(1,0.5)"), ("[0, 1)", "[0,1)"), ("3, 1, 2", "1,2,3"),
        (r"\{2, 1\}", r"\{1,2\}"), (r"\text{Even}", "even"), (r"(-\infty, 3]", r"(-\infty,3]"), ("$x^2$.", "x^2"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\tfrac{x}{2}", "0.5x"),
        (r"\sin x", r"\sin  x"), (r"3 \times 10^8", "300000000"), (r"2\cdot3", "6"),
    ],
)  # fmt: skip
def test_equal_mathematics(a, b):
    assert MATH.normalise(a) == MATH.normalise(b)
    assert MATH.equal(f"so \\boxed{{{a}}}.", b) and MATH.score(f"<answer>{b}</answer>", a) == 1.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("0.25", "0.5"), ("0.333", r"\frac{1}{3}"), ("(1, 2)", "(2, 1)"), ("[0,1)", "(0,1)"), ("x", "y"), ("x^2", "2x"),
        (r"\sqrt{2}", "1.41421356"), ("1, 234", "1234"), ("2x+3y=5", "5"), (r"\sin x", r"\cos x"), ("5", "-5"),
        ("even", "odd"), ("1,2", "1"), (r"\pi", "3.14"), ("12", "1 2"), ("0", ""), ("10 cm", "100 cm"),
    ],
)  # fmt: skip
def test_unequal_mathematics(a, b):
    assert not MATH.equal(a, b)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{4}}}", "1/2"), (r"\boxed{\text{even}}", "even"), (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{\{1, 2\}}", "{1, 2}"), ("the answer is $\\frac{1}{4}$ of all", "1/4"),
        (r"We get $x=\frac34$.", "3/4"),
        ("The answer is \\(2x\\).", "2*x"), ("It costs $5 and then $6", "6"), ("so it is 7 apples", "7"),
        ("<answer>The value is $\\frac{1}{4}$</answer>", "1/4"), ("#### \\frac{2}{4}", "1/2"), ("\\boxed{}", None),
        ("<answer></answer>", None), ("<answer>2", None), ("I do not know", None), ("\\boxed{ 0 }", "0"),
    ],
)  # fmt: skip
def test_mathematics_is_found(completion, answer):
    assert MATH.extract(completion) == answer


def test_exact_text():
    assert EXACT.extract("  Paris. ") == "Paris"
    assert EXACT.extract("<answer>\nNew\n York </answer> as said") == "New York"
    assert EXACT.extract("The answer is **St. Paul**.") == "St. Paul"
    assert EXACT.extract("...#### 0") == "0"
    assert EXACT.extract("<answer> </answer>") is None and EXACT.extract(" ") is None
    assert not EXACT.equal("paris", "Paris")
    assert answer_type("exact", ignore_case=True).equal("paris", "Paris.")


def test_regex():
    kind = answer_type("regex", pattern=r"result=(\w+)")
    assert kind.extract("result=a, then result=b") == "b"
    assert kind.extract("none") is None and kind.extract("result=") is None
    assert kind.score("result=b", "b") == 1.0 and kind.score("result=b", "a") == 0.0
    assert answer_type("regex", pattern="[0-9]+").extract("a 1 b 0") == "0"


def test_json():
    kind = answer_type("json")
    assert kind.extract('```json\n{"b": 1.0, "a": [2]}\n```') == '{"a": [2], "b": 1}'
    assert kind.extract('{"a": 1} then {"a": {"b": [2]}} and {"a": ') == '{"a": {"b": [2]}}'
    assert kind.equal('{"a": 1, "b": 2}', '{"b": 2.0, "a": 1}') and not kind.equal("[1, 2]", "[2, 1]")
    assert kind.extract("no object") is None and kind.extract('{"a": NaN}') is None
    assert kind.extract('<answer>{"a": 1}</answer> {"a": 2}') == '{"a": 1}'
    field = answer_type("json", field="answer")
    assert field.extract('{"answer": 0}') == "0" and field.score('{"answer": 72}', "72") == 1.0
    assert field.extract('{"other": 0}') is None and field.extract('{"answer": ""}') is None


def test_json_of_any_depth_and_length_comes_to_an_end():
    for text in ("[" * 100_000, "{" * 100_000, '{"a":' * 20_000, "[1," * 30_000):
        assert answer_type("json").extract(text) is None
        assert takes_under(2.0, answer_type("json").extract, text)


def test_custom_reader_and_comparison(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def read(text):\n    return text.split('=')[1] if '=' in text else None\n"
        "def same(a, b):\n    return a.lower() == b.lower()\n"
        "def fails(text):\n    raise KeyError('gone')\n"
        "def odd(text):\n    return 5\n"
    )
    kind = answer_type("custom", reader=f"{path}:read", comparison=f"{path}:same")
    assert kind.extract("x=Yes") == "Yes" and kind.extract("x") is None
    assert kind.score("x=Yes", "yes") == 1.0 and kind.score("x=Yes", "no") == 0.0
    plain = answer_type("custom", reader=f"{path}:read")
    assert plain.score("x=Yes", "yes") == 0.0 and plain.score("x=Yes", "Yes") == 1.0
    for name, fact in (("fails", "KeyError: 'gone'"), ("odd", "returned 5")):
        with pytest.raises(UserError, match=fact) as caught:
            answer_type("custom", reader=f"{path}:{name}").extract("a\nb")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        answer_type("custom", reader="missing.py:read")


@pytest.mark.parametrize(
    ("name", "options", "fact"),
    [
        ("choices", {}, "unknown; use one of choice, label"), ("choice", {"labels": ["a"]}, "unknown option 'labels'"),
        ("label", {}, "lacks 'labels'"), ("label", {"labels": "ab"}, "list of two"),
        ("number", {"x": 1}, "known are none"),
        ("label", {"labels": ["yes", False]}, "quote it"), ("label", {"labels": ["a b", "A_B"]}, "alike"),
        ("label", {"labels": ["a", "--"]}, "more than hyphens"),
        ("choice", {"choices": ["A", "a"]}, "alike"), ("choice", {"choices": ["A", "BB"]}, "one letter"),
        ("regex", {"pattern": "("}, "not a regular expression"), ("regex", {"pattern": 5}, "not a regular expression"),
        ("exact", {"ignore_case": "no"}, "true or false"), ("json", {"field": 1}, "JSON object's key"),
        ("custom", {"reader": 5}, "file.py:function"), ("custom", {}, "lacks 'reader'"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(name, options, fact):
    with pytest.raises(UserError, match=fact) as caught:
        answer_type(name, **options)
    assert "\n" not in str(caught.value)


def test_an_unclosed_or_empty_marker_is_unreadable():
    for kind, given in ((CHOICE, "A"), (LABEL, "neutral"), (NUMBER, "72"), (MATH, "72"), (EXACT, "72")):
        for text in (f"{given} <answer>", f"{given} <answer></answer>", f"{given} <answer> \n</answer>",
                     f"<answer>{given}", f"<answer>{given}</answer> or <answer>{given}", f"\\boxed{{{given}",
                     f"{given} \\boxed{{}}"):  # fmt: skip
            assert kind.extract(text) is None, (kind.name, text)
        assert kind.extract(f"<answer>{given}</answer>") == given
        assert kind.score(f"<answer>{given}", given) == 0.0


def test_the_completion_alone_is_read():
    """An example `<answer>5</answer>` in the prompt is not read: only the completion counts."""
    prompt = "Give the result as <answer>5</answer>. What is 2 + 2?"
    completion = " That is 4."
    assert NUMBER.extract(completion) == "4" and NUMBER.extract(prompt + completion) == "5"
    assert NUMBER.score(completion, "5") == 0.0


def test_normalising_twice_changes_nothing():
    texts = ["72", "1/3", "-0.5", r"\frac{\sqrt{3}}{2}x^2", "(1, 2)", "3, 1", r"\{b, a\}", "C. foo", "Neutral", "a  b.",
             r"\text{Even}", "1,234", "", "no answer", "2^{-3}", r"\sqrt{-4}+1", r"\begin{x}1\\2\end{x}"]  # fmt: skip
    for kind in SIMPLE_TYPES:
        for text in texts:
            once = kind.normalise(text)
            assert kind.normalise(once) == once, (kind.name, text)
            if kind.extract(text) is not None:
                assert kind.extract(text) == once and kind.equal(text, once)


def test_rational_numbers_go_through_text_exactly():
    rng = random.Random(0)
    for _ in range(300):
        number = Fraction(rng.randint(-(10**6), 10**6), rng.choice([1, 2, 3, 7, 8, 10, 125, 1000]))
        text = NUMBER.normalise(f"{number.numerator}/{number.denominator}") if number.denominator > 1 else str(number)
        assert Fraction(text) == number and NUMBER.extract(f"so <answer>{text}</answer>") == text
        assert rational(f"\\frac{{{number.numerator}}}{{{number.denominator}}}") == number


def test_values_of_expressions_agree_with_floating_point():
    cases = {"2+3*4": 14, "(2+3)*4": 20, "-2^2": -4, "2^-1": 0.5, "1/2/2": 0.25, "8-3-2": 3, "--3": 3, "1 1/2": 1.5,
             r"\frac{3}{4}\cdot\frac{2}{3}": 0.5, r"2^{3}\cdot3^{2}": 72,
             r"10^{-3}": 0.001, r"\sqrt{\frac{9}{4}}": 1.5}  # fmt: skip
    assert {text: float(rational(text) or 0) for text in cases} == cases
    for text in ("", "+", "1+", "(1", "1)", "3 4", "1/0", "0^{-1}", "x=1", "5!", r"\frac{1}", r"\sin 1", "1..2", "[1)"):
        assert value(text) is None, text
    assert value("x-x") == {} and canonical({}) == "0" and rational("x") is None


def test_nothing_a_model_writes_makes_a_reader_hang():
    hostile = ["9^9^9^9", "10^{10^{10}}", "1e999999999", "9" * 50_000, "((((" * 5000, r"\sqrt{" * 5000, "(x+1)^{64}",
               "(a+b+c+d+e)^{60}", "((((1+x)^9)^9)^9)^9", "1/" * 20_000, "-" * 50_000, "<answer>" * 10_000,
               "\\boxed{" * 10_000, "#### " * 10_000, "answer is " * 10_000, "$" * 50_000, "a " * 40_000, " " * 90_000,
               "1 " * 40_000, "x=" * 30_000, "\\(" * 20_000, r"\sqrt{99999999977}", "A," * 40_000, ",1" * 40_000,
               "=1" * 30_000, "{" * 30_000, "neutral " * 10_000, "\\text{" * 10_000,
               "1,111" * 10_000, "(1," * 90, "(1," * 10_000]  # fmt: skip
    for text in hostile:
        for kind in SIMPLE_TYPES:
            for shown in (text, f"<answer>{text}</answer>", f"The answer is {text}"):
                assert takes_under(1.0, kind.extract, shown), (kind.name, text[:20], shown[:20])
