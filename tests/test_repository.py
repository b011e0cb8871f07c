"""The shape of the repository: layers, imports without effects, comments, style, the demo, the README."""

import ast
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in ROOT.glob("*.py"))

# An arrow only ever points to a lower number. A file that is not named here is a script, number 5.
LAYERS = {"files": 0, "model": 1, "data": 1, "training": 1}
LAYERS |= {"optimizers": 2, "lora": 2, "hf": 2, "sampling": 2, "checkpoints": 3}
LAYERS |= {"hellaswag": 4, "plot": 4, "finetune": 4, "bench": 6, "compare": 6}
SCRIPTS = [name for name in FILES if LAYERS.get(name, 5) >= 4 and name != "finetune"]


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> set[str]:
    """The top-level names of all modules that are imported anywhere within."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "the repository is no package"
            names.add(child.module.split(".")[0])
    return names


# -----------------------------------------------------------------------------
# Imports


def test_imports_only_point_down() -> None:
    for name in FILES:
        for other in imported(tree(ROOT / f"{name}.py")) & set(FILES):
            assert LAYERS.get(other, 5) < LAYERS.get(name, 5), f"{name}.py must not import {other}.py"


def test_every_import_is_named_in_the_requirements() -> None:
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    required = {re.split("[=<>]", line)[0] for line in text.splitlines() if line and line[0] not in "#-"}
    modules = {f.stem: imported(tree(f)) for f in [*ROOT.glob("*.py"), *ROOT.glob("demo/*.py")]}
    ours = set(modules) | {"world"}
    optional = {"awkward"}  # comes with gigatoken
    for name, names in modules.items():
        missing = names - set(sys.stdlib_module_names) - ours - required - optional
        assert not missing, f"{name}.py imports {missing}"
    runtime = (ROOT / "requirements.txt").read_text()
    for name in re.findall(r"^(\w+)==", runtime, re.M):
        assert any(name in names for names in modules.values()), f"nothing imports {name}"


IMPORT = """
import os, sys, threading

created = []  # files opened for writing, processes and connections
watched = ("subprocess.Popen", "os.mkdir", "os.remove", "os.rename", "socket.connect", "os.fork")

def watch(event: str, args: tuple) -> None:
    if event in watched or event == "open" and args[1] and any(c in args[1] for c in "wax+"):
        created.append((event, str(args[0])))

for name in sys.argv[1].split():  # what others do when they are imported is no matter of ours
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

LIGHT = ["data", "files", "fineweb"]  # workers of fineweb.py import these: without torch


