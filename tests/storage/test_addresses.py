"""Secrets in addresses: refused in recipes and cluster files, hidden in messages, filled in at the point of use."""

import contextlib
import json
from pathlib import Path

import pytest

from tests.support.web_server import WebServer
from vimscale.data.dataset import Dataset
from vimscale.errors import ClusterError, DataError, RecipeError, RunFailed
from vimscale.launch import cluster
from vimscale.launch.jobs import backend as jobs
from vimscale.launch.jobs.on_kuberay import KubeRayJobs
from vimscale.launch.jobs.on_local import LocalJobs
from vimscale.launch.jobs.on_ray import RayJobs
from vimscale.launch.jobs.on_slurm import SlurmJobs
from vimscale.prepare import adopt
from vimscale.recipe import recipe
from vimscale.storage import addresses

HOLDING = {
    "a password": "https://me:hidden@host/train",
    "one with a slash": "https://me:hid/hidden@host/train",
    "one with an @": "https://me:hid@hidden@host/train",
    "one that looks like a port": "https://me:8080/hidden@host",
    "one with a space": "https://me:hid hidden@host/train",
    "keys of a bucket": "s3://AKIA:hidden@bucket/train",
    "a token": "https://hidden@host/train",
    "S3": "https://b.s3.amazonaws.com/x?X-Amz-Expires=60&X-Amz-Signature=hidden&X-Amz-Credential=hidden",
    "Azure": "https://a.blob.core.windows.net/x?sv=2024-11-04&sig=hidden%3D",
    "Google": "https://storage.googleapis.com/x?GoogleAccessId=a&Signature=hidden",
    "a bare token": "https://host/x?hiddenhiddenhidden",
    "behind a #": "https://host/x#access_token=hidden",
    "a chain": "zip://a.zip::https://me:hidden@host/x",
}
HARMLESS = (
    "https://host:8443/train",
    "http://[::1]:80/x",
    "https://host/x?download=1",
    "s3://bucket/a:b@c",
    "abfss://container@account.dfs.core.windows.net/x",
    "sftp://me@host/x",
    "https://me:${PASSWORD}@host/x?sig=${SIGNATURE}",
    "https://host/x?${QUERY}",
    "digits:train",
    "/data/a:b@c?sig=1",
)


@pytest.mark.parametrize("address", HOLDING.values(), ids=HOLDING)
def test_an_address_with_a_secret_is_refused_without_showing_it(address: str) -> None:
    for change in (
        f"data.train='{address}'",
        f"data.val='{address}'",
        f"data.train=[{{data: '{address}'}}]",
        f"checkpoint.mirror='{address}'",
        f"model.weights='{address}'",
    ):
        with pytest.raises(
            RecipeError, match=r"name an environment variable in its place, as in https://me:\$\{"
        ) as no:
            recipe.load("vim_digits_cpu", [change])
        assert "hidden" not in str(no.value)
    for change in (f"mirror='{address}'", f"ray.address='{address}'", f"environment.HTTPS_PROXY='{address}'"):
        with pytest.raises(ClusterError, match="the address holds") as no:
            cluster.load("ray", [change])
        assert "hidden" not in str(no.value)


@pytest.mark.parametrize("address", HARMLESS)
def test_an_address_without_a_secret_is_accepted(address: str) -> None:
    assert recipe.load("vim_digits_cpu", [f"data.train='{address}'"]).data.train == address


@pytest.mark.parametrize("address", HOLDING.values(), ids=HOLDING)
def test_messages_hide_the_secrets_of_addresses(address: str) -> None:
    assert "hidden" not in addresses.shown(address)
    if " " not in address:  # within a text, a space ends the address
        for error in (DataError, RunFailed):
            assert "hidden" not in str(error(f"no answer from {address}; check it, and {address}"))
    with pytest.raises(RecipeError) as no:
        recipe.load("vim_digits_cpu", [f"seed={address}", f"data.vall={address}"])
    assert "hiddenhidden" not in str(no.value).replace(" ", "")
    assert addresses.masked("a: b@c, see s3://b/x; d") == "a: b@c, see s3://b/x; d"


def test_variables_are_filled_in_and_escaped_only_before_the_host() -> None:
    environment = {"P": "a/b@c", "Q": "?sv=1&sig=a%2Fb"}
    assert addresses.filled("https://me:${P}@host/x?${Q}", environment) == "https://me:a%2Fb%40c@host/x?sv=1&sig=a%2Fb"
    assert addresses.filled("/data/${P}", environment) == "/data/${P}"


def test_a_data_set_is_read_with_a_password_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://me:${VIMSCALE_TEST_PASSWORD}@"
    with WebServer(tmp_path) as server, contextlib.ExitStack() as stack:
        stack.callback(server.shutdown)
        url = server.url.replace("http://", address)
        with pytest.raises(DataError, match="VIMSCALE_TEST_PASSWORD is not set in the environment; export it"):
            Dataset.open(url)
        monkeypatch.setenv("VIMSCALE_TEST_PASSWORD", "secret")
        with pytest.raises(DataError, match=r"has no manifest.json") as no:
            Dataset.open(url)
        assert server.passwords["manifest.json"] == "Basic bWU6c2VjcmV0"
        assert "secret" not in str(no.value)
        # variables in a manifest stay unfilled: it could have them sent anywhere
        manifest = {"format": 1, "name": "x", "classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1]}
        base = f"{server.url}/elsewhere?${{VIMSCALE_TEST_PASSWORD}}"
        shard = {"name": "0.tar", "samples": 1, "bytes": 1024, "sha256": "0" * 64}
        manifest |= {"source": "", "licence": "", "samples": 1, "shards": [shard], "base": base}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        opened = Dataset.open(url)
        assert "secret" not in opened.store.url


@pytest.mark.parametrize("backend", ["local", "ray", "kuberay_h100", "slurm"])
def test_jobs_show_the_variable_and_require_it_among_the_secrets(backend: str) -> None:
    chosen = recipe.load(
        "vim_digits_cpu", ["data.train='https://me:${PASSWORD}@host/x?${QUERY}'", "data.val=null", "model.weights=null"]
    )
    makers = {"local": LocalJobs, "ray": RayJobs, "kuberay_h100": KubeRayJobs, "slurm": SlurmJobs}
    named = ["secrets=[PASSWORD, QUERY]", *(["kuberay.secret=s"] if backend.startswith("kube") else [])]
    text = makers[backend](cluster.load(backend, named)).render(chosen)
    assert "https://me:${PASSWORD}@host/x?${QUERY}" in text
    if backend != "local":
        with pytest.raises(RecipeError, match="takes QUERY from the environment, but jobs get only the variables"):
            jobs.for_cluster(chosen, cluster.load(backend, ["environment.PASSWORD=x"]))


def test_an_index_of_tars_at_an_address_with_a_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which the manifest would hold too") as no:
        adopt.index(["https://me:hidden@host/{0..3}.tar"], tmp_path / "out")
    assert "hidden" not in str(no.value)
