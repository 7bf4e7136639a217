"""Python source as a corpus: which files, in which order, and which characters are what."""

import ast
import hashlib
import io
import sys
import tokenize
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rho.errors import DataError
from rho.pysource import MAX_FILE_BYTES, docstrings, label_spans, package_digest, package_files


def pieces(text: str) -> list[tuple[str, str]]:
    return [(text[start:end], label) for start, end, label in label_spans(text)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    root = tmp_path / "little_package"
    for name in (
        "__init__.py",
        "a.py",
        "test.py",
        "sub/b.py",
        "sub/tests/c.py",
        "test/d.py",
        "testing/e.py",
        "_vendor/f.py",
        "__pycache__/g.py",
        "config-3.11/h.py",
        "testbed/i.py",
        "data.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("raise RuntimeError('imported')\n")
    return root


def test_a_package_is_its_own_python_files_without_tests_and_vendored_copies(root):
    assert set(package_files(root.name)) == {"__init__.py", "a.py", "test.py", "sub/b.py", "testbed/i.py"}
    assert root.name not in sys.modules


def test_files_come_in_the_order_of_the_hash_of_their_path(root):
    names = list(package_files(root.name))
    assert names == ["test.py", "sub/b.py", "__init__.py", "a.py", "testbed/i.py"]
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def test_large_files_are_left_out(root):
    (root / "a.py").write_bytes(b"#" * MAX_FILE_BYTES)
    (root / "test.py").write_bytes(b"#" * (MAX_FILE_BYTES - 1))
    assert set(package_files(root.name)) == {"__init__.py", "test.py", "sub/b.py", "testbed/i.py"}


def test_a_module_that_is_one_file_is_a_package_of_one_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "single_module_here.py").write_text("x = 1\n")
    assert package_files("single_module_here") == {"single_module_here.py": tmp_path / "single_module_here.py"}


def test_the_standard_library_leaves_out_its_tests_and_what_is_installed():
    names = package_files("stdlib")
    assert {"ast.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages"}


@pytest.mark.parametrize("name", ["no_such_package_here", "os.path", ""])
def test_an_unknown_package_is_an_error_that_says_what_to_do(name):
    with pytest.raises(DataError, match=r"expected an installed top-level package or 'stdlib'.*Install"):
        package_files(name)


def test_a_package_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"compiled_module_here{EXTENSION_SUFFIXES[0]}").touch()
    for name in ("compiled_module_here", "sys"):
        with pytest.raises(DataError, match=r"found no \.py file"):
            package_files(name)


def test_the_digest_begins_with_the_version_and_follows_names_and_contents(root):
    digests = [package_digest(root.name)]
    (root / "a.py").write_text("changed = True\n")
    digests.append(package_digest(root.name))
    (root / "a.py").rename(root / "z.py")
    digests.append(package_digest(root.name))
    (root / "data.txt").write_text("not read, so it does not count")
    assert digests[-1] == package_digest(root.name)
    assert len(set(digests)) == 3
    assert all(digest.startswith("unversioned ") for digest in digests)
    assert package_digest("pytest").startswith(pytest.__version__ + " ")


def test_docstrings_come_dedented_in_the_order_of_the_file():
    text = '''"""Module.

    Indented.
"""
if True:
    class C:
        """Class."""
        x = 1
        """Not a docstring."""
        async def f(self):
            """Method.

            More.
            """
            def g(): "Inner."
def h(): ""
def last(): "L" "ast."
'''
    assert docstrings(text) == "Module.\n\nIndented.\n\nClass.\n\nMethod.\n\nMore.\n\nInner.\n\nLast."
    assert docstrings("x = 1") == ""


def test_a_docstring_with_a_lone_surrogate_can_be_written_as_utf8():
    assert docstrings(r'"""a\ud800b"""') == "a?b"


@pytest.mark.parametrize("text", ["def", "x = 'open", "\0", "if x:\n  a\n b", "-" * 10**5 + "1", "x" + ".a" * 10**5])
def test_a_file_that_does_not_parse_gives_nothing(text):
    assert docstrings(text) is None
    assert label_spans(text) is None


def test_a_file_that_only_the_parser_accepts_gives_no_wrong_labels():
    text = "if x:\n  if y:\n    a\n \\\n\n"
    ast.parse(text)
    assert label_spans(text) in (None, [(0, len(text), "code")])  # it depends on the version of Python


def test_other_peoples_invalid_escapes_give_no_warning():
    assert docstrings('"""\\d"""') == "\\d"


def test_columns_are_characters_though_the_parser_counts_bytes():
    text = 'class Ä: "ö😀" # ü\nx = "é" # ß\n'
    assert pieces(text) == [
        ("class Ä: ", "code"),
        ('"ö😀"', "docstring"),
        (" ", "code"),
        ("# ü", "comment"),
        ('\nx = "é" ', "code"),
        ("# ß", "comment"),
        ("\n", "code"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_counted_as_the_parser_counts_it(end):
    text = end.join(["'''D", "oc'''", "x = '\x0c\x0b\u2028' # a\x0c", "# b"])
    assert pieces(text) == [
        (f"'''D{end}oc'''", "docstring"),
        (f"{end}x = '\x0c\x0b\u2028' ", "code"),
        ("# a\x0c", "comment"),
        (end, "code"),
        ("# b", "comment"),
    ]


def test_a_hash_in_a_string_is_no_comment_and_a_comment_in_a_docstring_is_docstring():
    assert pieces("x = '# no'") == [("x = '# no'", "code")]
    docstring = "'a'  # between\n 'b'"
    assert pieces(f"({docstring})") == [("(", "code"), (docstring, "docstring"), (")", "code")]


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\\'\"\r\n\0"), max_size=6)
LINE = st.one_of(
    WORD.map("# {}".format),
    WORD.map("x = '{}'  # é".format),
    WORD.map("def f(ä='#'): '{}'".format),
    WORD.map("class C:\n    '''{}\n    # in '''  # out\n    y = 1".format),
    WORD.map("'''{}\n\n#'''".format),
    st.sampled_from(["", "\x0c", "x = (1, # one\n  2)", "x = \\\n  3", "('a' # b\n 'c')", "if x:\n\tpass # tab"]),
)


@given(
    st.one_of(
        st.text(), st.tuples(st.lists(LINE), st.sampled_from(["\n", "\r\n", "\r"])).map(lambda t: t[1].join(t[0]))
    )
)
def test_spans_cover_each_character_exactly_once(text):
    spans = label_spans(text)
    if spans is None:
        with pytest.raises((SyntaxError, ValueError)):
            ast.parse(text)
        return
    assert [i for start, end, _ in spans for i in range(start, end)] == list(range(len(text)))
    assert all(start < end for start, end, _ in spans)
    found = {label: [text[s:e] for s, e, this in spans if this == label] for label in ("docstring", "comment", "code")}
    assert all(comment.startswith("#") for comment in found["comment"])
    assert all(isinstance(ast.literal_eval(f"({literal})"), str) for literal in found["docstring"])
    assert not any(
        token.type == tokenize.COMMENT
        for code in found["code"]
        if "#" in code and "'" not in code
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
    )
