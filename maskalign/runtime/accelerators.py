"""Table of the peak rates of accelerators. Imports no torch."""

# Dense peaks in TFLOP/s from the vendors' data sheets: bfloat16 with float32 sums, and the rate of float32 matrix
# multiplications (TF32, see device.tune_host; for MI300X its float32 matrix rate). The keys are parts of the device
# names that the driver reports.
PEAK_TFLOPS = {
    "A100": (312, 156),
    "H100 PCIe": (756, 378),
    "H100": (989, 494),
    "H200": (989, 494),
    "GH200": (989, 494),
    "B200": (2250, 1125),
    "MI300X": (1307, 163),
}


def peak_tflops(name):
    """(bfloat16, float32) peak TFLOP/s of the device with this name in the driver; None for an unknown device."""
    known = [key for key in PEAK_TFLOPS if key in name]
    return PEAK_TFLOPS[max(known, key=len)] if known else None
