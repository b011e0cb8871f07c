"""The shape of the repository: imports, size, comments, style, the demo data, the README."""

import ast
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENV, ROOT

# Imports go one way: each module of neogpt imports only from those before it, scripts import from neogpt and hellaswag,
# and tools from scripts and neogpt.
ORDER = "files config rewards track ndlinear model data optim runtime hf lora cpu generate training chat checkpoint run"
ORDER = [f"neogpt.{name}" for name in [*ORDER.split(), "finetune"]]
NEOGPT = sorted((ROOT / "neogpt").glob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
PRODUCT = [*NEOGPT, *SCRIPTS, *TOOLS]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def module_name(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> set[str]:
    """The names of all modules that are imported anywhere within; "neogpt.data" for `from neogpt import data`."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            packages = child.module in ("neogpt", "tools")
            names |= {f"{child.module}.{alias.name}" for alias in child.names} if packages else {child.module}
    return names


def test_imports_go_one_way() -> None:
    assert {module_name(path) for path in NEOGPT} == {*ORDER, "neogpt.__init__"}
    for path in NEOGPT:
        name = module_name(path)
        allowed = ORDER[: ORDER.index(name)] if name in ORDER else []
        ours = {other for other in imported(tree(path)) if other.split(".")[0] in ("neogpt", "tools")}
        assert ours <= set(allowed), f"{path.name} imports {ours - set(allowed)}"
    scripts = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        names = imported(tree(path))
        assert not [name for name in names if name.startswith("tools")], f"{path.name} imports from tools"
        assert names & scripts <= {"hellaswag"}, f"{path.name} imports another script"


def test_the_size_of_the_repository() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in PRODUCT}
    assert sum(lines.values()) <= 6890
    for path, n in lines.items():
        assert n <= (350 if path.name == "fineweb.py" else 300), f"{path.name} has {n} lines"
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert node.end_lineno - node.lineno < 70, f"main of {path.name}"
    assert len(SCRIPTS) <= 9 and len(NEOGPT) <= 18 + 1  # and the empty __init__.py
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("tests/*.py")) <= 6800
    assert README.count("\n") <= 170


def test_every_import_is_named_in_the_requirements() -> None:
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    required = {re.split("[=<>]", line)[0] for line in text.splitlines() if line and line[0] not in "#-"}
    ours = {"neogpt", "tools"} | {path.stem for path in SCRIPTS}
    optional = {"awkward", "gguf"}  # installed with gigatoken; for export.py --format=gguf
    used = {name.split(".")[0] for path in PRODUCT for name in imported(tree(path))}
    assert used - set(sys.stdlib_module_names) - ours - required - optional == set()
    for name in re.findall(r"^(\w+)==", (ROOT / "requirements.txt").read_text(), re.M):
        assert name in used, f"nothing imports {name}"


IMPORT = """
import os, sys, threading

created = []  # files opened for writing, processes and connections
watched = ("subprocess.Popen", "os.mkdir", "os.remove", "os.rename", "socket.connect", "os.fork")

def watch(event: str, args: tuple) -> None:
    if event in watched or event == "open" and args[1] and any(c in args[1] for c in "wax+"):
        created.append((event, str(args[0])))

for name in sys.argv[1].split():  # imports of other packages are not tested
    __import__(name)
environment = dict(os.environ)
threads = threading.active_count()
sys.dont_write_bytecode = True
sys.addaudithook(watch)
for name in sys.argv[2].split():
    __import__(name)
    assert not created, (name, created)
    assert dict(os.environ) == environment, f"{name} changed the environment"
    assert threading.active_count() == threads, f"{name} started a thread"
assert not sys.modules["tiktoken"].registry.ENCODINGS, "a tokenizer was built"
if "torch" in sys.argv[1].split():
    import torch
    assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
else:
    assert "torch" not in sys.modules, "torch was imported"
"""

LIGHT = ["neogpt.files", "neogpt.config", "neogpt.data", "fineweb"]  # workers of fineweb.py import no torch


@pytest.mark.parametrize("torch", [False, True], ids=["without torch", "with torch"])
def test_imports_have_no_side_effects(torch: bool, tmp_path: Path) -> None:
    libraries = ["numpy", "tiktoken", "tqdm", "pyarrow.parquet"]
    libraries += ["torch", "torch.nn.parallel"] if torch else []
    names = [n for n in map(module_name, PRODUCT) if (n not in LIGHT) == torch and not n.endswith("__init__")]
    env = {name: v for name, v in ENV.items() if name not in ("TIKTOKEN_CACHE_DIR", "RANK", "WORLD_SIZE")}
    args = [sys.executable, "-c", IMPORT, " ".join(libraries), " ".join(names)]
    out = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


CONFIGURED = [path for path in [*SCRIPTS, *TOOLS] if re.search(r"^class Config\b", path.read_text(), re.M)]


@pytest.mark.parametrize("path", CONFIGURED, ids=module_name)
def test_constants_do_not_change_and_docstrings_show_how_to_start(path: Path) -> None:
    """test_config.py: every constant has a comment."""
    configs = [node for node in tree(path).body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert all("frozen=True" in ast.unparse(config.decorator_list[0]) for config in configs)
    assert ast.unparse(tree(path).body[-1]) == "if __name__ == '__main__':\n    config.run(main, CONFIGS)"
    command = f"python {path.name}" if path in SCRIPTS else f"python -m {module_name(path)}"
    assert command in ast.get_docstring(tree(path))


# the product: types of all arguments and results, docstrings of modules and public functions
STRICT = "check --extend-select=ANN0,ANN2,D100,D103 --exclude=tests"


@pytest.mark.parametrize("command", ["check", "format --check", STRICT])
def test_style(command: str) -> None:
    if not shutil.which("ruff", path=str(Path(sys.executable).parent)) and not shutil.which("ruff"):
        pytest.skip("ruff is not installed")
    args = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    out = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_demo_data_can_be_generated_again(tmp_path: Path) -> None:
    # the bytes must not depend on the seed of hash() or on the encoding of the console
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    args = [sys.executable, "-m", "tools.make_demo", str(tmp_path)]
    subprocess.run(args, check=True, env=env, cwd=ROOT, capture_output=True)
    made = {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*.*")}
    assert len(made) == 7
    for name, content in made.items():  # hashes, because a difference would print a megabyte
        kept = (ROOT / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == hashlib.sha256(kept).hexdigest(), name


def test_held_out_demo_data_appears_nowhere_else() -> None:
    files, text = (ROOT / "demo").glob("*.jsonl"), (ROOT / "input.txt").read_text()
    rows = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    endings = [row["ctx"] + " " + row["endings"][row["label"]] for row in rows["hellaswag"]]
    assert len(endings) >= 200 and not [ending for ending in endings if ending in text]
    assert len({row["label"] for row in rows["hellaswag"]}) == 4

    def fact(response: str) -> str:
        return response.split(". ")[0].rstrip(".")

    held_out = {fact(row["response"]) for row in rows["sft_held_out"] if not row["context"]}
    # friendship is mutual, so the mirrored fact must be held out too
    held_out |= {re.sub(r"(\w+)'s best friend is (\w+)", r"\2's best friend is \1", answer) for answer in held_out}
    passages = {row["context"] for row in rows["sft_held_out"] if row["context"]}
    assert len(rows["sft"]) >= 600 and len(rows["dpo"]) >= 400 and len(held_out) >= 20 and len(passages) >= 40
    told = [fact(row["response"]) for row in rows["sft"]]
    told += [fact(row[f"response_{side}"]) for row in rows["dpo"] for side in "ab"]
    assert held_out.isdisjoint(told)
    asked = [row["context"] for row in rows["sft"]] + [row["prompt"].split("\n")[-1] for row in rows["dpo"]]
    assert passages.isdisjoint(asked)
    new, held_out_new = ({row["context"] for row in rows[name]} for name in ("grpo", "grpo_held_out"))
    assert new.isdisjoint([*asked, *passages, *held_out_new]) and held_out_new.isdisjoint([*asked, *passages])
    assert not [context for context in new | held_out_new if context in text]
    for answer in held_out:  # but input.txt states it
        assert text.count(answer + ".") + text.count(answer + ",") > 10, answer


def commands() -> list[str]:
    """The commands of the README without their comments."""
    lines = re.findall(r"^(?:    |\t)(.*)$", README, re.M)
    return [part.strip() for line in lines for part in line.split("  #")[0].split("&&")]


def test_readme_names_only_files_that_exist() -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|md|toml|sh))`", README) + re.findall(r"\]\(([^):#]+)\)", README)
    named += [word for line in commands() for word in line.split() if word.endswith((".py", "requirements.txt", ".sh"))]
    assert {"train_gpt2.py", "sample.py", "requirements.txt", "bench/RESULTS.md"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_uses_only_options_that_exist() -> None:
    n_options = 0
    for line in commands():
        if not (match := re.search(r"(?:python|torchrun .*?) (-m tools\.\w+|\w+\.py)(?: +([\w.-]+))?(.*)", line)):
            continue
        name = match[1].removeprefix("-m ").removesuffix(".py")
        module = importlib.import_module(name)
        constants = {field.name for field in dataclasses.fields(module.Config)}
        unquoted = re.sub('"[^"]*"', "", (match[2] or "") + match[3])
        options = set(re.findall(r"--(\w+)", unquoted))
        n_options += len(options)
        assert options <= constants, f"{line}: {options - constants}"
        if match[2] and not match[2].startswith("-"):
            assert match[2] in module.CONFIGS, line
    assert n_options > 20
