import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: importing the package would need torch before torch is installed.
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "metricopt_hf" / "__init__.py").read_text(), re.M).group(1)

INSTALL_REQUIRES = [
    "torch>=2.9",
    "torchvision",  # timm and the image processors of transformers import it; each release pins its own torch
    # 5.23 is the release this was measured on and needs Python 3.11; 5.20 is the last line that runs on Python 3.10.
    'transformers>=5.23,<6; python_version >= "3.11"',
    'transformers>=5.20,<6; python_version < "3.11"',
    "datasets>=4",  # `List` features
    "accelerate>=1.10",
    "evaluate>=0.4.6",
    "timm>=1.0.23",  # the oldest that transformers 5 accepts
    "scikit-learn>=1.5",
    "scipy>=1.11",
    "safetensors",
    "huggingface_hub>=1.3",  # listing a repository's files with their sizes before they are fetched
    "numpy",
    "pyarrow>=14.0.1",  # an older one can be made to run code that a parquet file holds
    "jinja2",  # model cards
    "psutil",  # which rank of a run has gone
]

EXTRAS = {
    "peft": ["peft>=0.20"],  # the oldest that transformers 5 accepts
    "plot": ["matplotlib"],
    "report": ["tabulate"],
    "tensorboard": ["tensorboard"],
    "optuna": ["optuna"],
    "retrieval": ["pytorch-metric-learning"],
    "onnx": ["onnx", "onnxruntime"],
    "detection": ["torchmetrics", "faster-coco-eval"],
    "docs": ["sphinx>=8.1,<11", "myst-parser>=4", "furo>=2024.8.6", "matplotlib"],  # the newest for Python 3.10
    "bench": ["cma", "fairlearn", "matplotlib", "tabulate"],
}
# What `make test` needs: the tools, and all of the above.
TOOLS = ["pytest>=8", "pytest-timeout", "pytest-xdist", "ruff", "markdown-it-py", "nbclient", "ipykernel"]
EXTRAS["dev"] = [*TOOLS, *sum(EXTRAS.values(), [])]

setup(
    name="metricopt_hf",
    version=VERSION,
    description="Fine-tune a Hugging Face model for the black-box metric you report, with the Trainer you know",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["metricopt_hf", "metricopt_hf.*"]),
    # The `evaluate` scripts lie in folders that are no packages: `evaluate.load` reads them as files.
    package_data={"metricopt_hf": ["metrics/*/*.py", "hub/templates/*.md"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
