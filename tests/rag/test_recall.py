"""The search finds the sample course's passages, with the embedder that comes with Lectern."""

import json
import subprocess
import sys
from pathlib import Path

LEAST = {"zh-zh": 0.90, "en-en": 0.90, "zh-en": 0.60}


def test_recall_on_the_sample_course() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "eval", "retrieval", "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, last = map(json.loads, done.stdout.splitlines()[-2:])
    assert set(last) == {"n", "recall@1", "recall@5", "recall@10", "mrr", "ms_per_query"}
    assert last["n"] == 60
    for name, least in LEAST.items():
        figures = head["details"][f"hybrid {name}"]
        assert figures["n"] == 20
        assert figures["recall@5"] >= least, f"{name}: {figures}"
