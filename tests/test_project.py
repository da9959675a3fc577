"""The rules of the house that a machine can check: layers, names, numbers, calls, the public surface."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import omni_adapter

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "omni_adapter"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module may import from the levels above its own line here, and from its own subpackage.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"vocab"}),
    frozenset({"config"}),
    frozenset({"tensor_files", "model_card", "step_buffer", "compiling", "arithmetic", "arena"}),
    frozenset({"products"}),
    frozenset({"audio"}),
    frozenset({"modules", "backbone"}),
    frozenset({"model", "data"}),
    frozenset({"engine", "generation", "hearing", "hub", "training"}),
    frozenset({"session"}),
    frozenset({"talker"}),
    frozenset({"importers"}),
    frozenset({"train_answers"}),
    frozenset({"doctor", "bench", "train"}),
    frozenset({"bench_train", "estimate"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

NUMBERS_OF_CONFIGS = frozenset({7, 4096, 2048, 24000, 151936})
FAMILIES = (
    "llama|qwen|mistral|mixtral|ministral|gemma|phi|falcon|bloom|olmo|mpt|mamba|rwkv|deepseek|gpt_?2|gpt_?neox?|gpt_?j|"
    "gpt_?oss|starcoder|cohere|granite|smollm|jamba|zamba|nemotron|stablelm|codegen|xglm|exaone|ernie|glm|minimax|hunyuan"
)
# "Llama", "LlamaForCausalLM", "qwen2.5" and "is_gemma" name a family; "glmnet" and "phase" do not.
FAMILY_NAME = re.compile(rf"(?i:(?<![a-z])({FAMILIES}))(?![a-z])")
HOME_PATH = re.compile(r"(?<![\w.])/(work|root|home)/")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit_of(path: Path) -> str:
    """The module or subpackage right under omni_adapter that holds a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and unit of every import from the package, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "omni_adapter":
            modules = [f"omni_adapter.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            first, _, rest = module.partition(".")
            if first == "omni_adapter":
                yield node.lineno, rest.partition(".")[0] or "__init__"


def layer_violations(unit: str, tree: ast.Module) -> list[str]:
    if unit not in LEVEL:
        return [f"{unit} has no level: give it one in LAYERS"]
    found = []
    for line, other in imported_units(tree):
        if other not in LEVEL:
            found.append(f"line {line}: imports {other!r}, which has no level in LAYERS")
        elif other != unit and LEVEL[other] >= LEVEL[unit]:
            direction = "sideways" if LEVEL[other] == LEVEL[unit] else "up"
            found.append(f"line {line}: {unit} imports {direction}, from {other}")
    return found


@pytest.mark.parametrize("path", [path for path in SOURCES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_down_only(path):
    assert layer_violations(unit_of(path), parse(path)) == []


@pytest.mark.parametrize(
    ("unit", "source", "violation"),
    [
        ("audio", "from omni_adapter.model import OmniModel", "audio imports up, from model"),
        ("hub", "def f():\n    import omni_adapter.generation.loop", "hub imports sideways, from generation"),
        ("model", "from omni_adapter import OmniAdapter", "which has no level"),
        ("novelty", "import torch", "novelty has no level"),
        ("model", "from omni_adapter.backbone import Backbone\nimport omni_adapter.model", None),
    ],
)
def test_layer_check_finds_violations(unit, source, violation):
    found = layer_violations(unit, ast.parse(source))
    assert (found == []) if violation is None else (len(found) == 1 and violation in found[0])


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_does(path):
    assert ast.get_docstring(parse(path)), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_device_comes_from_what_is_at_hand(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "cuda" in line.lower()]
    assert lines == []


# An importer reads the checkpoints of one project, which have a base of one family and numbers of their own.
ABOUT_ONE_CHECKPOINT = (PACKAGE / "bench" / "presets.py", *(PACKAGE / "importers").glob("*.py"))


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in ABOUT_ONE_CHECKPOINT], ids=name_of)
def test_no_model_family_is_named(path):
    text = path.read_text(encoding="utf-8")
    assert [match.group() for match in FAMILY_NAME.finditer(text)] == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("LlamaForCausalLM", True),
        ("Qwen/Qwen2.5-0.5B", True),
        ("is_gemma", True),
        ("gpt2", True),
        ("GPT_NeoX", True),
        ("glmnet phase", False),
    ],
)
def test_family_names_are_recognised(text, named):
    assert bool(FAMILY_NAME.search(text)) == named


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path != PACKAGE / "config.py" and path not in ABOUT_ONE_CHECKPOINT],
    ids=name_of,
)
def test_numbers_have_their_home_in_configs(path):
    found = [
        f"line {node.lineno}: {node.value}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
        and node.value in NUMBERS_OF_CONFIGS
    ]
    assert found == [], "derive these from the config, codec spec or tokenizer"


