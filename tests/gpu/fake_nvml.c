/* Stands in for NVIDIA's management library in tests; FAKE_NVML names what happens. It calls itself a fake. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
static int is(const char *scenario) { const char *now = getenv("FAKE_NVML"); return now && !strcmp(now, scenario); }
static int lost(void) { return is("gpu_lost") ? GPU_IS_LOST : OK; }

int nvmlInitWithFlags(unsigned flags) { return is("driver_not_loaded") ? DRIVER_NOT_LOADED : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "an error"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { snprintf(to, size, "000.00-fake"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = is("no_device") ? 0 : 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = &is; return is("no_device") ? NOT_FOUND : OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &is;
    return is("no_device") || strcmp(uuid, "GPU-fake") ? NOT_FOUND : OK;
}
int nvmlDeviceGetName(void *device, char *to, unsigned size) { snprintf(to, size, "Fake GPU"); return lost(); }
int nvmlDeviceGetUUID(void *device, char *to, unsigned size) { snprintf(to, size, "GPU-fake"); return lost(); }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *sizes) { sizes[0] = 1ull << 34; return lost(); }
int nvmlDeviceGetEccMode(void *device, unsigned *now, unsigned *later) { *now = *later = 1; return lost(); }
int nvmlDeviceGetClockInfo(void *device, unsigned kind, unsigned *mhz) { *mhz = kind == 1 ? 1410 : 1215; return lost(); }
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) { *celsius = 61; return lost(); }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    *milliwatts = 250000;
    return is("no_power") ? NOT_SUPPORTED : lost();
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    static unsigned long long spent = 1000000;
    *millijoules = spent += 5000; /* 5 J from one reading to the next */
    return is("no_power") || is("no_energy") ? NOT_SUPPORTED : lost();
}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *mask) {
    *mask = is("throttle") ? 0x4 | 0x40 | 0x1 : 0x1; /* power cap, hardware thermal, idle */
    return lost();
}
