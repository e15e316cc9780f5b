"""Builds the wheel and the sdist and uses both as users do, away from the checkout; needs the package index.

python -m tests.release
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile

from tests.pages import README, ROOT, python_blocks

DIST = ROOT / "dist"


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    check_files_of(wheel)
    with tempfile.TemporaryDirectory() as directory:
        check_tests_of(sdist, pathlib.Path(directory))
        check_example_with(wheel, pathlib.Path(directory))


def check_files_of(wheel: pathlib.Path) -> None:
    wheel_file = zipfile.ZipFile(wheel)
    names = wheel_file.namelist()
    metadata = {name for name in names if ".dist-info/" in name}
    files = (path for path in (ROOT / "pallas_qk").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    package = {path.relative_to(ROOT).as_posix() for path in files}
    assert set(names) - metadata == package, f"the wheel must hold {sorted(package)}, got {names}"
    assert any(name.endswith("licenses/LICENSE") for name in metadata), f"the wheel must hold LICENSE, got {names}"
    (description,) = (wheel_file.read(name).decode() for name in metadata if name.endswith("METADATA"))
    local = re.findall(r"\]\((?!https?:)[^)]*\)", description)
    assert not local, f"the description must link to no file of the repository, got {local}"


def check_tests_of(sdist: pathlib.Path, directory: pathlib.Path) -> None:
    shutil.unpack_archive(sdist, directory, filter="data")
    unpacked = directory / sdist.name.removesuffix(".tar.gz")
    here, there = ({path.name for path in (root / "tests").glob("*.py")} for root in (ROOT, unpacked))
    assert here == there, f"the sdist must hold the same tests, got a difference of {sorted(here ^ there)}"
    run(sys.executable, "-m", "pytest", "--collect-only", "-qq", cwd=unpacked)


def check_example_with(wheel: pathlib.Path, directory: pathlib.Path) -> None:
    venv.create(directory / "venv")
    python = directory / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt", wheel)
    (code,) = python_blocks(README)
    (directory / "example.py").write_text(code)
    run(python, "-I", "example.py", cwd=directory)


def run(*command, cwd: pathlib.Path = ROOT) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=cwd, check=True)


if __name__ == "__main__":
    main()
