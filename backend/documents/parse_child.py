"""The child process that reads one document: `python -m backend.documents.parse_child`.

It gets a memory limit and dies with its parent. What it found goes to a file as JSON; a document
that cannot be read is an ordinary answer, not a crash.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
EXIT_MEMORY = 75


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)


def _read(source: Path, name: str) -> dict[str, object]:
    from rag.documents import DocumentError, parse
    from rag.passages import pack

    try:
        document = parse(source.read_bytes(), name)
        drafts = pack(document)
    except DocumentError as error:
        return {"error": str(error), "code": error.code}
    return {
        "title": document.title,
        "text": document.text,
        "passages": [
            {
                "text": draft.text,
                "heading_path": list(draft.heading_path),
                "page": draft.page,
                "start": draft.start,
                "end": draft.end,
            }
            for draft in drafts
        ],
    }


def main() -> None:
    source, name, out, limit, parent = sys.argv[1:6]
    _die_with_parent(int(parent))
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = json.dumps(_read(Path(source), name))
    except MemoryError:
        os._exit(EXIT_MEMORY)
    Path(out).write_text(answer, encoding="utf-8")


if __name__ == "__main__":
    main()
