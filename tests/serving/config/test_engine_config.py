from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from serving.config.engine import EngineConfig, decode_path, encode_path
from serving.core import Layout, SamplingParams
from serving.driver.limits import resolve_limits
from serving.errors import ConfigError, InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pipeline_parallel_size", 0),
        ("pipeline_parallel_size", "2"),
        ("tensor_parallel_size", 0),
        ("dtype", "int4"),
        ("load_format", "gguf"),
        ("page_size", 12),
        ("page_size", 0),
        ("num_kv_pages", 0),
        ("kv_memory", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 1),
        ("threads", 0),
        ("step_timeout", 0.0),
        ("devices", ["cpu", "cpu"]),
        ("devices", ["gpu0"]),
        ("devices", ["cuda:-1"]),
        ("devices", ["cuda:"]),
        ("layer_layout", [2, 2]),
        ("layer_layout", [0]),
        ("order", "lifo"),
        ("schedule_policy", "none"),
        ("cache_eviction", "random"),
    ],
)
def test_a_wrong_setting_names_its_flag(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(model=Path("m"), **{field: value})  # type: ignore[arg-type]
    flag = "--" + field.replace("_", "-")
    assert error.value.flag == flag
    assert flag in str(error.value)


def test_a_configuration_survives_its_encoding() -> None:
    config = EngineConfig(model=Path("/a/b"), pipeline_parallel_size=2, layer_layout=[1, 2])
    data = msgspec.json.encode(config, enc_hook=encode_path)
    assert msgspec.json.decode(data, type=EngineConfig, dec_hook=decode_path) == config
    assert config.name == "b"


def test_layouts() -> None:
    assert Layout.even(7, 3).bounds == [0, 3, 5, 7]
    assert list(Layout.of_counts([1, 3]).layers(1)) == [1, 2, 3]
    assert Layout.even(4, 4).num_stages == 4


def test_limits_of_pages_and_context() -> None:
    config = EngineConfig(model=Path("m"), max_num_seqs=4)
    limits = resolve_limits(config, fitting_pages=1000, context_length=160)
    assert (limits.num_pages, limits.max_model_len) == (80, 160)
    limits = resolve_limits(config, fitting_pages=5, context_length=160)
    assert (limits.num_pages, limits.max_model_len) == (5, 80)
    assert "160" in limits.reason
    asked = EngineConfig(model=Path("m"), num_kv_pages=3, max_model_len=20)
    assert resolve_limits(asked, 99, 160).max_model_len == 20
    for wrong in ({"num_kv_pages": 1, "max_model_len": 20}, {"max_model_len": 200}):
        with pytest.raises(ConfigError, match="--max-model-len"):
            resolve_limits(EngineConfig(model=Path("m"), **wrong), 99, 160)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="less than two tokens"):
        resolve_limits(EngineConfig(model=Path("m"), page_size=1, num_kv_pages=1), 99, 160)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop_token_ids", [100]),
        ("logprobs", 21),
        ("n", 0),
    ],
)
def test_a_wrong_sampling_field_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{field: value}).validate(100)  # type: ignore[arg-type]
    assert error.value.param == field
    assert error.value.status == 400


def test_the_defaults_are_valid() -> None:
    SamplingParams().validate(1)
    SamplingParams(max_tokens=None, min_tokens=5, top_k=-1, seed=2**64 - 1).validate(10)


def test_devices_are_listed_rank_by_rank() -> None:
    names = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    sizes = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    listed = EngineConfig(model=Path("m"), devices=names, **sizes)  # type: ignore[arg-type]
    counted = EngineConfig(model=Path("m"), device="cuda", **sizes)  # type: ignore[arg-type]
    for config in (listed, counted):
        found = [config.stage_device(stage, rank) for stage in range(2) for rank in range(2)]
        assert found == names


@pytest.mark.parametrize(
    ("devices", "stages", "ranks", "said"),
    [
        (["cpu"], 1, 2, "give one device a rank"),
        (["cpu", "cpu", "cpu"], 2, 1, "give one device a stage"),
        (["cpu", "cuda:0"], 1, 2, "devices of different kinds"),
        (["cuda:0", "cuda:0"], 1, 2, "each rank needs a GPU of its own"),
        (["cuda:0", "cuda:1", "cuda:2", "cuda:2"], 2, 2, "ranks of stage 1 the same device"),
    ],
)
def test_devices_that_ranks_cannot_use(
    devices: list[str], stages: int, ranks: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        EngineConfig(
            model=Path("m"),
            devices=devices,
            pipeline_parallel_size=stages,
            tensor_parallel_size=ranks,
        )
    assert error.value.flag == "--devices"