@pytest.mark.parametrize("torch", [False, True], ids=["without torch", "with torch"])
def test_importing_has_no_side_effect(torch: bool, tmp_path: Path) -> None:
    libraries = ["numpy", "tiktoken", "tqdm", "pyarrow.parquet"]
    libraries += ["torch", "torch.nn.parallel"] if torch else []
    names = [name for name in FILES if (name not in LIGHT) == torch]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for variable in ("TIKTOKEN_CACHE_DIR", "RANK", "WORLD_SIZE"):
        env.pop(variable, None)
    args = [sys.executable, "-c", IMPORT, " ".join(libraries), " ".join(names)]
    out = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert (out.stdout, out.stderr) == ("", "")
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# Constants and comments


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_constant_of_a_script_has_a_comment(name: str) -> None:
    path = ROOT / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and len(token.string) > 10
    }
    (config,) = [node for node in tree(path).body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    assert "frozen=True" in ast.unparse(config.decorator_list[0])
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    assert fields
    for field in fields:
        lines = range(field.lineno, field.end_lineno + 1)
        assert commented & set(lines), f"{name}.py: {field.target.id} has no comment"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_guarded_and_named_in_its_docstring(name: str) -> None:
    module = tree(ROOT / f"{name}.py")
    assert ast.unparse(module.body[-1]).startswith("if __name__ == '__main__':")
    assert f"python {name}.py" in ast.get_docstring(module)


@pytest.mark.parametrize("name", FILES)
def test_functions_are_typed_and_public_ones_documented(name: str) -> None:
    module = tree(ROOT / f"{name}.py")
    assert ast.get_docstring(module)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            where = f"{name}.py: {node.name}"
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped, f"{where}: no type for {untyped}"
            assert node.returns is not None, f"{where}: no type for what it returns"
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.py: {node.name} has no docstring"


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_style(command: str) -> None:
    if not shutil.which("ruff", path=str(Path(sys.executable).parent)) and not shutil.which("ruff"):
        pytest.skip("ruff is not installed")
    args = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    out = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


# -----------------------------------------------------------------------------
# The demo and the README


def test_the_demo_text_can_be_made_again(tmp_path: Path) -> None:
    # another seed for hash() and another encoding: the bytes may depend on neither
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    args = [sys.executable, str(ROOT / "demo" / "make_demo.py"), str(tmp_path)]
    subprocess.run(args, check=True, env=env, cwd=tmp_path, capture_output=True)
    made = {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*.*")}
    assert len(made) == 5
    for name, content in made.items():  # by hash: a difference should not print a megabyte
        kept = (ROOT / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == hashlib.sha256(kept).hexdigest(), name
    kept = (ROOT / "input.txt").read_bytes()
    assert 0.8e6 < len(kept) < 1.5e6
    assert b"\r" not in kept and kept.count(b"\n<|endoftext|>\n") > 100


def test_what_the_demo_holds_out_is_nowhere_else() -> None:
    rows = {
        name: [json.loads(line) for line in (ROOT / "demo" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("hellaswag", "sft", "sft_held_out", "dpo")
    }
    text = (ROOT / "input.txt").read_text()
    endings = [row["ctx"] + " " + row["endings"][row["label"]] for row in rows["hellaswag"]]
    assert len(endings) >= 200 and not [ending for ending in endings if ending in text]
    assert len({row["label"] for row in rows["hellaswag"]}) == 4

    def fact(response: str) -> str:
        return response.split(". ")[0].rstrip(".")

    held_out = {fact(row["response"]) for row in rows["sft_held_out"] if not row["context"]}
    # friendship is mutual: the mirrored fact would tell
    friends = [re.fullmatch(r"(\w+)'s best friend is (\w+)", answer) for answer in held_out]
    held_out |= {f"{m[2]}'s best friend is {m[1]}" for m in friends if m}
    passages = {row["context"] for row in rows["sft_held_out"] if row["context"]}
    assert len(rows["sft"]) >= 600 and len(rows["dpo"]) >= 400 and len(held_out) >= 20 and len(passages) >= 40
    told = [fact(row["response"]) for row in rows["sft"]]
    told += [fact(row[f"response_{side}"]) for row in rows["dpo"] for side in "ab"]
    assert held_out.isdisjoint(told)
    asked = [row["context"] for row in rows["sft"]] + [row["prompt"].split("\n")[-1] for row in rows["dpo"]]
    assert passages.isdisjoint(asked)
    for answer in held_out:  # but the world tells it
        assert text.count(answer + ".") + text.count(answer + ",") > 10, answer


def commands() -> list[str]:
    """The commands of the README, one a line, without their comments."""
    blocks = re.findall(r"^(?:    |\t)(.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    lines = [line.split("  #")[0].strip() for line in blocks]
    return [part.strip() for line in lines for part in line.split("&&")]


def test_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall("@@|TODO|TIME", text)
    scripts = [
        word for line in commands() for word in line.split() if word.endswith((".py", "requirements.txt"))
    ]
    assert {"train_gpt2.py", "sample.py", "requirements.txt"} <= set(scripts)
    named = re.findall(r"`([\w./-]+\.(?:py|md|txt|toml))`", text) + re.findall(r"\]\(([^):#]+)\)", text)
    for name in [*scripts, *named]:
        if name not in ("log.txt", "book.txt", "question.txt") and not name.startswith("out/"):
            assert (ROOT / name).exists(), f"README.md names {name}"


def options() -> list[tuple[str, str, str]]:
    """(script, configuration, constant) of every `--constant` in the README's commands."""
    found = []
    for line in commands():
        if m := re.search(r"(?:python|torchrun .*?) (\w+\.py)(?: +([\w.-]+))?(.*)", line):
            script, name, rest = m[1], m[2] or "", (m[2] or "") + m[3]
            found += [(script, name, option) for option in re.findall(r"--(\w+)", rest)]
            found.append((script, name, ""))
    return found


@pytest.mark.parametrize("script, name, option", sorted(set(options())))
def test_readme_uses_only_constants_that_exist(script: str, name: str, option: str) -> None:
    if not (ROOT / script).exists():
        pytest.skip(f"{script} has a test of its own")
    module = tree(ROOT / script)
    (config,) = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    constants = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    assert not option or option in constants
    if name and not name.startswith("-"):
        assert f'"{name}"' in (ROOT / script).read_text(encoding="utf-8")
