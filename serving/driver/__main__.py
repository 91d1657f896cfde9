"""`python -m serving.driver`: the driver process, started by `serving.engine` only."""

from __future__ import annotations

import os
import sys
import traceback

import msgspec

from serving.config.engine import decode_path
from serving.driver.loop import Driver
from serving.errors import ConfigError, LecternError, ModelError
from serving.messages import DriverSpec, Failed
from serving.process import die_with_parent


def main() -> int:
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=DriverSpec, dec_hook=decode_path)
    die_with_parent(spec.parent_pid)
    driver = Driver(spec)
    failure: Failed | None = None
    try:
        driver.run()
    except ConfigError as error:
        failure = Failed(str(error), "config", error.flag)
    except ModelError as error:
        failure = Failed(str(error), "model")
    except LecternError as error:
        failure = Failed(str(error))
    except Exception as error:
        traceback.print_exc()
        failure = Failed(f"The driver failed: {type(error).__name__}: {error}")
    if failure is not None:
        driver.tell(failure)
    driver.close(orderly=failure is None)
    return 0 if failure is None else 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
