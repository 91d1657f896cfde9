"""What the overview of an administrator shows. None where the upstream has no such figure."""

from pydantic import BaseModel


class Pages(BaseModel):
    free: float | None
    cached: float | None
    used: float | None


class Stage(BaseModel):
    stage: str
    busy: float | None
    wait_input: float | None
    wait_link: float | None
    idle: float | None


class EngineFigures(BaseModel):
    reachable: bool
    model: str | None
    requests_running: float | None
    requests_waiting: float | None
    prompt_tokens_s: float | None
    generation_tokens_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    kv_pages: Pages
    preemptions: float | None
    stages: list[Stage]


class Point(BaseModel):
    t: float
    generation_tokens_s: float | None
    requests_running: float | None
    ttft_p50_s: float | None
    tpot_p50_s: float | None
    kv_used: float | None


class BackendFigures(BaseModel):
    live_streams: int
    sessions: int
    users: int
    courses: int
    documents: dict[str, int]
    tokens_today: int
    requests_today: int


class Overview(BaseModel):
    engine: EngineFigures
    series: list[Point]
    backend: BackendFigures
