# Licensed under the Apache License, Version 2.0; see LICENSE.
import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

# PaddlePaddle is left out on purpose: CPU and GPU builds are two distributions of one module, and asking
# for either would install it over the other. Paddle is installed first, or by `make venv`.
HERE = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (HERE / "paddlemix" / "__init__.py").read_text(encoding="utf-8"))[1]
requirements = (HERE / "requirements.txt").read_text(encoding="utf-8")
install_requires = [line for line in (raw.split("#")[0].strip() for raw in requirements.splitlines()) if line]

setup(
    name="paddlemix-emu3",
    version=version,
    description="Emu3, BAAI's native multimodal model, on PaddlePaddle",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_namespace_packages(
        include=["paddlemix", "paddlemix.*"], exclude=["*.build", "*.build.*", "*.egg-info"]
    ),
    package_data={
        "": [
            "*.png", "*.json", "*.md", "*.txt", "*.html", "*.tiktoken", "*.safetensors", "*.cc", "*.cu", "*.cuh", "*.h",
        ],  # fmt: skip
    },
    install_requires=install_requires,
    extras_require={
        "ray": ["ray[serve]==2.60.0"],  # emu3 serve --ray, emu3 batch --ray: 280 MB that few need
        "video": ["av==17.1.0"],  # --video_path clip.mp4: 100 MB
    },
    entry_points={"console_scripts": ["emu3 = paddlemix.commands.__main__:main"]},
)
