"""Peak speeds of GPUs, for the model FLOP utilization (MFU) of training.

The peaks count dense 16-bit matrix products with float32 sums, as PyTorch computes them.
"""
from typing import Any

# Names are from the driver's list of supported GPUs (README of NVIDIA/open-gpu-kernel-modules), without "NVIDIA".
# Data-center GPUs, in 10^12 FLOP/s, from NVIDIA's data sheets; half of each figure that is given with sparsity.
PEAK_TFLOPS = {
    "Tesla V100-SXM2-16GB": 125, "Tesla V100-SXM2-32GB": 125, "Tesla V100-PCIE-16GB": 112, "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65, "A100-SXM4-40GB": 312, "A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "A100 80GB PCIe": 312,
    "A10": 125, "L4": 121, "L40S": 362, "H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "B200": 2250}
# Desktop GeForce cards: number of multiprocessors (SMs) and boost clock in MHz, from TechPowerUp's database. With
# GEFORCE_FLOPS they give the peaks in NVIDIA's whitepapers: 53.8 TFLOPS for the RTX 2080 Ti, 71 for the 3090 and 165.2
# for the 4090. These are half of the peaks with float16 sums, which advertisements show.
GEFORCE_FLOPS = 512                 # per SM and clock, RTX 20 to 50
GEFORCE_CLOCKS = {
    "RTX 2060": {30: 1680, 34: 1650}, "RTX 2060 SUPER": {34: 1650},
    "RTX 2070": {36: 1620}, "RTX 2070 SUPER": {40: 1770},
    "RTX 2080": {46: 1710}, "RTX 2080 SUPER": {48: 1815}, "RTX 2080 Ti": {68: 1545},
    "RTX 3050": {18: 1470, 20: 1777}, "RTX 3060": {28: 1777}, "RTX 3060 Ti": {38: 1665},
    "RTX 3070": {46: 1725}, "RTX 3070 Ti": {48: 1770}, "RTX 3080": {68: 1710, 70: 1710}, "RTX 3080 Ti": {80: 1665},
    "RTX 3090": {82: 1695}, "RTX 3090 Ti": {84: 1860},
    "RTX 4060": {24: 2460}, "RTX 4060 Ti": {34: 2535}, "RTX 4070": {46: 2475}, "RTX 4070 SUPER": {56: 2475},
    "RTX 4070 Ti": {60: 2610}, "RTX 4070 Ti SUPER": {66: 2610}, "RTX 4080": {76: 2505}, "RTX 4080 SUPER": {80: 2550},
    "RTX 4090": {128: 2520},
    "RTX 5050": {20: 2572}, "RTX 5060": {30: 2497}, "RTX 5060 Ti": {36: 2572}, "RTX 5070": {48: 2512},
    "RTX 5070 Ti": {70: 2452}, "RTX 5080": {84: 2617}, "RTX 5090": {170: 2407}}


def peak_tflops(gpu: Any) -> float | None:
    """Return the peak of a GPU in 10^12 FLOP/s, or None if it is not in the tables.

    gpu: the result of torch.cuda.get_device_properties.
    """
    name = gpu.name.removeprefix("NVIDIA ")
    if name in PEAK_TFLOPS:
        return PEAK_TFLOPS[name]
    card = name.removeprefix("GeForce ")
    clock = GEFORCE_CLOCKS.get(card, {}).get(gpu.multi_processor_count)
    if clock is None:
        return None
    # Laptops share names of the RTX 20 series; their clocks are at least 7% lower. Old PyTorch does not know clocks.
    if card.startswith("RTX 20") and getattr(gpu, "clock_rate", 0) < 0.97 * 1000 * clock:       # kHz
        return None
    return gpu.multi_processor_count * clock * GEFORCE_FLOPS / 1e6
