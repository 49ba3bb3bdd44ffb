"""A document in both forms: closed, escaped, self-contained, and the same facts in each."""

import html.parser
import re
from dataclasses import replace

import pytest

from mainrun.analysis import document_files, figures
from mainrun.analysis.document import (
    Code,
    Details,
    Document,
    Heading,
    Link,
    Listing,
    Paragraph,
    Picture,
    Strong,
    Table,
)
from mainrun.analysis.document_html import html as html_of
from mainrun.analysis.document_markdown import markdown
from mainrun.errors import UserError

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></td></table></style><img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "' onmouseover='alert(1)",
    "a | b | c",
    "```\n# heading\n```",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "\x00\x1b[31mred\x1b[0m\u202eright to left",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "$x^2$ \\alpha",
    "<!-- ",
    "]]>",
    "javascript:alert(1)",
    "data:text/html,x",
    "\ud800 lone",
]
VOID = {"meta", "img", "source", "wbr", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Its elements with their attributes, its text; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def picture() -> Picture:
    figure, axes = figures.new_axes()
    axes.plot([0, 1], [0, 1], label="a $ sign, and another $")
    figures.label(axes, "costs $5 or $6", x="steps_{", y="^")
    figures.legend(axes)
    return figures.picture(figure, "line", "a line that rises")


def document(picture: Picture, text: str) -> Document:
    """One with this text in every place that takes any."""
    return Document(
        text,
        (
            Heading(text),
            Heading(text, 3),
            Paragraph(
                (text, " ", Code(text), Strong(text), Link(text), Link("https://a.example/b"))
            ),
            Table((text, Code(text)), ((text, Strong(text)), (Code(text), (text, Code(text))))),
            replace(picture, alt=text),
            Listing(text),
            Details(text, (Paragraph(text), Table(("", ""), ((text, "1"),)))),
        ),
    )


def test_hostile_text_is_only_text_in_the_html(picture: Picture, subtests: pytest.Subtests):
    allowed = {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "a",
        "code", "strong", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "picture",
        "source", "img", "pre", "details", "summary", "wbr", "nav",
    }  # fmt: skip
    for text in HOSTILE:
        with subtests.test(text=text):
            page = Page(html_of(document(picture, text)))
            tags = {tag for tag, _ in page.elements}
            assert tags <= allowed
            for tag, attributes in page.elements:
                assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            assert [a["href"] for a in page.named("a") if "href" in a] == ["https://a.example/b"]


def test_the_html_shows_what_it_was_given(picture: Picture):
    page = Page(html_of(document(picture, "<b> & 'c'")))
    assert page.text.count("<b> & 'c'") == 19  # in each place, the title of the tab included
    assert page.named("img")[0]["alt"] == "<b> & 'c'"


def test_the_html_needs_nothing_from_outside(picture: Picture):
    text = html_of(document(picture, "plain"))
    page = Page(text)
    loading = [
        a.get("src") or a.get("srcset") for tag, a in page.elements if tag in ("img", "source")
    ]
    assert loading
    assert all(address.startswith("data:image/png;base64,") for address in loading)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "@import" not in text
    assert "url(" not in text
    policy = [a["content"] for a in page.named("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_html_is_made_for_phones_for_the_dark_and_for_readers_aloud(picture: Picture):
    text = html_of(document(picture, "plain"))
    page = Page(text)
    assert page.named("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named(
        "meta"
    )
    assert "prefers-color-scheme: dark" in text
    assert page.named("source")[0]["media"] == "(prefers-color-scheme: dark)"
    assert page.named("source")[0]["srcset"] != page.named("img")[0]["src"]
    assert all(image.get("alt") for image in page.named("img"))
    inside = [tag for tag, _ in page.elements]
    tables = [i for i, tag in enumerate(inside) if tag == "table"]
    assert tables
    assert all(page.elements[i - 1][1].get("class") == "scroll" for i in tables)


def cells(line: str) -> int:
    """Of a row, as GitHub parts it: bars with a backslash before them part nothing."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(
    picture, subtests: pytest.Subtests
):
    for text in HOSTILE:
        with subtests.test(text=text):
            shown = markdown(document(picture, text), "report")
            blocks = [block.split("\n") for block in shown.split("\n\n") if block.startswith("| ")]
            assert blocks
            for lines in blocks:
                assert {cells(line) for line in lines} == {cells(lines[0])}, lines


def test_hostile_text_is_only_text_in_the_markdown(picture: Picture, subtests: pytest.Subtests):
    for text in HOSTILE:
        with subtests.test(text=text):
            shown = markdown(document(picture, text), "report")
            outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", shown)  # fences show what they hold
            outside = re.sub(r"(`+).+?\1", "", outside)  # and so does code in a line
            (summary,) = re.findall(r"^<details><summary>(.*)</summary>$", outside, re.MULTILINE)
            assert "<" not in summary  # it is HTML to GitHub, and nothing in it is Markdown
            bare = re.sub(r"<details>.*|</details>|<https://a.example/b>", "", outside)
            assert not re.search(r"(?<!\\)<", bare), bare
            assert not re.search(r"(?<!\\)\]\(", bare)
            assert shown.split("\n").count("# heading") <= 1


def test_markdown_has_no_data_address_and_names_the_file_of_a_picture(picture: Picture):
    shown = markdown(Document("t", (picture,)), "report")
    assert "data:" not in shown
    assert "`report/line.png`" in shown


def test_markdown_shows_the_chart_of_a_picture_that_has_one(picture: Picture):
    shown = markdown(Document("t", (replace(picture, markdown="```mermaid\nx\n```"),)), "report")
    assert "```mermaid\nx\n```" in shown
    assert "line.png" not in shown


def test_markdown_stays_below_what_a_step_summary_takes():
    rows = [[f"{i}", "x|" * 300] for i in range(300)]
    long = Document("long", tuple(Table(("a", "b"), rows) for _ in range(30)))
    shown = markdown(long, "report")
    assert 100_000 < len(shown.encode()) < 2**20
    assert "more rows stand in the HTML file" in shown
    assert shown.rstrip().endswith("the HTML file has it.")
    assert html_of(long).count("<tr>") == 30 * 301


def test_a_table_whose_rows_are_of_another_length_is_our_mistake():
    with pytest.raises(AssertionError):
        Table(("a", "b"), (("1",),))


def test_a_document_is_written_as_page_markdown_and_pictures(picture: Picture, tmp_path):
    path = document_files.write(
        Document("t", (Details("more", (picture,)),)), tmp_path / "new" / "r.html"
    )
    assert path == tmp_path / "new" / "r.html"
    files = sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file())
    assert files == ["new/r.html", "new/r.md", "new/r/line.png"]
    assert (tmp_path / "new/r/line.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_output_that_is_no_html_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="name it"):
        document_files.write(Document("t"), tmp_path / "report.pdf")


def test_both_pictures_are_of_one_size_and_differ_in_their_paper(picture: Picture):
    import io

    from matplotlib.image import imread

    light, dark = (imread(io.BytesIO(png)) for png in (picture.light, picture.dark))
    assert light.shape == dark.shape
    assert light[0, 0, :3].min() > 0.95
    assert dark[0, 0, :3].max() < 0.15
    assert abs(light[..., :3].mean() - dark[..., :3].mean()) > 0.5
