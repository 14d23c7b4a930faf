"""Which versions run here, and which of them draftsmith was tested with."""

import platform
from importlib.metadata import PackageNotFoundError, version

from train.compose import ROOT

PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "safetensors", "tokenizers")
SHOWN = ("torch", "transformers", "deepspeed")


def installed() -> dict[str, str]:
    """The version of each package that a result depends on, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def untested() -> dict[str, str]:
    """Of the installed packages those with another version than constraints.txt has: name ->
    "2.14.0, tested with 2.13.0". Builds for a device (+cpu, +cu130) count as one version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.strip().split("==") for line in lines if "==" in line)
    here = installed()
    return {
        name: f"{here[name]}, tested with {tested[name]}"
        for name in PACKAGES
        if name in tested and here[name].partition("+")[0] != tested[name]
    }


def shown() -> list[str]:
    """A line with the versions, and a warning where there are untested ones."""
    here = installed()
    names = ", ".join(f"{name} {here[name]}" for name in SHOWN)
    lines = [f"Python {here['python']}, {names}"]
    other = untested()
    if other:
        told = "; ".join(f"{name} {said}" for name, said in other.items())
        lines.append(
            f"warning: other versions than those tested ({told}); install the tested ones with "
            "pip install -c constraints.txt -e ."
        )
    return lines
