"""Reading pages in tests: their elements and text, texts that try to become markup, and pictures."""

import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "link", "img", "br", "hr", "input"}
NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onload=alert(1) x='",
    "</title></style></svg></pre><script src=//example.org/x.js></script>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp; \u2028",
    "\u0642\u0637\u0629 \u0633\u0648\u062f\u0627\u0621 \u202e reversed",
    "\u6a21\u578b \U0001f408 caf\u00e9 \u0000",
    "word " * 400,
    "x" * 2000,
]


class Page(HTMLParser):
    """Elements, attributes and text of a page, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


def picture(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(buffer, kind)
    return buffer.getvalue()