def dotted_name(node: ast.expr) -> str:
    """``a.b.c`` for a chain of attributes, "" for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


FORBIDDEN_NAMES = frozenset(
    {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    | {
        f"{module}.{name}"
        for module in ("pickle", "dill", "cloudpickle")
        for name in ("load", "loads", "Unpickler")
    }
    | {"joblib.load", "marshal.loads", "marshal.load", "tempfile.mktemp"}
)


def forbidden_calls(tree: ast.AST) -> list[str]:
    """Calls that run, unpickle or unpack what a stranger made, or that leave files behind."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted_name(call.func)
        last = call.func.attr if isinstance(call.func, ast.Attribute) else name
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        forbidden = {
            name: name in FORBIDDEN_NAMES,
            "torch.load without weights_only=True": name == "torch.load"
            and not is_constant(keywords.get("weights_only"), True),
            "extractall without filter": last == "extractall" and "filter" not in keywords,
            "trust_remote_code": "trust_remote_code" in keywords
            and not is_constant(keywords["trust_remote_code"], False),
            "allow_pickle": "allow_pickle" in keywords and not is_constant(keywords["allow_pickle"], False),
            "shell=True": is_constant(keywords.get("shell"), True),
            "NamedTemporaryFile(delete=False)": last == "NamedTemporaryFile"
            and is_constant(keywords.get("delete"), False),
        }
        found += [f"line {call.lineno}: {what}" for what, is_there in forbidden.items() if is_there]
    return found


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("omni_adapter", "recipes", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ],
    ids=name_of,
)
def test_nothing_runs_what_strangers_made(path):
    assert forbidden_calls(parse(path)) == []


@pytest.mark.parametrize(
    ("source", "is_forbidden"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("pickle.loads(data)", True),
        ("yaml.load(text)", True),
        ("yaml.safe_load(text)", False),
        ("numpy.load(path, allow_pickle=True)", True),
        ("eval(text)", True),
        ("model.eval()", False),
        ("tar.extractall(folder)", True),
        ("tar.extractall(folder, filter='data')", False),
        ("AutoModel.from_pretrained(base, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(base, trust_remote_code=flag)", True),
        ("tempfile.NamedTemporaryFile(delete=False)", True),
        ("subprocess.run(line, shell=True)", True),
    ],
)
def test_forbidden_calls_are_recognised(source, is_forbidden):
    assert bool(forbidden_calls(ast.parse(source))) == is_forbidden


def test_public_names_are_sorted_and_there():
    names = omni_adapter.__all__
    assert list(names) == sorted(set(names), key=lambda name: (not name.isupper(), name))  # constants first
    missing = [name for name in names if not hasattr(omni_adapter, name)]
    assert missing == []
    assert set(names) <= set(dir(omni_adapter)), "dir() shows less than __all__"


def test_public_names_are_documented():
    undocumented = []
    for name in omni_adapter.__all__:
        value = getattr(omni_adapter, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not (value.__doc__ or "").strip():
            undocumented.append(name)
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            is_method = inspect.isfunction(function) or isinstance(function, property)
            if is_method and not attribute.startswith("_") and not inspect.getdoc(function):
                undocumented.append(f"{name}.{attribute}")
    assert undocumented == []


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchName"):
        omni_adapter.NoSuchName  # noqa: B018


def test_import_is_light():
    heavy = ("torch", "transformers", "peft", "snac", "soundfile", "scipy", "pandas")
    code = f"import sys, omni_adapter; print(*[name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert run.stdout.split() == []


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_version_has_one_value():
    version = project_table()["version"]
    assert importlib.metadata.version("omni-adapter") == version
    assert getattr(omni_adapter, "__version__", version) == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_command_is_there():
    module, _, function = project_table()["scripts"]["omni-adapter"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def requirement_name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0]).lower()


def test_every_dependency_is_bounded_and_pinned():
    project = project_table()
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {requirement_name(line): line for line in lines if not line.startswith("#")}
    assert [line for line in pins.values() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    for requirement in requirements:
        name = requirement_name(requirement)
        assert name == "omni-adapter" or (">=" in requirement and name in pins), requirement


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, check=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_on_one_machine():
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            if HOME_PATH.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_typing_marker_is_there():
    assert (PACKAGE / "py.typed").is_file()
