"""What this machine runs on: python -m bench.versions"""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

NAMES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "vllm",
    "kernels",
)


def main():
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {platform.platform()}")
    for name in NAMES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is not installed")
    print("torch's CUDA:", torch.version.cuda)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        gib = gpu.total_memory / 2**30
        print(f"headline: {gpu.name}, {gib:.0f} GiB, {gpu.multi_processor_count} multiprocessors")
    for tool in ("nvidia-smi", "ncu", "nvcc"):
        print(f"{tool}: {shutil.which(tool)}")
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"])


if __name__ == "__main__":
    main()
