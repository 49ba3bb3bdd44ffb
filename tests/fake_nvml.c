/* A stand-in for libnvidia-ml.so.1: the functions that gpu.py calls, with NVML's own ABI.
 *
 * FAKE_NVML says what it plays: the name of an ending of nvmlInit, or of two cards.
 *   healthy   two H200 at work         sick   memory errors, too hot; the second is off the bus
 *   bare      a card that can tell next to nothing
 * FAKE_NVML_PROCESSES: "PID:BYTES,PID:BYTES" on the first card. FAKE_NVML_LOG: file of the calls
 * that open and close the library. Compiled with -DOLD_DRIVER it lacks what drivers before 510 do.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, LOST = 15, MISMATCH = 18, UNKNOWN = 999 };

typedef unsigned long long u64;
typedef struct { u64 total, free, used; } memory_v1;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2;
typedef struct { unsigned gpu, memory; } rates;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process;

static int is(const char *what) {
  const char *played = getenv("FAKE_NVML");
  return played && strcmp(played, what) == 0;
}

static void record(const char *call) {
  const char *path = getenv("FAKE_NVML_LOG");
  FILE *log = path ? fopen(path, "a") : NULL;
  if (log) { fprintf(log, "%s\n", call); fclose(log); }
}

static int cards[2] = {0, 1};
#define BARE if (is("bare")) return NOT_SUPPORTED
#define G (1ULL << 30)

int nvmlInitWithFlags(unsigned flags) {
  if (is("not_loaded")) return DRIVER_NOT_LOADED;
  if (is("no_permission")) return NO_PERMISSION;
  if (is("mismatch")) return MISMATCH;
  if (is("unknown")) return UNKNOWN;
  record("init");
  return SUCCESS;
}
int nvmlShutdown(void) { record("shutdown"); return SUCCESS; }
const char *nvmlErrorString(int error) { return error == UNKNOWN ? "Unknown Error" : "Some Error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  const char *version = getenv("FAKE_NVML_DRIVER");
  snprintf(text, size, "%s", version ? version : "580.95.05");
  return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 13000; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = is("bare") ? 1 : 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, int **card) {
  if (is("sick") && index == 1) return LOST;
  *card = &cards[index];
  return SUCCESS;
}
int nvmlDeviceGetUUID(int *card, char *text, unsigned size) {
  snprintf(text, size, "GPU-00000000-0000-0000-0000-00000000000%d", *card);
  return SUCCESS;
}
int nvmlDeviceGetName(int *card, char *text, unsigned size) {
  snprintf(text, size, is("bare") ? "NVIDIA T400" : "NVIDIA H200");
  return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(int *card, memory_v1 *memory) {
  BARE;
  *memory = (memory_v1){141 * G, 79 * G, 62 * G};
  return SUCCESS;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(int *card, memory_v2 *memory) {
  BARE;
  if (memory->version != (sizeof(memory_v2) | 2u << 24)) return 25;
  *memory = (memory_v2){memory->version, 141 * G, 1 * G, 79 * G, 61 * G};
  return SUCCESS;
}
#endif
int nvmlDeviceGetUtilizationRates(int *card, rates *rates) {
  BARE;
  rates->gpu = 97; rates->memory = 40;
  return SUCCESS;
}
int nvmlDeviceGetTemperature(int *card, int sensor, unsigned *celsius) {
  *celsius = is("sick") ? 92 : 61;
  return sensor == 0 ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetPowerUsage(int *card, unsigned *milliwatts) {
  BARE;
  *milliwatts = 512500;
  return SUCCESS;
}
int nvmlDeviceGetEnforcedPowerLimit(int *card, unsigned *milliwatts) {
  BARE;
  *milliwatts = 700000;
  return SUCCESS;
}
int nvmlDeviceGetTotalEccErrors(int *card, int type, int counter, u64 *errors) {
  BARE;
  if (type != 1 || counter != 0) return NOT_SUPPORTED; /* uncorrected, volatile */
  *errors = is("sick") ? 3 : 0;
  return SUCCESS;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(int *card, u64 *reasons) {
  BARE;
  *reasons = is("sick") ? 0x48 : 0x4; /* hardware and thermal slowdown; power limit */
  return SUCCESS;
}
static int processes(int *card, unsigned *count, process *found) {
  const char *list = getenv("FAKE_NVML_PROCESSES");
  unsigned n = 0, pid;
  u64 used;
  int read;
  BARE;
  while (*card == 0 && list && sscanf(list, "%u:%llu%n", &pid, &used, &read) == 2) {
    if (found) found[n] = (process){pid, used, -1, -1};
    n++;
    list += read + (list[read] == ',');
  }
  int fits = found || n == 0;
  *count = n;
  return fits ? SUCCESS : INSUFFICIENT_SIZE;
}
int nvmlDeviceGetComputeRunningProcesses_v2(int *card, unsigned *count, process *found) {
  return processes(card, count, found);
}
#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(int *card, unsigned *count, process *found) {
  return processes(card, count, found);
}
#endif
