"""Data made into Markdown is read by another parser, which finds the data and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mainrun.console import printable
from mainrun.markdown import code, embedded, escaped, fenced, link, message, table

LAWS = settings(deadline=None, derandomize=True, database=None)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = st.text(st.sampled_from("`~*_|#<>[]()!&;:@-+=.\\\"'$ \t\n\r\x1b\u202e1aw/x"), max_size=40)


def tokens(markdown: str) -> list[Any]:
    parsed = PARSER.parse(markdown)
    return [inner for token in parsed for inner in (token, *(token.children or ()))]


def shown(text: str) -> str:
    """What a reader is to see of it in a line."""
    return printable(" ".join(text.split()))


@LAWS
@given(HOSTILE)
def test_escaped_data_is_text_in_a_heading_in_a_sentence_and_in_a_table(text: str):
    data = f"x{escaped(text)}"
    page = f"# {data}\n\n{data}\n\n{table(['a', 'b'], [['x', data]])}"
    found = tokens(page)
    assert {t.type for t in found if t.type in ("link_open", "image", "html_inline", "code_inline",
            "em_open", "strong_open", "s_open", "softbreak", "hardbreak", "html_block", "fence",
            "blockquote_open", "list_item_open")} == set()  # fmt: skip
    inline = ["".join(c.content for c in t.children) for t in found if t.type == "inline"]
    expected = "x" + shown(text)
    assert [line.replace("\u2060", "") for line in inline] == [
        expected, expected, "a", "b", "x", expected,
    ]  # fmt: skip


@LAWS
@given(HOSTILE)
def test_code_holds_the_data_to_the_last_character(text: str):
    children = [t for t in tokens(f"x {code(text)} y") if t.type == "code_inline"]
    assert [t.content for t in children] == ([shown(text)] if shown(text) else [])


@LAWS
@given(st.text(st.sampled_from("`~\n a#"), max_size=20))
@example("````\n# out of it")
def test_a_fence_holds_every_line_and_ends_where_it_should(text: str):
    found = tokens(f"{fenced(text)}\n\n# after")
    assert [t.content for t in found if t.type == "fence"] == [text + "\n"]
    assert [t.type for t in found if t.type.startswith("heading")] == [
        "heading_open", "heading_close",
    ]  # fmt: skip


@LAWS
@given(HOSTILE)
def test_a_message_has_code_where_it_has_backticks_and_nothing_else(text: str):
    found = tokens(f"x{message(text)}")
    kinds = {t.type for t in found}
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "code_inline",
                     "text_special"}  # fmt: skip
    told = "".join(t.content for t in found if t.type in ("text", "code_inline"))
    expected = "x" + shown(text)
    assert told.replace("`", "").replace("\u2060", "") == expected.replace("`", "")


def test_a_message_shows_its_commands_as_code():
    assert message("make it with `mainrun image build` (now)") == (
        "make it with `mainrun image build` \\(now\\)"
    )


@pytest.mark.parametrize("text", ["me@site.example", "ask @somebody", "www.site.example"])
def test_what_github_links_without_being_asked_is_broken_up(text: str):
    assert text not in escaped(text).replace("\\@", "@")


@pytest.mark.parametrize("make", [escaped, code, message])
def test_a_line_of_data_is_never_so_long_that_it_hides_the_rest(make: Callable[[str], str]):
    assert len(make("\x1b`*" * 100_000)) < 5000


@pytest.mark.parametrize(
    ("address", "linked"),
    [
        ("https://wandb.example/me/p/runs/a1", True),
        ("http://127.0.0.1:8080/me", True),
        ("javascript:alert(1)", False),
        ("https://a.example/) [x](https://b.example", False),
        ("https://a.example/> <script>", False),
        ("https://a.example/" + "a" * 5000, False),
    ],
)
def test_only_plain_web_addresses_become_links(address: str, linked: bool):
    for markdown in (link(address), link(address, "the page")):
        targets = [t.attrs["href"] for t in tokens(markdown) if t.type == "link_open"]
        assert targets == ([address] if linked else [])


def test_embedded_headings_are_lower_but_not_those_in_code():
    page = "# a\n\n```sh\n# b\n````\n\n## c\n\n~~~\n# d\n```\n~~~\n\n###### e\n\n#f"
    found = tokens(embedded(page))
    assert [t.tag for t in found if t.type == "heading_open"] == ["h2", "h3", "h6"]
    assert [t.content for t in found if t.type == "fence"] == ["# b\n", "# d\n```\n"]


@LAWS
@given(st.text(st.sampled_from("`~ \n\raé"), max_size=30))
@example("```a`b")
@example("~~~~\n~~~ \n```")
def test_what_follows_embedded_markdown_is_never_inside_its_code(text: str):
    found = PARSER.parse(f"{embedded(text)}\n\n# after")
    assert [t.tag for t in found if t.type == "heading_open"] == ["h1"]
