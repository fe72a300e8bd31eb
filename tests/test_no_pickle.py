"""Nothing of Pilotfish unpickles: what comes over pipes and sockets, or lies in files, is data and cannot run code.

Child processes that `pilotfish selftest` and benchmarks start by multiprocessing get their arguments from their parent.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("server", "tools", "pilotfish/library", "engine", "text", "checkpoints", "docker", "examples")
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    *("torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("recv_pyobj", "send_pyobj", "broadcast_object_list", "all_gather_object", "eval", "exec"),
}


def names(tree: ast.AST) -> list[str]:
    """The modules that a file imports, and what it calls, as it spells them."""
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found += [alias.name.partition(".")[0] for alias in node.names]
            case ast.ImportFrom(module=str(module)):
                found.append(module.partition(".")[0])
            case ast.Call(func=ast.Name(id=name)):
                found.append(name)
            case ast.Call(func=ast.Attribute()):
                spelled = ast.unparse(node.func)
                found += [spelled, spelled.rpartition(".")[2]] if "(" not in spelled else []
    return found


def forbidden(tree: ast.AST) -> set[str]:
    return {name for name in names(tree) if name in MODULES or name in CALLS}


def test_no_room_unpickles() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 300
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := forbidden(ast.parse(path.read_bytes())))}
    # model.eval() is torch's, and runs nothing
    assert {path: found - {"eval"} for path, found in wrong.items() if found - {"eval"}} == {}


def test_it_would_be_found() -> None:
    for line in ("import pickle", "from pickle import loads", "torch.load(path)", "socket.recv_pyobj()", "exec(x)"):
        assert forbidden(ast.parse(line)), line
