"""A fake kubectl whose cluster is a folder: applied objects are files, and errors have the words of a real kubectl.

The file `calls` lists all calls. Tests change the objects, as the operator would.
"""

import json
import shlex
import stat
import sys
from pathlib import Path

import yaml

CREATED = "2026-01-01T00:00:00Z"


def install(folder: Path) -> Path:
    """Make the cluster's folder and return it; the caller puts its bin/ on PATH."""
    cluster = folder / "kubernetes"
    (cluster / "bin").mkdir(parents=True)
    program = cluster / "bin" / "kubectl"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, __file__, str(cluster)])} "$@"\n')
    program.chmod(stat.S_IRWXU)
    return cluster


def path(cluster: Path, kind: str, name: str) -> Path:
    return cluster / f"{kind}.{name}.json"


def main(cluster: Path, arguments: list[str]) -> None:
    with (cluster / "calls").open("a") as calls:
        calls.write(shlex.join(arguments) + "\n")
    options = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    words = [word for word in arguments if not word.startswith("--")]
    if options.get("context", "here") != "here":
        sys.exit(f'error: context "{options["context"]}" does not exist')
    match words:
        case ["apply"]:
            for document in yaml.safe_load_all(sys.stdin.read()):
                kind, name = document["kind"].lower(), document["metadata"]["name"]
                document["metadata"]["creationTimestamp"] = CREATED
                if "dry-run" not in options:
                    path(cluster, kind, name).write_text(json.dumps(document))
                print(f"{kind}/{name} created")
        case ["get", "pods"]:
            print(json.dumps({"items": [json.loads(pod.read_text()) for pod in cluster.glob("pod.*.json")]}))
        case ["get", "rayjobs.ray.io,configmaps"]:
            kinds = [*cluster.glob("rayjob.*.json"), *cluster.glob("configmap.*.json")]
            print(json.dumps({"items": [json.loads(each.read_text()) for each in kinds]}))
        case ["get", kind, name]:
            kind = kind.removesuffix("s")
            if not path(cluster, kind, name).exists():
                sys.exit(f'Error from server (NotFound): {kind}s "{name}" not found')
            found = json.loads(path(cluster, kind, name).read_text())
            print("\n".join(found["data"]) if "go-template" in options["output"] else json.dumps(found))
        case ["delete", "rayjobs.ray.io", name]:
            path(cluster, "rayjob", name).unlink(missing_ok="ignore-not-found" in options)
        case ["logs", pod]:
            print((cluster / f"{pod}.log").read_text(), end="")
        case _:
            sys.exit(f"error: unknown command {words}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
