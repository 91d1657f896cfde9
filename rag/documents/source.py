"""Plain text and source code: the canonical text is the file itself."""

from __future__ import annotations

import re

from rag.documents.model import Block, Document, fill_gaps

LANGUAGES: dict[str, str] = {
    ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp",
    ".hh": "cpp", ".hxx": "cpp", ".cu": "cpp", ".cuh": "cpp", ".inc": "cpp", ".py": "python",
    ".pyi": "python", ".l": "lex", ".lex": "lex", ".y": "yacc", ".yy": "yacc", ".g4": "antlr",
    ".ll": "llvm", ".td": "tablegen", ".mlir": "mlir", ".s": "asm", ".asm": "asm",
    ".java": "java", ".kt": "kotlin", ".scala": "scala", ".rs": "rust", ".go": "go",
    ".js": "javascript", ".mjs": "javascript", ".ts": "typescript", ".tsx": "typescript",
    ".jsx": "javascript", ".sh": "bash", ".bash": "bash", ".rb": "ruby", ".hs": "haskell",
    ".ml": "ocaml", ".mli": "ocaml", ".scm": "scheme", ".lisp": "lisp", ".sql": "sql",
    ".cs": "csharp", ".swift": "swift", ".lua": "lua", ".r": "r", ".m": "matlab", ".v": "verilog",
    ".sv": "verilog", ".vhd": "vhdl", ".cmake": "cmake", ".mk": "make", ".toml": "toml",
    ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".xml": "xml", ".css": "css",
    ".proto": "proto", ".diff": "diff", ".patch": "diff",
}  # fmt: skip
#: Files known by their whole name.
LANGUAGES_BY_NAME: dict[str, str] = {
    "makefile": "make", "gnumakefile": "make", "cmakelists.txt": "cmake", "dockerfile": "docker",
}  # fmt: skip
TEXT_SUFFIXES = frozenset({".txt", ".text", ".rst", ".tex", ".adoc", ".org", ".log", ".csv"})

_NAME = r"([A-Za-z_$][\w$]*)"
_DEFINITIONS = [
    re.compile(rf"^\s*(?:async\s+)?def\s+{_NAME}"),
    re.compile(
        rf"^\s*(?:(?:public|private|protected|static|final|abstract|export|default|pub(?:\([^)]*\))?"
        rf"|async|unsafe)\s+)*(?:class|struct|enum|union|interface|trait|namespace|fn|func|function"
        rf"|impl|module|object|type)\s+(?:\([^)]*\)\s*)?{_NAME}"
    ),
    re.compile(r"^define\b[^@]*@\"?([\w.$]+)"),
    re.compile(rf"^#\s*define\s+{_NAME}"),
    # C-like: a line without indentation that ends in an opened parameter list or body
    re.compile(rf"^[A-Za-z_][\w\s*&:<>,~\[\]]*?[\s*&]~?{_NAME}\s*\([^;]*$"),
    # a grammar rule or an assembly label
    re.compile(rf"^{_NAME}\s*:(?![:=])"),
    re.compile(rf"^{_NAME}$(?=)"),
]
_COMMENT = re.compile(
    r"^\s*(?://|/\*|\*|#(?!\s*(?:define|if|include|pragma|else|endif))|;|--|%%|@)"
)
_KEYWORDS = {"if", "for", "while", "switch", "return", "else", "do", "case", "catch", "default"}


def parse_source(text: str, name: str, language: str) -> Document:
    """Return the document of a source file, one block for each run of lines that belongs together.

    A block starts at a line without indentation after a blank line, or at a definition together
    with the comment above it; `heading_path` names the definition the block is in.
    """
    text = text.strip("\n").rstrip()
    lines = text.splitlines(keepends=True)
    starts = _unit_starts(lines)
    blocks: list[Block] = []
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        piece = "".join(lines[start:end])
        symbol = _symbol(lines[start:end])
        begin = offsets[start] + len(piece) - len(piece.lstrip("\n"))
        stop = offsets[start] + len(piece.rstrip())
        if stop > begin:
            path = (symbol,) if symbol else ()
            blocks.append(Block("code", begin, stop, path, None, language))
    return Document(name, text, tuple(fill_gaps(text, blocks)), "source")


def _unit_starts(lines: list[str]) -> list[int]:
    starts: list[int] = []
    blank = True
    for number, line in enumerate(lines):
        if not line.strip():
            blank = True
            continue
        outermost = not line[0].isspace() and line[0] not in "})]"
        if (blank and outermost) or (outermost and _defined(line) and not _follows(lines, number)):
            starts.append(number)
        blank = False
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    return starts


def _follows(lines: list[str], number: int) -> bool:
    """Say whether the line continues the one above: a comment, decorator or head of it."""
    above = lines[number - 1].strip() if number else ""
    return bool(above) and (bool(_COMMENT.match(above)) or not above.endswith((";", "}", ":")))


def _symbol(lines: list[str]) -> str:
    for line in lines:
        if _COMMENT.match(line) or not line.strip():
            continue
        found = _defined(line)
        if found:
            return found
    return ""


def _defined(line: str) -> str:
    for pattern in _DEFINITIONS:
        match = pattern.match(line)
        if match and match.group(1) not in _KEYWORDS:
            return match.group(1)
    return ""


def parse_text(text: str, stem: str) -> Document:
    """Return the document of a plain text: paragraphs between blank lines."""
    text = text.strip("\n").rstrip()
    blocks = [
        Block("prose", match.start(), match.start() + len(match.group().rstrip()))
        for match in re.finditer(r"\S(?:.*(?:\n(?!\s*\n))?)*", text)
        if match.group().strip()
    ]
    first = text.split("\n", 1)[0].strip()
    title = first if 0 < len(first) <= 80 and "\n\n" in text else stem
    return Document(title, text, tuple(fill_gaps(text, blocks)), "text")
