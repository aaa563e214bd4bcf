"""Dependencies of the framework, for `pip install -e .` in a checkout.

Programs run from the checkout, so no package is listed: a module called `datasets` or `options` in site-packages would
shadow, or be shadowed by, somebody else's.
"""

from setuptools import setup

setup(
    name="contrast-ft",
    version="0.1.0",
    description="Contrastive learning of visual representations, with feature transformation and score visualization",
    python_requires=">=3.10",
    packages=[],
    py_modules=[],
    install_requires=[
        "torch",
        "torchvision",
        "numpy",
        "pillow>=10.1",
        "tensorboard_logger",
        "timm",
        "safetensors",
        "matplotlib>=3.7",
        "tqdm",
    ],
    extras_require={
        "dev": ["pytest", "ruff", "tensorboard", "scipy", "scikit-image", "onnx", "onnxscript", "onnxruntime"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "notebooks": ["jupyter", "ipykernel", "nbclient"],
    },
)
