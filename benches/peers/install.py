"""The peers at pinned versions, and their copies of the checkpoints, in a folder of their own. Nothing is made twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What pip is asked for, in this order; the first is what the others convert with.
PINS = {
    "transformers": ["torch==2.15.0", "transformers==5.23.0", "safetensors==0.8.0", "requests"],
    "ctranslate2": ["ctranslate2==4.8.5"],
    "openvino": ["openvino-genai==2026.4.1.0"],
    # Built here, for this processor; takes a compiler and some ten minutes.
    "llama.cpp": ["gguf==0.19.0", "--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"],
}
# Beside the environment, so that they share its torch and hide its transformers: the last one that has contrastive search in itself,
# and OpenVINO's converter with one that it takes and the parts of its own requirements that it uses.
OVERLAYS = {
    "transformers-4": ["transformers==4.55.4", "huggingface_hub==0.36.2", "tokenizers==0.21.4"],
    "optimum": [
        *["optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0", "transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.1"],
        *["scikit-learn==1.9.1", "scipy==1.17.1", "joblib==1.6.0", "cloudpickle==3.1.2", "narwhals==2.29.0", "threadpoolctl==3.8.0"],
        *["psutil==7.2.2", "pydot==4.0.1", "pyparsing==3.3.3", "tabulate==0.10.0"],
    ],
}


class Peers:
    """The folder that peers live in."""

    def __init__(self, folder: Path, python: Path | None = None):
        self.folder, self.ready = folder.absolute(), python is not None
        # Absolute, but not resolved: in a virtual environment it is a link.
        self.python = python.absolute() if python else self.folder / "venv/bin/python"
        # Why a peer is not there.
        self.missing: dict[str, str] = {}

    def install(self, names: list[str]) -> None:
        """Installs what is needed for peers of these names; what fails is missing. An interpreter that was given has what it has."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        if self.ready:
            if "transformers-4" in names and not (self.folder / "transformers-4").exists():
                self.missing["transformers-4"] = f"not in {self.folder}"
            return
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)
        wanted = [name for name in PINS if name == "transformers" or name in names]
        for name in wanted:
            self.pip(name, PINS[name])
        for name, peer in {"transformers-4": "transformers-4", "optimum": "openvino"}.items():
            if peer in names:
                self.pip(name, ["--no-deps", *OVERLAYS[name]], self.folder / name)

    def pip(self, name: str, pins: list[str], target: Path | None = None) -> None:
        stamp = self.folder / "installed" / name
        if stamp.exists() and stamp.read_text() == " ".join(pins):
            return
        print(f"installing {name}: {' '.join(pin for pin in pins if '==' in pin)}", file=sys.stderr)
        if target:
            shutil.rmtree(target, ignore_errors=True)
        with open(self.folder / "logs" / f"pip-{name}.log", "w") as log:
            environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
            command = [self.python, "-m", "pip", "install", *pins, *(["--target", target] if target else [])]
            done = subprocess.run(command, stdout=log, stderr=log, env=environment)
        if done.returncode:
            self.missing[name] = f"pip failed, see {log.name}"
            return
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(" ".join(pins))

    def environment(self, overlays: list[str]) -> dict[str, str]:
        paths = os.pathsep.join(str(self.folder / overlay) for overlay in overlays)
        return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

    def checkpoint(self, driver: Path, model: str, dtype: str) -> Path:
        """A checkpoint in Hugging Face's format."""
        target = self.folder / "checkpoints" / f"{model}-{dtype}"
        return self.make(target, [driver, "make", model, dtype])

    def converted(self, peer: str, checkpoint: Path, dtype: str) -> Path:
        """The same in a peer's own format."""
        target = self.folder / "converted" / peer / checkpoint.name
        environment = self.environment(["optimum"] if peer == "openvino" else [])
        return self.make(target, [self.python, HERE / "convert.py", peer, checkpoint], [dtype], environment)

    def make(self, target: Path, before: list, after: list = (), environment: dict | None = None) -> Path:
        """Runs a command that writes `target`. What is half-written never has the name."""
        if target.exists():
            return target
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {target.relative_to(self.folder)}", file=sys.stderr)
        with open(self.folder / "logs" / f"make-{target.parent.name}-{target.name}.log", "w") as log:
            done = subprocess.run([*before, partial, *after], stdout=log, stderr=log, env=environment)
        if done.returncode:
            raise ValueError(f"no {target.name} for {target.parent.name}, see {log.name}")
        partial.rename(target)
        return target
