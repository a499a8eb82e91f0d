"""The files of `deploy/`, as far as they can be checked without a cluster."""

import importlib
import re
import shlex

import pytest
import yaml

from launch.option_fields import declared
from launch.options import BatchOptions, Options
from launch.serve.options import ServeOptions
from tests.launch.process import ROOT

DEPLOY = ROOT / "deploy"
COMMANDS = {"batch": BatchOptions, "serve": ServeOptions}
NAMES = (*COMMANDS, "rayservice")


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text()))


def check_options(arguments, options):
    known = {one.flag for one in [*declared(options), *(one for one in declared(Options) if one.batch)]}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_runs_a_command_that_there_is_with_options_that_it_has(name):
    job = documents(name)[0]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    flowcache, command, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (flowcache, command) == ("flowcache", name)
    check_options(arguments, COMMANDS[name])


def test_the_rayservice_names_an_application_that_there_is_as_ray_serve_wants_it():
    schema = pytest.importorskip("ray.serve.schema", reason="pip install 'flowcache-engine[rayserve]'")
    service = documents("rayservice")[0]
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"upgradeStrategy", "serveConfigV2", "rayClusterConfig"}
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}
    [application] = schema.ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    check_options(shlex.split(application.args["options"]), ServeOptions)


@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_the_image_the_data_and_gpus_for_its_gangs(name):
    text, spec = (DEPLOY / f"{name}.yaml").read_text(), documents(name)[0]["spec"]
    spec = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    [workers] = spec["workerGroupSpecs"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == "flowcache:latest" and set(container["resources"]["limits"]) >= {"cpu", "memory"}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert group["rayStartParams"] is not None
    [worker] = workers["template"]["spec"]["containers"]
    gangs, stages = re.search(r"--gangs (\d+) --pp (\d+)", text).groups()
    gpus = workers["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == int(gangs) * int(stages)


@pytest.mark.parametrize("name", ["serve", "rayservice"])
def test_the_service_finds_the_head_and_the_key_is_no_text_of_the_file(name):
    job, service = documents(name)
    spec = job["spec"].get("rayClusterSpec") or job["spec"]["rayClusterConfig"]
    head, text = spec["headGroupSpec"]["template"], (DEPLOY / f"{name}.yaml").read_text()
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    [container] = head["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f"--port {ports[service['spec']['ports'][0]['targetPort']]} " in text
    [key] = container["env"]
    assert key["name"] == "FLOWCACHE_API_KEY" and "secretKeyRef" in key["valueFrom"]


def test_the_image_copies_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)", text, re.M):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    extras = set(re.search(r"\.\[([\w,]+)\]", text)[1].split(","))
    assert {f"{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras} == {True}
