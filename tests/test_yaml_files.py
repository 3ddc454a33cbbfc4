"""YAML of anyone's: what is read, what is refused, and that neither takes long."""


import pytest

from common.errors import UserError
from common.yaml_files import LARGEST, parse_yaml, read_yaml
from tests.timing import takes_under


def bomb(levels, start, item):
    """Each level names the one before nine times."""
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{n}: &a{n} {item.replace('*', ','.join([f'*a{n - 1}'] * 9))}" for n in range(1, levels)]
    return "\n".join(lines)


REFUSED = {
    "list bomb": (bomb(9, "[x, x]", "[*]"), "line 7 cannot be taken (over 1,000,000 characters once aliases"),
    "merge bomb": (bomb(9, "{x: 1}", "{<<: [*]}"), "once aliases are replaced"),
    "text bomb": ("a: &a " + "x" * 2000 + "\nb: [" + "*a," * 600 + "]", "line 2 cannot be taken (over 1,000,000"),
    "alias in itself": ("a: &a [*a]", "line 1 cannot be taken (alias *a contains itself)"),
    "no such alias": ("a: 1\nb: *a", "line 2 is not valid YAML (found undefined alias"),
    "large": ("a" * (LARGEST + 1), "cannot be taken (over 1,000,000 characters)"),
    "many keys": ("a:\n" * 300_000, "line 25000 cannot be taken (more than 50,000 values and keys)"),
    "deep flow": ("[" * 33 + "]" * 33, "line 1 cannot be taken (nested more than 32 levels deep)"),
    "deep block": ("a:\n " + "- " * 50_000, "line 2 cannot be taken (nested more than 32"),
    "long integer": ("a: 1\nb: " + "9" * 5000, "line 2 cannot be taken (integer 99999999999999999999… of more than 64"),
    "65 bits": (f"a: {2**63}", "of more than 64 bits"),
    "duplicate": ("a: 1\nb: 2\na: 3", "line 3 cannot be taken (key 'a' is there twice)"),
    "duplicate inside": ("a: {b: 1, b: 1}", "key 'b' is there twice"),
    "list as key": ("? [a]\n: b", "line 1 cannot be taken (a key is a list or mapping)"),
    "tag of Python": ("a: !!python/object/apply:os.system [ls]", "line 1 cannot be taken (it has the tag"),
    "tag of YAML": ("a: !!bool 7", "it has the tag tag:yaml.org,2002:bool"),
    "half a surrogate pair": ('a: "\\ud800"', "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 1", "line 2 is not valid YAML"),
    "null character": ('a: "\\0"', "line 1 cannot be taken (text with a null character)"),
    "control character": ("a: \0", "not valid YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_a_line_and_at_once(case):
    text, said = REFUSED[case]

    def refused():
        with pytest.raises(UserError) as caught:
            parse_yaml(text, "f.yaml")
        return str(caught.value)

    assert takes_under(1.0, refused)
    message = refused()
    assert said in message and message.startswith("f.yaml") and message.endswith("; fix it")
    assert "\n" not in message and len(message) < 300


def test_what_is_read_is_what_json_could_hold():
    text = "a: [1, -2.5, true, null, .inf]\nb: {c: 'x'}\nd: 2024-01-31\ne: &e {f: 1, g: 2}\nh: {<<: *e, g: 3}\ni: *e"
    same = {"f": 1, "g": 2}
    assert parse_yaml(text, "") == {
        "a": [1, -2.5, True, None, float("inf")], "b": {"c": "x"}, "d": "2024-01-31", "e": same,
        "h": {"f": 1, "g": 3}, "i": same,
    }  # fmt: skip
    assert parse_yaml(f"[{2**63 - 1}, {-(2**63)}]", "") == [2**63 - 1, -(2**63)]
    assert parse_yaml("[" * 32 + "]" * 32, "") != parse_yaml("[]", "") == []


def test_files(tmp_path):
    path = tmp_path / "f.yaml"
    for content, said in ((b"a: \xff", "is not UTF-8"), (b"- a", "is not a YAML mapping"), (b"", "not a YAML mapping")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_yaml(path)
    path.write_bytes("\ufeffa: ä\r\n".encode())
    assert read_yaml(path) == {"a": "ä"}
    with pytest.raises(UserError, match=r"^task .* cannot be read \(No such file or directory\)"):
        read_yaml(tmp_path / "gone.yaml", "task")
