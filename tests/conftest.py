"""What has to happen before any test file is imported."""

# Some of them import triton, and its interpreter can only be switched on before that.
import tests.serving.interpreter  # noqa: F401
