"""Where the sample course lies in the installed package."""

from __future__ import annotations

from pathlib import Path


def sample_course_folder() -> Path:
    """Return the folder with `course.toml`, `documents/` and `questions.jsonl`."""
    return Path(__file__).with_name("sample_course")


def sample_documents_folder() -> Path:
    return sample_course_folder() / "documents"


def sample_questions_file() -> Path:
    return sample_course_folder() / "questions.jsonl"


def sample_unanswerable_file() -> Path:
    return sample_course_folder() / "unanswerable.jsonl"
