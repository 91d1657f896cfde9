"""A stage on an NVIDIA GPU: nothing on its launch path waits for the device."""
