"""Bytes to text: what kind of file it really is, and in which encoding."""

from __future__ import annotations

import codecs
import re

from rag.documents.model import DocumentError

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "a PDF file"),
    (b"PK\x03\x04", "a ZIP archive or an Office document"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (b"\x7fELF", "a compiled program"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF87a", "a GIF picture"),
    (b"GIF89a", "a GIF picture"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"{\\rtf", "an RTF document"),
    (b"\xca\xfe\xba\xbe", "a compiled Java class"),
    (b"MZ\x90\x00", "a Windows program"),
    (b"SQLite format 3\x00", "a SQLite database"),
)
_BOMS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Control characters that never stand in a text file (tabs, line and form feeds and returns do),
#: and halves of surrogate pairs, which JSON can hold but no file and no database.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ud800-\udfff]")
_CONTROL_BYTES = bytes([*range(0, 9), *range(14, 27), *range(28, 32), 127])
_DECLARED = re.compile(
    rb"(?:charset|coding)\s*[=:]\s*[\"']?(gb\d{4,5}|gbk|big5(?:-?hkscs)?|shift_?jis|euc-?\w{2}|"
    rb"iso-?8859-?\d{1,2}|latin-?1|(?:windows-|cp)125\d|koi8-[ru])\b",
    re.IGNORECASE,
)


def real_type(data: bytes) -> str | None:
    """Return what the first bytes say the file is, or None for text and unknown kinds."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    return None


def decode(data: bytes, name: str) -> str:
    """Return the text of a file whose suffix says that it is text.

    Order: byte-order mark, UTF-8, the encoding the file declares, GB18030 if the result reads
    as Chinese, Big5 likewise, else Windows-1252 with replacement. Line ends become `\\n`.

    Raises:
        DocumentError: `wrong_type` for a binary file.
    """
    kind = real_type(data)
    if kind is not None:
        suffix = f"ends in .{name.rpartition('.')[2]}" if "." in name else "has no suffix"
        raise DocumentError(
            f"{name} is {kind} although its name {suffix}; upload it under its right name.",
            "wrong_type",
        )
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return clean(data.decode(encoding, "replace"))
    sample = data[:65_536]
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    if b"\x00" in sample or controls > 3 + len(sample) // 50:
        raise DocumentError(
            f"{name} holds binary data, not the text that its name promises; export it as text,"
            " Markdown or PDF and upload that.",
            "wrong_type",
        )
    return clean(_decode_text(data))


def _decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # A few damaged bytes in a UTF-8 file: the part before them must be real UTF-8 text.
        beyond_ascii = sum(byte >= 0x80 for byte in data[: error.start])
        if beyond_ascii >= 12 and data.decode("utf-8", "replace").count("�") < beyond_ascii // 12:
            return data.decode("utf-8", "replace")
    declared = _DECLARED.search(data[:2048])
    if declared:
        try:
            return data.decode(declared.group(1).decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            pass  # a wrong declaration: guess as if it were not there
    for encoding in ("gb18030", "big5"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if _reads_as_chinese(text):
            return text
    return data.decode("cp1252", "replace")


def _reads_as_chinese(text: str) -> bool:
    """Say whether the characters beyond ASCII are mostly common Chinese ones.

    Western letters read as GB18030 come out as rare characters, one at a time.
    """
    beyond = [c for c in text[:200_000] if ord(c) >= 0x80]
    common = sum(_common_in_gb2312(c) for c in beyond)
    runs = len(re.findall(r"[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef]{2,}", text[:200_000]))
    return bool(beyond) and common * 10 >= len(beyond) * 8 and runs >= 1


def _common_in_gb2312(character: str) -> bool:
    """Say whether it is one of the 3755 level-one characters of GB 2312 or its punctuation."""
    try:
        code = character.encode("gb2312")
    except UnicodeEncodeError:
        return "\u4e00" <= character <= "\u9fff" and _in_big5_level_one(character)
    return len(code) == 2 and (0xB0 <= code[0] <= 0xD7 or code[0] in (0xA1, 0xA3))


def _in_big5_level_one(character: str) -> bool:
    try:
        code = character.encode("big5")
    except UnicodeEncodeError:
        return False
    return 0xA4 <= code[0] <= 0xC6


def clean(text: str) -> str:
    """Normalise line ends and drop control characters, which no reader can see."""
    text = re.sub("\r\n|[\r\x0b\f]", "\n", text).replace("\ufeff", "")
    return _CONTROL.sub("", text)
