"""`python -m serving.stage`: one stage worker, started by the driver only."""

from __future__ import annotations

import os
import sys

import msgspec

from serving.config.engine import decode_path
from serving.errors import ConfigError, LecternError, ModelError
from serving.messages import StageFailed, StageSpec
from serving.process import die_with_parent


def main() -> int:
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=StageSpec, dec_hook=decode_path)
    die_with_parent(spec.parent_pid)

    import torch

    from serving.stage.links import DriverLinks
    from serving.stage.worker import StageWorker

    torch.set_num_threads(spec.threads)
    links = DriverLinks(spec.directory, spec.worker)
    code = 0
    try:
        worker = StageWorker(spec, links)
        worker.run()
        worker.close()
    except LecternError as error:
        kinds = {ConfigError: "config", ModelError: "model"}
        kind = next((name for type_, name in kinds.items() if isinstance(error, type_)), "dead")
        flag = error.flag if isinstance(error, ConfigError) else None
        links.send(StageFailed(spec.stage, kind, str(error), flag, spec.rank))
        code = 1
    except Exception as error:
        import traceback

        traceback.print_exc()
        what = f"{type(error).__name__}: " + str(error).strip().split("\n")[0]
        links.send(StageFailed(spec.stage, "dead", what, rank=spec.rank))
        code = 1
    links.close()
    return code


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    # Links to stages that are already gone would make an orderly end of torch wait for them.
    os._exit(exit_code)
