"""The CUDA driver, started while torch is still being imported. Imports nothing of ours, and no torch."""

import ctypes
import re
import threading


def wake(asked: str) -> None:
    """Start the driver and the context of the device that `--device` asks for, in the background.

    Takes half a second that torch would otherwise take after its own import; torch then finds the context. Does
    nothing where there is no driver or no such device: `devices.choose_device` says so later.
    """
    found = re.fullmatch(r"(?:auto|cuda)(?::(\d+))?", asked)
    if found:
        threading.Thread(target=_context, args=(int(found[1] or 0),), daemon=True).start()


def _context(index: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
