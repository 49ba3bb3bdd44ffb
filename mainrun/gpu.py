"""What the NVIDIA driver says of this machine's GPUs, as plain values.

NVML is asked directly: no `nvidia-smi`, no JAX, and no memory of the GPU is taken. Cards differ in
what they can tell; what one cannot is None. A machine without a driver is nothing unusual: the
answer has no cards, and a reason. Who the processes on a GPU belong to is found in machine.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

Value = TypeVar("Value")

NO_DRIVER = "no NVIDIA driver is installed"

_REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_DRIVER,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA driver is installed but not loaded: `modprobe nvidia` says why, or reboot"
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "this user may not use the NVIDIA driver: give it access to /dev/nvidiactl and /dev/nvidia*"
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA driver was upgraded while the old one stayed loaded: reboot"
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: "a GPU has fallen off the bus: reboot",
    pynvml.NVML_ERROR_RESET_REQUIRED: "it needs a reset: `nvidia-smi --gpu-reset`, or reboot",
}
_CANNOT_TELL = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,  # the card lacks it
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # the driver is older than the question
    pynvml.NVML_ERROR_NO_PERMISSION,  # others' processes, inside a container
    pynvml.NVML_ERROR_INSUFFICIENT_SIZE,  # more processes came while they were counted
)

_THROTTLING = {
    pynvml.nvmlClocksThrottleReasonGpuIdle: "idle",
    pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting: "clocks set by somebody",
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "power limit",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksThrottleReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "too warm",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "too hot",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksThrottleReasonDisplayClockSetting: "display",
}
FAULTY_THROTTLING = frozenset({"hardware slowdown", "too hot", "power brake"})
"""What the hardware does to save itself; a power limit reached, say, is ordinary work."""


@dataclass(frozen=True)
class GpuProcess:
    pid: int
    used_bytes: int | None


@dataclass(frozen=True)
class GpuStatus:
    """One card; None is what it cannot tell."""

    index: int
    uuid: str | None = None
    name: str | None = None
    used_bytes: int | None = None
    total_bytes: int | None = None
    utilisation_percent: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    ecc_uncorrected: int | None = None
    """Memory errors since the driver was loaded that could not be mended."""
    throttling: tuple[str, ...] | None = None
    """Why the clock is below its highest; empty where nothing holds it back."""
    processes: tuple[GpuProcess, ...] | None = None
    fault: str = ""
    """Why the card answers nothing at all."""


@dataclass(frozen=True)
class Gpus:
    cards: tuple[GpuStatus, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    """The newest that the driver can run; the wheels bring their own, which may be older."""
    reason: str = ""
    """Why there is nothing to read; empty where the driver answered."""


def read() -> Gpus:
    """All cards as they are now; no cards and a reason where no driver answers. Some 10 ms."""
    try:
        with _nvml():
            return Gpus(
                cards=tuple(map(_card, range(pynvml.nvmlDeviceGetCount()))),
                driver_version=_told(pynvml.nvmlSystemGetDriverVersion),
                cuda_version=_version(_told(pynvml.nvmlSystemGetCudaDriverVersion)),
            )
    except pynvml.NVMLError as error:
        return Gpus(reason=_reason(error))


def count() -> int:
    """How many GPUs this process sees; 0 without a driver."""
    return len(gpu_indices())


def gpu_indices() -> tuple[int, ...]:
    """Indices of the GPUs that answer; one that fell off the bus cannot be given to a job."""
    try:
        with _nvml():
            return tuple(i for i in range(pynvml.nvmlDeviceGetCount()) if _answers(i))
    except pynvml.NVMLError:
        return ()


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _answers(index: int) -> bool:
    try:
        pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError:
        return False
    return True


def _card(index: int) -> GpuStatus:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = _memory(handle)
        utilisation = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
        return GpuStatus(
            index=index,
            uuid=_told(pynvml.nvmlDeviceGetUUID, handle),
            name=_told(pynvml.nvmlDeviceGetName, handle),
            used_bytes=None if memory is None else memory.used,
            total_bytes=None if memory is None else memory.total,
            utilisation_percent=None if utilisation is None else utilisation.gpu,
            temperature_celsius=_told(
                pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
            ),
            power_watts=_watts(_told(pynvml.nvmlDeviceGetPowerUsage, handle)),
            power_limit_watts=_watts(_told(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
            ecc_uncorrected=_told(
                pynvml.nvmlDeviceGetTotalEccErrors,
                handle,
                pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                pynvml.NVML_VOLATILE_ECC,
            ),
            throttling=_throttling(_told(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)),
            processes=_processes(handle),
        )
    except pynvml.NVMLError as error:  # lost, or in need of a reset: the other cards still answer
        return GpuStatus(index=index, fault=_reason(error))


def _memory(handle: Any) -> Any:
    """By the second form of the question, which leaves out what the driver keeps for itself."""
    second = _told(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    return second or _told(pynvml.nvmlDeviceGetMemoryInfo, handle)


def _processes(handle: Any) -> tuple[GpuProcess, ...] | None:
    found = _told(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    if found is None:  # drivers before 510 know the second form only
        found = _told(pynvml.nvmlDeviceGetComputeRunningProcesses_v2, handle)
    if found is None:
        return None
    return tuple(GpuProcess(process.pid, process.usedGpuMemory) for process in found)


def _told(question: Callable[..., Value], *arguments: Any) -> Value | None:
    """The answer; None where this card, driver or user has none."""
    try:
        return question(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _CANNOT_TELL:
            return None
        raise


def _throttling(bits: int | None) -> tuple[str, ...] | None:
    if bits is None:
        return None
    return tuple(word for bit, word in _THROTTLING.items() if bits & bit)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _version(number: int | None) -> str | None:
    """12040 is 12.4."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _reason(error: Any) -> str:
    return _REASONS.get(error.value) or f"the NVIDIA driver does not answer: {error}"
