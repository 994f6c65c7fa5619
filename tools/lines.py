"""How long is the reading path, and how is the house built? Prints what the README claims.

    python tools/lines.py

Lines of each file of the reading path; lines of all files that `import grpo` loads; lines over 100
columns; and circles among imports, of which there should be none.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READING_PATH = (
    "model.py",
    "vision.py",
    "kernels/layers.py",
    "kernels/attention.py",
    "kernels/logprob.py",
    "kernels/sampling.py",
    "data/tokenizer.py",
    "data/images.py",
    "data/prompts.py",
    "data/sequences.py",
    "data/responses.py",
    "data/completions.py",
    "sample.py",
    "sft.py",
    "rewards.py",
    "grpo.py",
)
# What one need not read to understand the paper, so it does not count in the closure of grpo.py.
READERS = ("datasets", "schemas", "fields", "options", "turns")
ASIDE = ("answers/", "_triton.py", *(f"data/{name}.py" for name in READERS))


def source_files() -> list[str]:
    """Returns the project's Python files but for tests, as paths from the root."""
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")]
    return sorted(name for name in files if not name.startswith((".", "tests/", "runs/")))


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def file_of(module: str) -> str | None:
    """Returns the file of one of our modules; None for a module that is not ours."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def imports_of(name: str) -> set[str]:
    """Returns the files of ours that a file imports, wherever in it the import stands."""
    modules = []
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from kernels import logprob` may name a module of the package, or what it exports.
            modules.append(node.module)
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    found = {file_of(module) for module in modules} - {None, name}
    # A package's __init__ runs before its modules.
    packages = {f"{file.rpartition('/')[0]}/__init__.py" for file in found if "/" in file}
    return found | {file for file in packages if (ROOT / file).is_file() and file != name}


def closure(name: str) -> set[str]:
    """Returns all files of ours that importing one of them loads, itself included."""
    found, waiting = set(), [name]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imports_of(file)
    return found


def circles(files: list[str]) -> list[str]:
    """Returns the files that import themselves by way of others.

    A package's __init__ only lists what its modules offer, so an import of it is not counted.
    """
    graph = {}
    for file in files:
        graph[file] = {f for f in imports_of(file) if not f.endswith("__init__.py")}

    def reaches(start: str) -> bool:
        seen, waiting = set(), list(graph[start])
        while waiting:
            file = waiting.pop()
            if file == start:
                return True
            if file not in seen:
                seen.add(file)
                waiting += graph.get(file, ())
        return False

    return [file for file in files if reaches(file)]


def main() -> None:
    counts = {name: len(lines_of(name)) for name in READING_PATH}
    for name, count in counts.items():
        print(f"{name:<24}{count:>6}")
    print(f"{'the reading path':<24}{sum(counts.values()):>6}")
    loaded = [name for name in closure("grpo.py") if not any(part in name for part in ASIDE)]
    total = sum(len(lines_of(name)) for name in loaded)
    print(f"{'`import grpo` loads':<24}{total:>6} in {len(loaded)} files (see ASIDE)")
    files = source_files()
    wide = sum(len(line) > 100 for name in files for line in lines_of(name))
    print(f"lines over 100 columns: {wide}")
    print(f"circles: {', '.join(circles(files)) or 'none'}")


if __name__ == "__main__":
    main()
