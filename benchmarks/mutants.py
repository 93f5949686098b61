"""Mistakes put into the code one at a time by mutmut: how many of them a room's own fast tests notice.

The tree is copied to build/mutants/ROOM, and results are kept there: a run that was broken off goes on, and what has
changed since is made again. A sample is drawn at random; each number of `--draw` gives another one, the same each time.
Mutants that change nothing but the words of a sentence are left out: only a test that repeats it would notice them.

    make mutants ROOM=linalg
    make mutants ROOM=adapters MUTANTS="--files layer.py injection.py --sample 200"
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "milora_lightning"
SETTINGS = """
[tool.mutmut]
source_paths = ["{package}"]
only_mutate = {files}
also_copy = ["configs", "docs", "examples", "benchmarks", "main.py", "README.md"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu", {unsuited}]
process_isolation = "forkserver"
timeout_constant = 4.0
"""
# mutmut calls each function through one of its own, which torch cannot compile, and which these tests notice: in a
# stack, in what a process holds, in a key of code.
UNSUITED = (
    "-k=not compile",
    "--deselect=tests/data/test_tasks.py::test_commonsense_has_named_test_sets_and_a_held_out_part",
    "--deselect=tests/models/test_allocation.py",
    "--deselect=tests/utils/test_allocator.py::test_memory_returns_that_glibc_would_lose",
    "--deselect=tests/utils/test_messages.py::test_each_object_is_spoken_of_once",
)
# What mutmut means by a mutant's code: https://mutmut.readthedocs.io
SURVIVED, NOT_CALLED = 0, (5, 33)
PIECE = 100  # mutants that mutmut is given at a time; each time it runs the tests once without a mistake


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", help="a folder or a file of the package: linalg, module.py")
    parser.add_argument("--files", nargs="+", default=["*"], help="only these of the room")
    parser.add_argument("--tests", nargs="+", help="what has to notice; by default tests/ROOM")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn at random; by default all")
    parser.add_argument("--draw", type=int, default=0, help="which sample: a new one shows what was gained")
    parser.add_argument("--again", action="store_true", help="survivors only, after tests were added")
    parser.add_argument("--mutmut", default=str(Path(sys.executable).with_name("mutmut")), help="the program")
    args = parser.parse_args()

    # A tree of its own for each choice of files: mutmut makes no mutants in a file that it has passed over before.
    chosen_files = zlib.crc32(" ".join(sorted(args.files)).encode())
    tree = Path("build/mutants") / (args.room if args.files == ["*"] else f"{args.room}-{chosen_files:08x}")
    tests = args.tests or [f"tests/{args.room}" if "." not in args.room else f"tests/test_{args.room}"]
    folder = [args.room] if "." in args.room else [f"{args.room}/{each}" for each in args.files]
    copy_tree(tree)
    settings = SETTINGS.format(
        package=PACKAGE,
        files=json.dumps([f"{PACKAGE}/{each}" for each in folder]),
        tests=json.dumps(tests),
        unsuited=json.dumps(UNSUITED)[1:-1],
    )
    with (tree / "pyproject.toml").open("a") as file:
        file.write(settings)

    # With a name that no mutant has, mutmut makes them and goes no further.
    run_mutmut(args.mutmut, tree, ["no such mutant"], quiet=True)
    mutants = {name: change for name, change in read_mutants(tree) if change}
    if not mutants:
        sys.exit(f"mutmut makes no mutants of {', '.join(folder)}: check the names, and that mutmut is installed.")
    chosen = sorted(mutants)
    if args.sample and args.sample < len(chosen):
        chosen = sorted(random.Random(args.draw).sample(chosen, args.sample))
    results = read_results(tree)
    pending = [name for name in chosen if results.get(name) is None or (args.again and lives(results[name]))]
    for start in range(0, len(pending), PIECE):
        run_mutmut(args.mutmut, tree, pending[start : start + PIECE])
    report(args.room, mutants, chosen, read_results(tree))


def copy_tree(tree: Path) -> None:
    """Copy what git knows, with its times: mutmut makes the mutants of a file again if it is newer than they are."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if Path(name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, tree / name)
            if name.startswith("tests/"):  # which mutmut copies once
                (tree / "mutants" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, tree / "mutants" / name)


def run_mutmut(program: str, tree: Path, names: list[str], quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run(
        [program, "run", "--max-children", "1", *names], cwd=tree, stdout=output, stderr=output, check=False
    )
    if done.returncode and not quiet:
        sys.exit("mutmut could not run the tests: see above")


def read_mutants(tree: Path) -> Iterator[tuple[str, str]]:
    """Return each mutant's name and what it changes, as lines of a diff; empty if only the words of a sentence."""
    for path in sorted((tree / "mutants" / PACKAGE).rglob("*.py.meta")):
        names = json.loads(path.read_text())["exit_code_by_key"]
        code = ast.parse(path.with_suffix("").read_text()) if names else ast.Module([])
        functions = {node.name: node for node in ast.walk(code) if isinstance(node, ast.FunctionDef)}
        for name in names:
            own = name.rpartition(".")[2]
            yield name, change(functions[re.sub(r"_\d+$", "_orig", own)], functions[own])


def change(before: ast.FunctionDef, after: ast.FunctionDef) -> str:
    pairs = list(zip(constants(before), constants(after), strict=False))
    if len(constants(before)) == len(constants(after)) and without_sentences(before) == without_sentences(after):
        changed = [(old, new) for old, new in pairs if old != new]
        if changed and all(" " in old for old, _ in changed):
            return ""
    old, new = (ast.unparse(ast.Module(each.body, [])).splitlines() for each in (before, after))
    lines = (line for line in difflib.unified_diff(old, new, n=0, lineterm="") if line[:2] not in ("--", "++", "@@"))
    return "  ".join(re.sub(r"^([-+])\s*", r"\1 ", line) for line in lines)


def constants(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def without_sentences(tree: ast.FunctionDef) -> str:
    text = ast.dump(ast.Module(tree.body))
    return re.sub(r"Constant\(value=('(\\.|[^'])*'|\"(\\.|[^\"])*\")(, kind=None)?\)", "text", text)


def read_results(tree: Path) -> dict[str, int | None]:
    results: dict[str, int | None] = {}
    for path in (tree / "mutants" / PACKAGE).rglob("*.py.meta"):
        results |= json.loads(path.read_text())["exit_code_by_key"]
    return results


def lives(code: int | None) -> bool:
    return code == SURVIVED or code in NOT_CALLED


def report(room: str, mutants: dict[str, str], chosen: list[str], results: dict[str, int | None]) -> None:
    """Print a row of the table in benchmarks/results/mutants.md, and what has survived."""
    counts = Counter(lives(results[name]) for name in chosen if results.get(name) is not None)
    made, killed = counts.total(), counts[False]
    print(f"\n| {room} | {len(mutants)} | {made} | {killed} | {100 * killed / max(made, 1):.0f} % |\n")
    for name in chosen:
        if results.get(name) is not None and lives(results[name]):
            called = "" if results[name] == SURVIVED else "no fast test calls it; "
            print(f"- `{name.removeprefix(PACKAGE + '.')}`: {called}`{mutants[name]}`")


if __name__ == "__main__":
    main()
