"""The model and training core: it knows no device, no process group and no file of backends/."""
