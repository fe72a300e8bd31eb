"""As run_image.py, of the CUDA variant on a machine without a GPU: `run_cuda_image.py ROOT CONFIG PIP_CONF VOLUME...`.

What can be seen without one: every package is imported, every library finds those that it is linked to, Triton's
compiler compiles, a server that is meant to have a GPU says why it has none, and one that is told to do without serves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from run_image import Container, Server, bind_targets, check, size_of

LIMIT_GB = 8.5
IMPORTS = ("torch", "triton", "flash_attn.cute", "quack", "cutlass", "tvm_ffi", "pilotfish.engine.build")
FROM_THE_DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
OPTIONAL = ("nvshmem_transport_", "nvshmem_bootstrap_", "libcufile_rdma", "libnvshmem_host")
"""Libraries for hardware and programs that a server has or has not (InfiniBand, MPI): they are loaded on demand."""
BUILD = """
import sysconfig, subprocess, tempfile, pathlib
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "a.c").write_text('#include <Python.h>\\nint main(void) { return 0; }\\n')
import triton.backends.nvidia as nvidia
cuda = pathlib.Path(nvidia.__file__).parent / "include"
subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "a.so", folder / "a.c", "-include", cuda / "cuda.h",
                "-I", sysconfig.get_path("include")], check=True)
print("compiled")
"""


def ldd(container: Container, root: Path) -> list[str]:
    """The libraries that a file of the installation is linked to and that are nowhere in it, each with who asks for
    it. Those that are there, but not where it looks, are loaded before it: torch's by torch."""
    there = {path.name for path in (root / "opt" / "pilotfish").rglob("*.so*")}
    found = container.run(
        "sh",
        "-c",
        "find /opt/pilotfish -name '*.so*' -type f | while read -r file; do ldd \"$file\" 2> /dev/null "
        "| grep 'not found' | sed \"s|^[[:space:]]*|${file##*/} |\"; done; true",
    )
    lines = {tuple(line.split()[:2]) for line in found.splitlines() if line.strip()}
    return sorted(
        f"{who}: {what}"
        for who, what in lines
        if what not in there and what not in FROM_THE_DRIVER and not any(who.startswith(name) for name in OPTIONAL)
    )


def refused(container: Container, environment: dict[str, str]) -> str:
    """The last line of a server that cannot start."""
    command = container.command("pilotfish", "serve", environment=environment)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def main(root: Path, config_file: Path, pip_conf: Path, volumes: list[str]) -> None:
    config = json.loads(config_file.read_text())["Docker"]["config"]
    size = size_of(root)
    print(f"size: {size / 1e9:.2f} GB of files (limit {LIMIT_GB:.2f})")
    assert size < LIMIT_GB * 1e9
    assert (root / "usr/bin/gcc").exists()
    assert config["User"].split(":")[0] not in ("", "0", "root"), config["User"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o755)
        container = Container(root, config, bind_targets(root, volumes, work, pip_conf, config))
        assert container.run("id", "-u") == config["User"].split(":")[0]
        print(f"user: {config['User']}")
        print(
            container.run("python", "-c", "import torch; print('torch', torch.__version__, 'for', torch.version.cuda)")
        )
        for name in IMPORTS:
            container.run("python", "-c", f"import {name}")
        print(f"imported: {', '.join(IMPORTS)}")
        loaded = "from pilotfish.engine.layers.attention.flash import load_flash4; print(load_flash4((9, 0)).name)"
        print(f"attention: {container.run('python', '-c', loaded)}")
        missing = ldd(container, root)
        assert not missing, missing
        print(f"ldd: every library is there, but for the driver's ({', '.join(FROM_THE_DRIVER)})")
        print(f"gcc: {container.run('python', '-c', BUILD).splitlines()[-1]} against Python.h and Triton's cuda.h")
        resolve = "from pilotfish.checkpoints.catalog import resolve; print(resolve('smollm2-135m').path.name)"
        print(f"model: downloaded into the volume, {container.run('python', '-c', resolve, network=True)}")
        for environment in ({"PILOTFISH_DEVICE": "cuda"}, {"NVIDIA_VISIBLE_DEVICES": "all"}):
            said = refused(container, environment)
            assert "cannot use it" in said or "no GPU was found" in said, said
            print(f"without a GPU, {' '.join(f'{k}={v}' for k, v in environment.items())}: {said}")
        config["Env"] = [*config["Env"], "PILOTFISH_DEVICE=cpu"]
        server = Server(container, work / "server.log")
        try:
            check(server, container)
        except BaseException:
            print(server.log.read_text(), file=sys.stderr)
            raise
        finally:
            if server.outer.poll() is None:
                server.outer.kill()
    print("all is as it should be")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
