"""Model and document text made safe to hand to `st.markdown`.

Streamlit escapes raw HTML, so what is left to guard is Markdown itself: a picture would be fetched
from its address (and the address can carry the conversation away), and a link can hide where it
goes. Pictures are replaced by their description, links keep only http(s) targets and show their
host. Code and formulas stay as they are. The content security policy refuses foreign pictures a
second time, should a construction slip through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

#: How a link in angle brackets begins: its scheme.
_ANGLE = r"<[a-zA-Z][a-zA-Z0-9+.-]{1,31}:"
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
# Code spans and formulas, which are copied unchanged, and links in angle brackets: the one that
# begins first wins. Each alternative is linear: the content classes exclude the delimiter, or are
# bounded to one line.
_SPAN = re.compile(
    r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)|\$\$[^$]+\$\$|(?<!\\)\$[^$\n]+\$"
    rf"|{_ANGLE}[^<>\s]*>"
)
_IMAGE = re.compile(r"!\[([^\[\]\n]*)\]\(\s*<?([^()\s<>]*)>?[^()\n]*\)")
_LINK = re.compile(r"(?<!!)\[([^\[\]\n]+)\]\(\s*<?([^()\s<>]*)>?[^()\n]*\)")
_AUTOLINK = re.compile(rf"{_ANGLE}[^<>\s]*>")
_LINK_LIKE = re.compile(rf"\][(:]|{_ANGLE}")
_CITATION = re.compile(r"(?<![\\!])\[(\d{1,3}(?:\s?[,，、]\s?\d{1,3}){0,9})\](?!\()")
_NUMBER = re.compile(r"\d+")


def link_host(url: str) -> str | None:
    """The host a link leads to, or None when it is not a plain http(s) link."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    if parts.scheme.lower() not in {"http", "https"} or "@" in parts.netloc:
        return None
    return parts.hostname


def _plain_label(label: str) -> str:
    return label.replace("[", "\\[").replace("]", "\\]")


def _image(match: re.Match[str]) -> str:
    label = _plain_label(match[1].strip()) or "…"
    host = link_host(match[2])
    return f":material/image: {label} ({host})" if host else f":material/image: {label}"


def _link(match: re.Match[str]) -> str:
    label, url = _plain_label(match[1]), match[2]
    host = link_host(url)
    if host is None:
        return label
    shown = label if label.strip() in {host, url} else f"{label} ({host})"
    return f"[{shown}]({url})"


def _links(part: str) -> str:
    """Plain links with their host shown; whatever else could become a link is text.

    Links with brackets, code or line ends inside and targets with parentheses are not recognised,
    and so are disarmed with the rest; definitions (`[x]: address`) may stand anywhere.
    """
    result: list[str] = []
    position = 0
    for match in _LINK.finditer(part):
        result += (_disarmed(part[position : match.start()]), _link(match))
        position = match.end()
    return "".join((*result, _disarmed(part[position:])))


def _disarmed(prose: str) -> str:
    return prose.replace("](", "]\\(").replace("]:", "]\\:")


def _autolink(match: re.Match[str]) -> str:
    address = match[0][1:-1]
    return match[0] if link_host(address) else address.replace(":", "\\:", 1)


def _prose(part: str) -> str:
    part = _IMAGE.sub(_image, part)
    part = _links(part)
    part = _AUTOLINK.sub(_autolink, part)
    # Whatever still looks like a picture (by reference, or with brackets inside) becomes text.
    return part.replace("![", "!\\[")


def _verbatim(span: str) -> bool:
    """Whether it is code or a formula; what a reader without formulas takes for a link is not."""
    return span[0] == "`" or (span[0] == "$" and not _LINK_LIKE.search(span))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the runs of `text` that are neither code nor formulas."""
    result: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        if not prose:
            return
        block, position = "".join(prose), 0
        prose.clear()
        match = _SPAN.search(block)
        while match:
            end = match.end()
            if _verbatim(match[0]):
                result.append(change(block[position : match.start()]))
                result.append(match[0])
                position = end
            elif match[0][0] == "$":
                end = match.start() + 1  # no formula: what its marks enclose may be otherwise
            match = _SPAN.search(block, end)
        result.append(change(block[position:]))

    fence = ""
    for line in text.splitlines(keepends=True):
        opening = _FENCE.match(line)
        if fence:
            result.append(line)
            if opening and opening[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif opening:
            flush()
            fence = opening[1]
            result.append(line)
        else:
            prose.append(line)
    flush()
    return "".join(result)


def safe(text: str) -> str:
    """`text` as Markdown without pictures, foreign schemes or links that hide their host."""
    return _outside_code(text, _prose)


def cited(text: str, message: str, numbers: Collection[int]) -> str:
    """`safe(text)` in which each `[n]` with n in `numbers` is a link to `#cite-MESSAGE-n`.

    The page listens for clicks on these links; a number that names no passage stays text.
    """

    def mark(match: re.Match[str]) -> str:
        found = [int(number) for number in _NUMBER.findall(match[1])]
        if not all(number in numbers for number in found):
            return match[0]
        return "".join(f"[:blue-badge[{n}]](#cite-{message}-{n})" for n in found)

    return _outside_code(safe(text), lambda part: _CITATION.sub(mark, part))


def as_text(value: str) -> str:
    """A name or title for places that read Markdown, such as button labels: all of it literal."""
    flat = " ".join(value.split())
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-!|<>~$:])", r"\\\1", flat)
    return re.sub(r"^(\d+)\.", r"\1\\.", escaped)
