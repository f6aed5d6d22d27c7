"""Headlines: a benchmark's main numbers, beside the predictions that were made for one H200 before
anything was measured.

    headline: three GEMMs, 16384x896x151936: 21.3 ms (predicted 20.5: 1.04 times)

bench/gpu.sh gathers these lines in its summary, so that a reader sees at once which prediction was
wrong.
"""

import torch

HEADS = (
    "16384x896x151936",
    "16384x1536x151936",
    "16384x3584x151936",
    "16384x4096x128256",
)  # T x D x V
GEMMS_MS = (20.5, 32.9, 72.7, 69.9)  # at 620 to 740 TFLOP/s, by shape
STASHED_MS = (25.3, 37.7, 77.7, 74.4)  # and the row kernel at 90 % of the memory's 4.3 TB/s

# What is predicted: a number, or the lowest and highest number that would not be a surprise.
PREDICTED = {
    "peak GEMM": (620, 800),  # TFLOP/s
    "memory bandwidth": 4300,  # GB/s
    "MFU, Qwen2.5-0.5B": (35, 42),  # %, not compiled, no checkpointing
    "MFU, Qwen2.5-1.5B": (45, 52),
}
for head, gemms, stashed in zip(HEADS, GEMMS_MS, STASHED_MS, strict=True):
    PREDICTED[f"three GEMMs, {head}"] = gemms
    PREDICTED[f"ours, stash, {head}"] = stashed
    PREDICTED[f"ours, as the trainer calls it, {head}"] = (
        stashed  # its default keeps all rows of these
    )
    PREDICTED[f"row kernel, {head}"] = 3870  # GB/s


def predicted_here(name: str):
    """The prediction; None where there is none, or for another machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return PREDICTED.get(name) if "H200" in gpu else None


def headline(name: str, measured: float, unit: str, predicted=None) -> str:
    """The line. predicted: a number or (lowest, highest); None: what PREDICTED says of `name`."""
    line = f"headline: {name}: {measured:.4g} {unit}"
    predicted = predicted or predicted_here(name)
    if predicted is None:
        return line
    if isinstance(predicted, tuple):
        low, high = predicted
        nearest = min(max(measured, low), high)
        return f"{line} (predicted {low:g} to {high:g}: {measured / nearest:.2f} times)"
    return f"{line} (predicted {predicted:.4g}: {measured / predicted:.2f} times)"
