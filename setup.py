import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
URL = "https://github.com/metricopt-hf/metricopt_hf"
# Read, not imported: importing the package would need torch before torch is installed.
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "metricopt_hf" / "__init__.py").read_text(), re.M).group(1)
# A package index shows the README away from the repository, so its links and pictures name where they lie.
README = (ROOT / "README.md").read_text(encoding="utf-8")
README = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{URL}/raw/main/", README)
README = re.sub(r"\]\((?!https?:|#)", f"]({URL}/blob/main/", README)

INSTALL_REQUIRES = [
    "torch>=2.9",
    "transformers>=5.20,<6",
    "datasets>=4",  # `List` features
    "accelerate>=1.10",
    "evaluate>=0.4.6",
    "safetensors",
    "huggingface_hub>=1.3",  # listing a repository's files with their sizes before they are fetched
    "numpy",
    "pyarrow>=14.0.1",  # an older one can be made to run code that a parquet file holds
    "jinja2",  # model cards
    "tqdm",
]

EXTRAS = {
    "peft": ["peft>=0.20"],  # the oldest that transformers 5 accepts
    "plot": ["matplotlib"],
    # transformers' image processors import torchvision, each release of which pins its own torch; the oldest timm that
    # transformers 5 accepts
    "examples": ["torchvision", "timm>=1.0.23", "scikit-learn>=1.5", "scipy>=1.11", "matplotlib", "tabulate"],
    "tensorboard": ["tensorboard"],
    "optuna": ["optuna"],
    "retrieval": ["pytorch-metric-learning"],
    "onnx": ["onnx", "onnxruntime"],
    "detection": ["torchmetrics", "faster-coco-eval"],
    "docs": ["sphinx>=8.1,<11", "myst-parser>=4", "furo>=2024.8.6", "matplotlib"],  # the newest for Python 3.10
    "bench": ["cma", "fairlearn"],
}
EXTRAS["bench"] += EXTRAS["examples"]
# What `make test` needs: the tools, and all of the above.
TOOLS = ["pytest>=8", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "build", "twine"]
TOOLS += ["markdown-it-py", "nbclient", "ipykernel", "pyyaml", "trl>=1", "sentence-transformers>=5"]
EXTRAS["dev"] = [*TOOLS, *sum(EXTRAS.values(), [])]

setup(
    name="metricopt_hf",
    version=VERSION,
    description="Fine-tune a Hugging Face model for the black-box metric you report, with the Trainer you know",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={
        "Homepage": URL,
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    keywords=["transformers", "trainer", "fine-tuning", "black-box metric", "worst-group accuracy"],
    python_requires=">=3.10",
    packages=find_packages(include=["metricopt_hf", "metricopt_hf.*"]),
    entry_points={"console_scripts": ["metricopt = metricopt_hf.cli:main"]},
    # The `evaluate` scripts lie in folders that are no packages: `evaluate.load` reads them as files.
    package_data={"metricopt_hf": ["py.typed", "metrics/*/*.py", "hub/templates/*.md"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
