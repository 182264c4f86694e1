"""The texts that the default model learns from: files of permissively licensed Python projects.

The standard library of the running Python, its documentation, and other projects, as Debian ships
them (`apt-get download`, nothing is installed). Project -> (path, text) of every usable file, and
the licence texts that have to be kept with what is made of them.
"""

import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 150_000  # what is larger is a table or was generated
MIN_FILE_BYTES = 400
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "lib2to3",
    "idlelib",
    "encodings",
    "_vendor",
    "_distutils",
    "pydoc_data",
    "locale",
    "externals",
    "_static",
    "node_modules",
    "examples_data",
    "_lexers",
}
COPYLEFT = re.compile(r"General Public License|\bL?GPL\b|Mozilla Public")


@dataclass(frozen=True, slots=True)
class Project:
    """One project: the Debian packages that hold it, its licence, and how much of it is taken."""

    name: str
    packages: tuple[str, ...]
    licence: str
    limit_bytes: int = 3_000_000


PYTHON_DOCUMENTATION = Project("python-doc", ("python3.11-doc",), "PSF-2.0", 20_000_000)
PROJECTS = (
    PYTHON_DOCUMENTATION,
    Project("aiohttp", ("python3-aiohttp", "python-aiohttp-doc"), "Apache-2.0"),
    Project("attrs", ("python3-attr", "python-attr-doc"), "MIT"),
    Project("black", ("black",), "MIT"),
    Project("boltons", ("python3-boltons",), "BSD-3-Clause"),
    Project("bottle", ("python3-bottle",), "MIT"),
    Project("celery", ("python3-celery", "python-celery-doc"), "BSD-3-Clause"),
    Project("cherrypy", ("python3-cherrypy3",), "BSD-3-Clause"),
    Project("click", ("python3-click", "python-click-doc"), "BSD-3-Clause"),
    Project("cryptography", ("python3-cryptography", "python-cryptography-doc"), "Apache-2.0"),
    Project("dask", ("python3-dask",), "BSD-3-Clause"),
    Project("django", ("python3-django",), "BSD-3-Clause", 5_000_000),
    Project("djangorestframework", ("python3-djangorestframework",), "BSD-3-Clause"),
    Project("fastapi", ("python3-fastapi",), "MIT"),
    Project("flask", ("python3-flask", "python-flask-doc"), "BSD-3-Clause"),
    Project("httpx", ("python3-httpx",), "BSD-3-Clause"),
    Project("ipython", ("python3-ipython",), "BSD-3-Clause"),
    Project("jinja2", ("python3-jinja2", "python-jinja2-doc"), "BSD-3-Clause"),
    Project("jsonschema", ("python3-jsonschema",), "MIT"),
    Project("mako", ("python3-mako",), "MIT"),
    Project("markdown", ("python3-markdown",), "BSD-3-Clause"),
    Project("marshmallow", ("python3-marshmallow",), "MIT"),
    Project("matplotlib", ("python3-matplotlib",), "Matplotlib (PSF-like)"),
    Project("more-itertools", ("python3-more-itertools",), "MIT"),
    Project("mypy", ("mypy-doc",), "MIT"),
    Project("networkx", ("python3-networkx",), "BSD-3-Clause", 4_000_000),
    Project("numpy", ("python3-numpy",), "BSD-3-Clause", 4_000_000),
    Project("pandas", ("python3-pandas",), "BSD-3-Clause", 4_000_000),
    Project("peewee", ("python3-peewee",), "MIT"),
    Project("prompt-toolkit", ("python3-prompt-toolkit",), "BSD-3-Clause"),
    Project("pydantic", ("python3-pydantic",), "MIT"),
    Project("pygments", ("python3-pygments",), "BSD-2-Clause", 1_000_000),
    Project("pytest", ("python3-pytest", "python-pytest-doc"), "MIT"),
    Project("requests", ("python3-requests", "python-requests-doc"), "Apache-2.0"),
    Project("rich", ("python3-rich",), "MIT"),
    Project("scikit-learn", ("python3-sklearn",), "BSD-3-Clause", 4_000_000),
    Project("scipy", ("python3-scipy",), "BSD-3-Clause", 3_000_000),
    Project("scrapy", ("python3-scrapy",), "BSD-3-Clause"),
    Project("setuptools", ("python3-setuptools", "python-setuptools-doc"), "MIT"),
    Project("sphinx", ("sphinx-doc",), "BSD-2-Clause"),
    Project("sqlalchemy", ("python3-sqlalchemy", "python-sqlalchemy-doc"), "MIT", 5_000_000),
    Project("starlette", ("python3-starlette",), "BSD-3-Clause"),
    Project("sympy", ("python3-sympy",), "BSD-3-Clause", 4_000_000),
    Project("textual", ("python3-textual",), "MIT"),
    Project("tomlkit", ("python3-tomlkit",), "MIT"),
    Project("toolz", ("python3-toolz",), "BSD-3-Clause"),
    Project("tornado", ("python3-tornado", "python-tornado-doc"), "Apache-2.0"),
    Project("trio", ("python3-trio",), "MIT or Apache-2.0"),
    Project("twisted", ("python3-twisted",), "MIT", 4_000_000),
    Project("urllib3", ("python3-urllib3",), "MIT"),
    Project("werkzeug", ("python3-werkzeug", "python-werkzeug-doc"), "BSD-3-Clause"),
    Project("xarray", ("python3-xarray",), "Apache-2.0"),
)


def fetch(work: Path) -> None:
    """Download and unpack every package below `work`; what lies there already is kept."""
    for project in PROJECTS:
        for package in project.packages:
            target = work / package
            if target.is_dir():
                continue
            with tempfile.TemporaryDirectory(dir=work) as folder:
                subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
                (archive,) = Path(folder).glob("*.deb")
                unpacked = Path(folder) / "unpacked"
                subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
                unpacked.rename(target)


def standard_library() -> Iterator[tuple[str, str]]:
    """(path, text) of the modules of the running Python and of its own tests."""
    root = Path(sysconfig.get_path("stdlib"))
    yield from _texts(root, root.rglob("*.py"), SKIPPED_FOLDERS - {"test", "tests"})


def project_files(project: Project, work: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of a project's modules and documentation, up to its limit of bytes."""
    room = project.limit_bytes
    for package in project.packages:
        root = work / package
        files = [p for kind in ("*.rst", "*.rst.txt", "*.md.txt", "*.py") for p in root.rglob(kind)]
        for path, text in _texts(root, files, SKIPPED_FOLDERS):
            room -= len(text)
            if room < 0:
                return
            yield f"{project.name}/{path}", text


def licences(work: Path) -> str:
    """The licence texts of everything above, one after the other."""
    python = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    parts = [("The Python standard library and its documentation", python.read_text())]
    for project in PROJECTS[1:]:
        path = work / project.packages[0] / "usr/share/doc" / project.packages[0] / "copyright"
        parts.append((f"{project.name} ({project.licence})", path.read_text()))
    rule = "=" * 80
    return "\n\n".join(f"{rule}\n{title}\n{rule}\n\n{text.strip()}" for title, text in parts) + "\n"


def _texts(root: Path, files: Iterator[Path], skipped: set[str]) -> Iterator[tuple[str, str]]:
    """Readable files of the right size that no copyleft licence covers, sorted by path."""
    for path in sorted(set(files)):
        inner = path.relative_to(root)
        if skipped & set(inner.parts) or path.is_symlink():
            continue
        if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not COPYLEFT.search(text[:4000]):
            yield str(inner), text
